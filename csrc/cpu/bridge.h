// What the driver (bridge.cpp) and the kernels (bridge_kernel.h, once per instruction set) agree on.
#pragma once

#include <cstdint>

#include "../math.h"
#include "isa.h"

namespace ivfast {

// Rows [first, last) of codes [rows, d]; t+1 outputs or gradients of `stride` elements each. Contiguous.
struct SubstitutionRows {
  int64_t d, t, first, last, stride;
  const double *cos, *sin;  // [t+1], radial
  const void *z, *draws;
  void* out;  // [t+1, rows, d]
  const void* grad;
  void* dz;  // [rows, d]
};

struct SubstitutionStages {
  void (*blockwise)(const SubstitutionRows&);
  void (*blockwise_backward)(const SubstitutionRows&);
  void (*radial)(const SubstitutionRows&);
  void (*radial_backward)(const SubstitutionRows&);
};

IVFAST_IN_EACH_ISA(SubstitutionStages substitution_stages(Storage))

}  // namespace ivfast
