// What the driver (linear_adam.cpp) and the kernel (linear_adam_kernel.h, once per instruction set) agree on.
#pragma once

#include <cstdint>

#include "isa.h"

namespace ivfast {

// A linear layer's weights [outputs, inputs], and Adam's averages m and v of them.
struct LinearAdam {
  int64_t count, outputs, inputs;  // count: samples
  float *weight, *mean, *square;
  const float *grad, *x;           // in panels
  float rate, root_correction, eps;  // lr/(1 − β₁^s), 1/√(1 − β₂^s)
  float rest1, beta2, rest2;         // 1 − β₁, β₂, 1 − β₂
};

// A matrix [count, width] as panels [count, panel] of its columns, zeros behind the last: rows of a power of two apart
// would all fall into one set of the first-level cache.
struct Panels {
  const float* from;
  float* to;
  int64_t count, width, panel;
};

struct LinearAdamStages {
  int64_t outputs, inputs;                                        // of a tile: the widths of the panels of grad and x
  void (*pack)(const Panels&, int64_t first, int64_t last);       // a range of panels
  void (*step)(const LinearAdam&, int64_t first, int64_t last);   // a range of grad's panels
};

IVFAST_IN_EACH_ISA(LinearAdamStages linear_adam_stages())

}  // namespace ivfast
