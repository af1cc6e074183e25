// The importance-weighted generator loss on the CPU: one logit per sample, few enough for scalar code.
#include <cmath>

#include "rows.h"

namespace ivfast {
namespace {

constexpr int64_t importance_flop = 200;

// w = softmax(l) of the logits [first, first + n), as e^(l − largest)/sum; NaN gives NaN.
struct Weights {
  const Elements& l;
  double most, sum = 0;

  Weights(const Elements& l, int64_t first, int64_t n) : l(l), most(l[first]) {
    for (int64_t i = first; i < first + n; ++i) most = most < l[i] ? l[i] : most;
    for (int64_t i = first; i < first + n; ++i) sum += std::exp(l[i] - most);
  }
  double operator[](int64_t i) const { return std::exp(l[i] - most) / sum; }
};

// −Σ w_i log σ(l_i),  −log σ(l) = log(1 + e^−|l|) − min(l, 0)
Tensor importance_weighted_loss(const Tensor& logits_) {
  const Tensor logits = as_contiguous(logits_);
  const Rows rows(logits);
  Tensor loss = empty(logits, rows.shape, arithmetic(logits.scalar_type()));
  const Elements l(logits), out(loss);
  each_range(rows.count, rows.d * importance_flop, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const Weights weights(l, row * rows.d, rows.d);
      double total = 0;
      for (int64_t i = row * rows.d; i < (row + 1) * rows.d; ++i) {
        total += weights[i] * (std::log1p(std::exp(-std::abs(l[i]))) - std::min(l[i], 0.));
      }
      out.set(row, total);
    }
  });
  return loss;
}

// ∂l_i = −w_i σ(−l_i)
Tensor importance_weighted_loss_backward(const Tensor& grad_, const Tensor& logits_) {
  const Tensor grad = as_contiguous(grad_), logits = as_contiguous(logits_);
  const Rows rows(logits);
  Tensor dlogits = empty(logits, rows.full, logits.scalar_type());
  const Elements l(logits), g(grad), out(dlogits);
  each_range(rows.count, rows.d * importance_flop, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const Weights weights(l, row * rows.d, rows.d);
      for (int64_t i = row * rows.d; i < (row + 1) * rows.d; ++i) out.set(i, -g[row] * weights[i] / (1 + std::exp(l[i])));
    }
  });
  return dlogits;
}

STABLE_TORCH_LIBRARY_IMPL(ivfast, CPU, m) {
  m.impl("importance_weighted_loss", TORCH_BOX(&importance_weighted_loss));
  m.impl("importance_weighted_loss_backward", TORCH_BOX(&importance_weighted_loss_backward));
}

}  // namespace
}  // namespace ivfast
