// What the driver (inverse_root.cpp) and the kernels (inverse_root_kernel.h, once per instruction set) agree on.
#pragma once

#include <cstdint>

#include "../math.h"
#include "isa.h"

namespace ivfast {

constexpr int64_t most_rows = 128;  // of a matrix

// One symmetric matrix [d, d], contiguous, its inverse root, trace of the root and error, as `inverse_root` says.
struct SymmetricMatrix {
  const void* a;
  int64_t d;
  void* inverse;
  double trace = 0, error = 0;
  void* workspace = nullptr;
};

struct MatrixStages {
  int64_t (*bytes)(const SymmetricMatrix&);
  void (*run)(SymmetricMatrix&);
};

IVFAST_IN_EACH_ISA(MatrixStages matrix_stages(Storage))

}  // namespace ivfast
