// Diagonal Gaussian posteriors on the CPU: the operators.
#include "gaussian.h"

#include <optional>
#include <tuple>

#include "isa.h"
#include "rows.h"

namespace ivfast {
namespace {

constexpr int64_t gaussian_flop = 40;  // an exponential and a polynomial

template <class Stage>
void run(const Rows& rows, const GaussianRows& all, Stage stage) {
  each_range(rows.count, rows.d * gaussian_flop, [&](int64_t first, int64_t last) {
    GaussianRows part = all;
    part.first = first, part.last = last;
    stage(part);
  });
}

void check(const Tensor& x, const Rows& rows, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(int64_t(x.numel()) == rows.count * rows.d && x.scalar_type() == dtype, name, " must match mu");
}

std::tuple<Tensor, Tensor> forward(const Tensor& mu_, const Tensor& logvar_, const Tensor* draws_) {
  const Rows rows(mu_);
  const ScalarType dtype = mu_.scalar_type(), wide = arithmetic(dtype);
  check(logvar_, rows, dtype, "logvar");
  const Tensor mu = as_contiguous(mu_), logvar = as_contiguous(logvar_), draws = draws_ ? as_contiguous(*draws_) : mu;
  Tensor kl = empty(mu, rows.shape, wide), z = draws_ ? empty_large(mu, rows.full, dtype) : kl;
  GaussianRows all{rows.d, 0, 0, mu.data_ptr(), logvar.data_ptr()};
  all.kl = kl.data_ptr();
  if (draws_) check(draws, rows, dtype, "draws"), all.draws = draws.data_ptr(), all.z = z.data_ptr();
  run(rows, all, IVFAST_BY_ISA(gaussian_stages, storage(dtype)).forward);
  return {z, kl};
}

std::tuple<Tensor, Tensor> backward(const std::optional<Tensor>& dz_, const std::optional<Tensor>& dkl_, const Tensor& mu_,
                                    const Tensor& logvar_, const Tensor* draws_) {
  const Rows rows(mu_);
  const ScalarType dtype = mu_.scalar_type();
  const Tensor mu = as_contiguous(mu_), logvar = as_contiguous(logvar_), draws = draws_ ? as_contiguous(*draws_) : mu;
  const Tensor dz = dz_ ? as_contiguous(*dz_) : mu, dkl = dkl_ ? as_contiguous(*dkl_) : mu;
  Tensor dmu = empty_large(mu, rows.full, dtype), dlogvar = empty_large(mu, rows.full, dtype);
  GaussianRows all{rows.d, 0, 0, mu.data_ptr(), logvar.data_ptr(), draws.data_ptr()};
  all.dz = dz_ ? dz.data_ptr() : nullptr, all.dkl = dkl_ ? dkl.data_ptr() : nullptr;
  all.dmu = dmu.data_ptr(), all.dlogvar = dlogvar.data_ptr();
  run(rows, all, IVFAST_BY_ISA(gaussian_stages, storage(dtype)).backward);
  return {dmu, dlogvar};
}

Tensor gaussian_kl(const Tensor& mu, const Tensor& logvar) { return std::get<1>(forward(mu, logvar, nullptr)); }
std::tuple<Tensor, Tensor> gaussian_kl_backward(const Tensor& grad, const Tensor& mu, const Tensor& logvar) {
  return backward(std::nullopt, grad, mu, logvar, nullptr);
}
std::tuple<Tensor, Tensor> reparameterize(const Tensor& mu, const Tensor& logvar, const Tensor& draws) {
  return forward(mu, logvar, &draws);
}
std::tuple<Tensor, Tensor> reparameterize_backward(const std::optional<Tensor>& dz, const std::optional<Tensor>& dkl,
                                                   const Tensor& mu, const Tensor& logvar, const Tensor& draws) {
  return backward(dz, dkl, mu, logvar, &draws);
}

STABLE_TORCH_LIBRARY_IMPL(ivfast, CPU, m) {
  m.impl("gaussian_kl", TORCH_BOX(&gaussian_kl));
  m.impl("gaussian_kl_backward", TORCH_BOX(&gaussian_kl_backward));
  m.impl("reparameterize", TORCH_BOX(&reparameterize));
  m.impl("reparameterize_backward", TORCH_BOX(&reparameterize_backward));
}

}  // namespace
}  // namespace ivfast
