// Interface between the driver (svgd_bridge.cpp) and the kernels (svgd_bridge_kernel.h, once per instruction set).
//
// T is the dtype of the arithmetic, S that of z, the draws and the bridges.
#pragma once

#include "../math.h"
#include "isa.h"

namespace ivfast {

// One step of one particle set: next = x + step_size φ(x) + noise ε. Matrices are contiguous [n, d].
struct BridgeStep {
  int64_t n, d;
  double step_size, scale, noise;
  const void* x;             // T
  void *phi, *row_sum;       // T
  const void* draw;          // S, ε
  void *next, *bridge;       // T; the same in S, or null
  const void* bridge_grad;   // S, ∂L/∂bridge, or null
  void *grad, *pushed, *dx;  // T: ∂L/∂next, which becomes ∂L/∂x; step_size ∂L/∂next; its product with ∂φ/∂x
  void* workspace;           // stages.bytes(n, d, …), aligned to 64
};

// For sets of up to this many particles, one function computes distances, median and φ.
constexpr int64_t bridge_small = 128;

struct BridgeStages {
  int64_t (*bytes)(int64_t n, int64_t d, bool backward);
  double (*direction)(const BridgeStep&);             // φ and the row sums of a small set; its h
  void (*advance)(const BridgeStep&);                 // next and bridge from x, φ and ε
  void (*push)(const BridgeStep&);                    // grad += bridge_grad; pushed = step_size grad
  void (*pull)(const BridgeStep&, double h);          // dx of a small set
  bool (*lost)(const BridgeStep&, double h, bool backward);  // after either: whether rounding of the distances shows
  void (*collect)(const BridgeStep&);                 // grad += dx
  void (*finish)(const BridgeStep&);                  // bridge = grad + bridge_grad
  void (*widen)(const void* from, void* to, int64_t count);  // converts S to T
};

IVFAST_IN_EACH_ISA(BridgeStages bridge_stages(Storage))

}  // namespace ivfast
