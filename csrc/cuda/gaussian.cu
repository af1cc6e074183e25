// Diagonal Gaussian posteriors: their KL to N(0, I), samples from them, and the gradients. A warp handles a row, or a
// part of a warp if d is small.
//
// KL = ½ Σ_d (μ² + e^v − 1 − v),  z = μ + e^{v/2} ε,  v the log-variance
#include "vectors.h"

#include <optional>
#include <tuple>

namespace ivfast {

constexpr int kGaussianThreads = 256;

// `count` rows of d elements, each shared by `lanes` neighbours of a warp
struct Posteriors {
  int64_t count;
  int d, lanes;

  __device__ __forceinline__ int64_t row() const {
    const int thread = threadIdx.x;
    return int64_t{blockIdx.x} * (kGaussianThreads / lanes) + thread / lanes;
  }
  // f(at) for this thread's elements at, at + 1, … of a row, Width at a time
  template <int Width, class F>
  __device__ __forceinline__ void each(F f) const {
    const int lane = static_cast<int>(threadIdx.x) & (lanes - 1);
    for (int at = lane * Width; at < d; at += lanes * Width) f(at);
  }
};

// e^x − 1 − x; near 0, where the difference would cancel, Σ_{k>=2} x^k/k!
__device__ __forceinline__ float expm1_minus(float x) {
  float series = 1.f / 5040;
  series = series * x + 1.f / 720;
  series = series * x + 1.f / 120;
  series = series * x + 1.f / 24;
  series = series * x + 1.f / 6;
  series = series * x + 1.f / 2;
  return fabsf(x) < 0.03f ? series * x * x : expm1f(x) - x;
}

template <int Width, class T>
__global__ void __launch_bounds__(kGaussianThreads) gaussian_kernel(
    const T* __restrict__ mu, const T* __restrict__ logvar, const T* __restrict__ draws, T* __restrict__ z,
    float* __restrict__ kl, Posteriors rows) {
  using Few = Elements<T, Width>;
  const int64_t row = rows.row(), offset = row * rows.d;
  float sum = 0.f;
  if (row < rows.count) {
    rows.each<Width>([&](int at) {
      const auto mu_at = Few::from(mu + offset + at), logvar_at = Few::from(logvar + offset + at);
      const auto draws_at = z ? Few::from(draws + offset + at) : Few{};
      Few out;
#pragma unroll
      for (int i = 0; i < Width; ++i) {
        const float m = static_cast<float>(mu_at.v[i]), v = static_cast<float>(logvar_at.v[i]);
        sum += m * m + expm1_minus(v);
        if (z) out.v[i] = static_cast<T>(m + expf(0.5f * v) * static_cast<float>(draws_at.v[i]));
      }
      if (z) out.to(z + offset + at);
    });
  }
  for (int lane = rows.lanes / 2; lane > 0; lane /= 2) sum += __shfl_xor_sync(~0u, sum, lane);
  if (row < rows.count && threadIdx.x % rows.lanes == 0) kl[row] = 0.5f * sum;
}

// ∂μ = ∂z + ∂kl μ,  ∂v = ½ (∂z ε e^{v/2} + ∂kl (e^v − 1)), with whichever of ∂z and ∂kl is given
template <int Width, class T>
__global__ void __launch_bounds__(kGaussianThreads) gaussian_backward_kernel(
    const T* __restrict__ dz, const float* __restrict__ dkl, const T* __restrict__ mu, const T* __restrict__ logvar,
    const T* __restrict__ draws, T* __restrict__ dmu, T* __restrict__ dlogvar, Posteriors rows) {
  using Few = Elements<T, Width>;
  const int64_t row = rows.row(), offset = row * rows.d;
  if (row >= rows.count) return;
  const float g = dkl ? dkl[row] : 0.f;
  rows.each<Width>([&](int at) {
    const auto logvar_at = Few::from(logvar + offset + at), mu_at = dkl ? Few::from(mu + offset + at) : Few{};
    const auto dz_at = dz ? Few::from(dz + offset + at) : Few{}, draws_at = dz ? Few::from(draws + offset + at) : Few{};
    Few dmu_at, dlogvar_at;
#pragma unroll
    for (int i = 0; i < Width; ++i) {
      const float v = static_cast<float>(logvar_at.v[i]);
      float to_mu = 0.f, to_logvar = 0.f;
      if (dz) {
        to_mu = static_cast<float>(dz_at.v[i]);
        to_logvar = 0.5f * to_mu * static_cast<float>(draws_at.v[i]) * expf(0.5f * v);
      }
      if (dkl) to_mu += g * static_cast<float>(mu_at.v[i]), to_logvar += 0.5f * g * expm1f(v);
      dmu_at.v[i] = static_cast<T>(to_mu), dlogvar_at.v[i] = static_cast<T>(to_logvar);
    }
    dmu_at.to(dmu + offset + at), dlogvar_at.to(dlogvar + offset + at);
  });
}

Posteriors posteriors_of(const char* op, const Tensor& mu) {
  int64_t count = 1;
  for (int64_t axis = 0; axis + 1 < mu.dim(); ++axis) count *= mu.size(axis);
  return {count, as_int(op, "d", mu.size(-1)), 32};
}

int64_t blocks_for(Posteriors& rows, int width) {
  rows.lanes = 1;
  while (rows.lanes < 32 && rows.lanes * width < rows.d) rows.lanes *= 2;
  return ceil_div(rows.count, kGaussianThreads / rows.lanes);
}

Tensor new_kl(const Tensor& mu) {
  std::vector<int64_t> sizes = sizes_of(mu);
  sizes.pop_back();
  return empty(mu, sizes, ScalarType::Float);
}

void launch_forward(
    const char* op, const Tensor& mu, const Tensor& logvar, const Tensor* draws, const Tensor* z, const Tensor& kl) {
  Posteriors rows = posteriors_of(op, mu);
  const void* const drawn = draws ? draws->data_ptr() : nullptr;
  by_width(op, mu, rows.count, rows.d, {mu.data_ptr(), logvar.data_ptr(), drawn}, [&](auto zero, auto width) {
    using T = decltype(zero);
    const int64_t blocks = blocks_for(rows, width);
    launch(
        mu, gaussian_kernel<width, T>, dim3(blocks), kGaussianThreads, 0, mu.const_data_ptr<T>(),
        logvar.const_data_ptr<T>(), static_cast<const T*>(drawn), z ? z->mutable_data_ptr<T>() : nullptr,
        kl.mutable_data_ptr<float>(), rows);
  });
}

std::tuple<Tensor, Tensor> launch_backward(
    const char* op, std::optional<Tensor> dz, std::optional<Tensor> dkl, Tensor mu, Tensor logvar,
    std::optional<Tensor> draws) {
  Posteriors rows = posteriors_of(op, mu);
  mu = as_contiguous(mu), logvar = as_contiguous(logvar);
  if (dz) dz = as_contiguous(*dz);
  if (dkl) dkl = as_contiguous(*dkl);
  if (draws) draws = as_contiguous(*draws);
  Tensor dmu = empty(mu, sizes_of(mu), mu.scalar_type()), dlogvar = empty(mu, sizes_of(mu), mu.scalar_type());
  const void *const dz_at = dz ? dz->data_ptr() : nullptr, *const drawn = draws ? draws->data_ptr() : nullptr;
  by_width(op, mu, rows.count, rows.d, {dz_at, mu.data_ptr(), logvar.data_ptr(), drawn}, [&](auto zero, auto width) {
    using T = decltype(zero);
    const int64_t blocks = blocks_for(rows, width);
    launch(
        mu, gaussian_backward_kernel<width, T>, dim3(blocks), kGaussianThreads, 0, static_cast<const T*>(dz_at),
        dkl ? dkl->const_data_ptr<float>() : nullptr, mu.const_data_ptr<T>(), logvar.const_data_ptr<T>(),
        static_cast<const T*>(drawn), dmu.mutable_data_ptr<T>(), dlogvar.mutable_data_ptr<T>(), rows);
  });
  return {dmu, dlogvar};
}

Tensor gaussian_kl(Tensor mu, Tensor logvar) {
  mu = as_contiguous(mu), logvar = as_contiguous(logvar);
  Tensor kl = new_kl(mu);
  launch_forward("gaussian_kl", mu, logvar, nullptr, nullptr, kl);
  return kl;
}

std::tuple<Tensor, Tensor> gaussian_kl_backward(Tensor grad, Tensor mu, Tensor logvar) {
  return launch_backward("gaussian_kl_backward", std::nullopt, grad, mu, logvar, std::nullopt);
}

std::tuple<Tensor, Tensor> reparameterize(Tensor mu, Tensor logvar, Tensor draws) {
  mu = as_contiguous(mu), logvar = as_contiguous(logvar), draws = as_contiguous(draws);
  Tensor z = empty(mu, sizes_of(mu), mu.scalar_type()), kl = new_kl(mu);
  launch_forward("reparameterize", mu, logvar, &draws, &z, kl);
  return {z, kl};
}

std::tuple<Tensor, Tensor> reparameterize_backward(
    std::optional<Tensor> dz, std::optional<Tensor> dkl, Tensor mu, Tensor logvar, Tensor draws) {
  return launch_backward("reparameterize_backward", dz, dkl, mu, logvar, draws);
}

STABLE_TORCH_LIBRARY_IMPL(ivfast, IVFAST_CUDA_KEY, m) {
  m.impl("gaussian_kl.cuda", TORCH_BOX(&gaussian_kl));
  m.impl("gaussian_kl_backward.cuda", TORCH_BOX(&gaussian_kl_backward));
  m.impl("reparameterize.cuda", TORCH_BOX(&reparameterize));
  m.impl("reparameterize_backward.cuda", TORCH_BOX(&reparameterize_backward));
}

}  // namespace ivfast
