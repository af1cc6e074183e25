// An Adam step on a linear layer's weights, whose gradient gᵀx is never stored; included once per instruction set.
//
// A register tile of the gradient is summed over the samples and applied at once: w, m and v are read and written once,
// which is the cost of the step.
#pragma once

#include <cfloat>

#include "lanes.h"
#include "linear_adam.h"
#include "reciprocal.h"

namespace ivfast {
namespace IVFAST_ISA {
namespace {

constexpr int adam_rows = IVFAST_VECTOR_BYTES == 64 ? 8 : 4, adam_vectors = 3;  // of a register tile
constexpr int64_t adam_columns = adam_vectors * lanes<float>;

void pack_panels(const Panels& p, int64_t first, int64_t last) {
  for (int64_t panel = first; panel < last; ++panel) {
    const int64_t column = panel * p.panel, rest = p.width - column, width = rest < p.panel ? rest : p.panel;
    for (int64_t n = 0; n < p.count; ++n) {
      const float* const from = p.from + n * p.width + column;
      float* const to = p.to + (panel * p.count + n) * p.panel;
      for (int64_t c = 0; c < width; ++c) to[c] = from[c];
      for (int64_t c = width; c < p.panel; ++c) to[c] = 0;
    }
  }
}

// m ← β₁ m + (1 − β₁) g,  v ← β₂ v + (1 − β₂) g²,  w ← w − rate m/(√v · root_correction + ε)
IVFAST_INLINE void adam(const LinearAdam& a, int64_t row, int64_t column, Vec<float> g) {
  const int64_t at_row = row * a.inputs;
  Vec<float> w = load_part<float>(a.weight + at_row, column, a.inputs);
  Vec<float> m = load_part<float>(a.mean + at_row, column, a.inputs);
  Vec<float> v = load_part<float>(a.square + at_row, column, a.inputs);
  m += a.rest1 * (g - m);
  v = a.beta2 * v + a.rest2 * (g * g);
  const Vec<float> least = Vec<float>{} + FLT_MIN;
  const Vec<float> root = v * reciprocal_root(v < least ? least : v);
  w -= a.rate * m * reciprocal(root * a.root_correction + a.eps);
  store_part<float>(a.weight + at_row, w, column, a.inputs);
  store_part<float>(a.mean + at_row, m, column, a.inputs);
  store_part<float>(a.square + at_row, v, column, a.inputs);
}

void step_panels(const LinearAdam& a, int64_t first, int64_t last) {
  constexpr int R = adam_rows, C = adam_vectors, L = lanes<float>;
  for (int64_t panel = first; panel < last; ++panel)
    for (int64_t column = 0; column < a.inputs; column += adam_columns) {
      const float *grad = a.grad + panel * a.count * R, *x = a.x + column * a.count;
      Vec<float> g[R][C] = {};
      for (int64_t n = 0; n < a.count; ++n, grad += R, x += adam_columns) {
        Vec<float> part[C];
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) part[c] = load_vector(x + c * L);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
          for (int c = 0; c < C; ++c) g[r][c] += grad[r] * part[c];
      }
      Vec<float> sums[R][C];  // in memory: one copy of `adam` serves the whole register tile
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) sums[r][c] = g[r][c];
#pragma GCC unroll 1
      for (int r = 0; r < R && panel * R + r < a.outputs; ++r)
#pragma GCC unroll 1
        for (int c = 0; c < C && column + c * L < a.inputs; ++c) adam(a, panel * R + r, column + c * L, sums[r][c]);
    }
}

}  // namespace

LinearAdamStages linear_adam_stages() { return {adam_rows, adam_columns, pack_panels, step_panels}; }

}  // namespace IVFAST_ISA
}  // namespace ivfast
