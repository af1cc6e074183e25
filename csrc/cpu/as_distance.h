// Interface between the driver (as_distance.cpp) and the kernels (as_distance_kernel.h, once per instruction set).
#pragma once

#include <cstdint>

#include "../math.h"
#include "isa.h"

namespace ivfast {

// Two batches of posteriors, r at index 0 and g at index 1: contiguous [n[k], d].
struct Posteriors {
  int64_t n[2], d, size;  // size: rows of a block, a multiple of 64
  bool unbiased;
  const void *mu[2], *logvar[2];
  void *dmu[2], *dlogvar[2];  // backward
  double log_sum[3], grad[3];  // for rr, gg and rg; results in forward, inputs in backward
  void* workspace;             // stages.bytes(…), aligned to 64

  // Blocks are numbered consecutively, first those of r, then those of g.
  int64_t blocks(int batch) const { return (n[batch] + size - 1) / size; }
  int64_t blocks() const { return blocks(0) + blocks(1); }
};

// Each block is begun once, then paired once with every other block, then finished. Two stages on different blocks may
// run at the same time; the order of one block's stages determines its rounding.
struct AsDistanceStages {
  int64_t (*bytes)(const Posteriors&);
  void (*begin)(const Posteriors&, int64_t block);
  void (*pair)(const Posteriors&, int64_t block, int64_t other);
  void (*finish)(const Posteriors&, int64_t block);  // null in the forward pass
  void (*collect)(Posteriors&);                      // the log-sums; null in the backward pass
  bool (*clamped)(const Posteriors&);                // whether a variance was outside the range
};

struct AsDistanceForm {
  bool additive, prior, backward;
};

IVFAST_IN_EACH_ISA(AsDistanceStages as_distance_stages(Storage, AsDistanceForm))

}  // namespace ivfast
