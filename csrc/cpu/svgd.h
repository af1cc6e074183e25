// Interface between the driver (svgd.cpp) and the kernels (svgd_kernel.h, once per instruction set).
#pragma once

#include "../math.h"
#include "isa.h"

namespace ivfast {

// One particle set: x, score, grad and their results are contiguous [n, d]; score may be null (target N(0, I)).
struct SvgdSet {
  int64_t n, d;
  double h;
  const void *x, *score, *grad;
  void *phi, *row_sum;  // forward; row_sum [n] is in the dtype of the arithmetic
  void *dx, *dscore;    // backward
  bool bandwidth_gradient;
  void* workspace;  // Stages::bytes(n, d), aligned to 64
};

// Rows and columns of a tile of K; small sets gain from finer symmetry.
constexpr int64_t svgd_tile(int64_t n) { return n <= 256 ? 32 : 64; }

// Rows [first, last) are a block of particles; first is a multiple of svgd_tile(n).
// Each block is begun once, then paired once with every other block, then finished. Two stages on different blocks may
// run at the same time; the order of one block's stages determines its rounding.
struct SvgdStages {
  int64_t (*bytes)(int64_t n, int64_t d);
  void (*centre)(const SvgdSet&);
  void (*begin)(const SvgdSet&, int64_t first, int64_t last);
  void (*pair)(const SvgdSet&, int64_t first, int64_t last, int64_t other_first, int64_t other_last);
  void (*finish)(const SvgdSet&, int64_t first, int64_t last);
  double (*bandwidth_gradient)(const SvgdSet&);  // of a set that asks for it; null in the forward pass
  bool (*lost)(const SvgdSet&);                  // after all: whether rounding of the distances shows in the result
};

IVFAST_IN_EACH_ISA(SvgdStages svgd_stages(Storage, bool backward))


}  // namespace ivfast
