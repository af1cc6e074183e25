// The exponential of the ELBO on the CPU: one loss and one KL per sample, few enough for scalar code.
#include <cmath>
#include <tuple>

#include "rows.h"

namespace ivfast {
namespace {

constexpr double most = 80;  // as in ivfast/ops/exp_elbo.py
constexpr int64_t exp_elbo_flop = 100;

// a rec_i + b KL_i; a factor of 0 drops its term even if it is infinite
struct Exponent {
  Elements reconstruction, kl;
  double a, b;
  double operator[](int64_t i) const { return (a == 0 ? 0 : a * reconstruction[i]) + (b == 0 ? 0 : b * kl[i]); }
};

// NaN for NaN
double clamped(double t) { return t > most ? most : t; }

// (1/α) mean_i exp(min(t_i, 80))
Tensor exp_elbo_loss(const Tensor& reconstruction_, const Tensor& kl_, double a, double b, double alpha) {
  const Tensor reconstruction = as_contiguous(reconstruction_), kl = as_contiguous(kl_);
  const Rows rows(kl);
  Tensor loss = empty(kl, rows.shape, arithmetic(kl.scalar_type()));
  const Exponent exponent{Elements(reconstruction), Elements(kl), a, b};
  const Elements out(loss);
  each_range(rows.count, rows.d * exp_elbo_flop, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      double sum = 0;
      for (int64_t i = row * rows.d; i < (row + 1) * rows.d; ++i) sum += std::exp(clamped(exponent[i]));
      out.set(row, sum / (alpha * double(rows.d)));
    }
  });
  return loss;
}

// ∂rec_i = a e_i/(α n),  ∂KL_i = b e_i/(α n); none where the exponent is clamped
std::tuple<Tensor, Tensor> exp_elbo_loss_backward(const Tensor& grad_, const Tensor& reconstruction_, const Tensor& kl_,
                                                  double a, double b, double alpha) {
  const Tensor grad = as_contiguous(grad_), reconstruction = as_contiguous(reconstruction_), kl = as_contiguous(kl_);
  const Rows rows(kl);
  Tensor dreconstruction = empty(kl, rows.full, kl.scalar_type()), dkl = empty(kl, rows.full, kl.scalar_type());
  const Exponent exponent{Elements(reconstruction), Elements(kl), a, b};
  const Elements g(grad), to_reconstruction(dreconstruction), to_kl(dkl);
  each_range(rows.count, rows.d * exp_elbo_flop, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const double scale = g[row] / (alpha * double(rows.d));
      for (int64_t i = row * rows.d; i < (row + 1) * rows.d; ++i) {
        const double t = exponent[i], e = t > most ? 0 : scale * std::exp(t);
        to_reconstruction.set(i, a * e), to_kl.set(i, b * e);
      }
    }
  });
  return {dreconstruction, dkl};
}

STABLE_TORCH_LIBRARY_IMPL(ivfast, CPU, m) {
  m.impl("exp_elbo_loss", TORCH_BOX(&exp_elbo_loss));
  m.impl("exp_elbo_loss_backward", TORCH_BOX(&exp_elbo_loss_backward));
}

}  // namespace
}  // namespace ivfast
