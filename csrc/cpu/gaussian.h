// What the driver (gaussian.cpp) and the kernels (gaussian_kernel.h, once per instruction set) agree on.
#pragma once

#include <cstdint>

#include "../math.h"
#include "isa.h"

namespace ivfast {

// Rows [first, last) of posteriors N(mu, diag e^logvar), contiguous [rows, d]; kl and dkl are [rows] in the dtype of
// the arithmetic. A null output is not wanted, a null gradient is 0.
struct GaussianRows {
  int64_t d, first, last;
  const void *mu, *logvar, *draws;
  void *z, *kl;
  const void *dz, *dkl;
  void *dmu, *dlogvar;
};

struct GaussianStages {
  void (*forward)(const GaussianRows&);   // kl, and z where there are draws
  void (*backward)(const GaussianRows&);
};

IVFAST_IN_EACH_ISA(GaussianStages gaussian_stages(Storage))

}  // namespace ivfast
