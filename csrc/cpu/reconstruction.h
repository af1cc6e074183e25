// What the driver (reconstruction.cpp) and the kernels (reconstruction_kernel.h, once per instruction set) agree on.
#pragma once

#include <cstdint>

#include "../math.h"
#include "isa.h"

namespace ivfast {

enum class Reconstruction { l2, l1, bce };  // as in ivfast/ops/reconstruction.py

// Samples [first, last) of `size` elements, contiguous; loss and grad are [samples] in the dtype of the arithmetic.
struct ReconstructionRows {
  int64_t size, first, last;
  const void *output, *target;
  void* loss;
  const void* grad;
  void *doutput, *dtarget;  // dtarget may be null
};

struct ReconstructionStages {
  void (*forward)(const ReconstructionRows&);
  void (*backward)(const ReconstructionRows&);
};

IVFAST_IN_EACH_ISA(ReconstructionStages reconstruction_stages(Storage, Reconstruction))

}  // namespace ivfast
