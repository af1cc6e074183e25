// What the driver (multi_js.cpp) and the kernels (multi_js_kernel.h, once per instruction set) agree on.
#pragma once

#include <cstdint>

#include "../math.h"
#include "isa.h"

namespace ivfast {

// Rows [first, last) of one set of C·n rows of C logits; row r has the class r / n. The pointers are to the row `first`.
struct MultiJsRows {
  int64_t classes, n, first, last;
  double smoothing;     // s: the target is (1 − s) onehot + s/C
  double scale;         // of the gradient: ∂L/∂loss
  const void* weights;  // π [C], in the dtype of the arithmetic, or null: 1/C each
  const void* logits;   // contiguous
  void* lse;            // log-sum-exp of each row, in the dtype of the arithmetic: written forward, read backward
  void* gradient;       // like logits, and may be them in `both`
  void* scratch;        // C elements in the dtype of the arithmetic
};

// What the rows add to the loss Σ_r (π_c/n) [lse_r − (1 − s) x_rc − s mean x_r], and their gradient
// (softmax − target) scale π_c/n. `both` needs no lse.
struct MultiJsStages {
  double (*forward)(const MultiJsRows&);
  void (*backward)(const MultiJsRows&);
  double (*both)(const MultiJsRows&);
};

IVFAST_IN_EACH_ISA(MultiJsStages multi_js_stages(Storage))

}  // namespace ivfast
