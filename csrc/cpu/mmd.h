// Interface between the driver (mmd.cpp) and the kernels (mmd_kernel.h, once per instruction set).
#pragma once

#include <cstdint>

#include "../math.h"
#include "isa.h"

namespace ivfast {

// Samples x and y, at indices 0 and 1: contiguous [n[k], d].
struct TwoSamples {
  int64_t n[2], d, size;  // size: rows of a block, a multiple of mmd_tile(n)
  bool imq, unbiased;
  const double* scales;  // in units of `bandwidth`
  int64_t count;
  double bandwidth;
  const void* x[2];
  void* dx[2];      // in the dtype of the arithmetic; null if not requested
  void* workspace;  // stages.bytes(…), aligned to 64

  // Blocks are numbered consecutively, first those of x, then those of y.
  int64_t blocks(int k) const { return (n[k] + size - 1) / size; }
  int64_t blocks() const { return blocks(0) + blocks(1); }
};

// Rows and columns of a tile; small samples gain from finer symmetry.
constexpr int64_t mmd_tile(int64_t n) { return n <= 256 ? 32 : 64; }

// `prepare` comes first and `value`, which returns MMD², last. Each block is begun once, then paired once with every
// other block, then finished. Two stages on different blocks may run at the same time; the order of one block's stages
// determines its rounding.
struct MmdStages {
  int64_t (*bytes)(const TwoSamples&);
  void (*prepare)(const TwoSamples&);
  void (*begin)(const TwoSamples&, int64_t block);
  void (*pair)(const TwoSamples&, int64_t block, int64_t other);
  void (*finish)(const TwoSamples&, int64_t block);
  double (*value)(const TwoSamples&);
  double (*norm)(const TwoSamples&);  // after all: the largest ‖x_i‖²/2 of the centred samples
};

IVFAST_IN_EACH_ISA(MmdStages mmd_stages(Storage))

}  // namespace ivfast
