// Inverse square roots of small symmetric matrices: one launch, one block per matrix, float64 throughout.
#include "inverse_root.h"

#include <tuple>

namespace ivfast {

template <class T, int Side>
__global__ void __launch_bounds__(Halves<Side>::kThreads, 1) inverse_root_kernel(
    const T* __restrict__ a, T* __restrict__ inverse, T* __restrict__ trace, float* __restrict__ error, double* kept,
    Halves<Side> shape) {
  const Owner<Side> own(shape);
  double* const halves = reinterpret_cast<double*>(dynamic_shared);
  const int64_t set = blockIdx.x, m = own.rows;
  a += set * m * m, inverse += set * m * m, kept += set * own.kKept;

  double* const X = halves + own.kElements;
  own.fill(halves, [&](int i, int j) { return 0.5 * to_double(a[i * m + j]) + 0.5 * to_double(a[j * m + i]); });

  const Root root = root_of(own, halves, kept);

  own.each(X, [&](int i, int j, double x) { inverse[i * m + j] = inverse[j * m + i] = from_double<T>(x); });
  if (threadIdx.x == 0) trace[set] = from_double<T>(root.trace), error[set] = static_cast<float>(root.error);
}

std::tuple<Tensor, Tensor, Tensor> inverse_root(Tensor a) {
  std::vector<int64_t> batch(a.sizes().begin(), a.sizes().end());
  const int64_t m = batch.empty() ? 0 : batch.back();
  STD_TORCH_CHECK(
      batch.size() >= 2 && batch[batch.size() - 2] == m, "inverse_root takes a [..., d, d], got last dimensions ",
      batch.size() < 2 ? 0 : batch[batch.size() - 2], " and ", m);
  batch.resize(batch.size() - 2);
  int64_t sets = 1;
  for (const int64_t size : batch) sets *= size;
  a = as_contiguous(a);
  Tensor inverse = empty(a, {a.sizes().begin(), a.sizes().end()}, a.scalar_type());
  Tensor trace = empty(a, batch, a.scalar_type()), error = empty(a, batch, ScalarType::Float);
  by_rows("inverse_root", m, [&](auto halves) {
    by_any_dtype("inverse_root", a, [&](auto zero) {
      using T = decltype(zero);
      if (sets == 0) return;
      Tensor kept = empty(a, {sets * halves.kKept}, ScalarType::Double);
      launch(
          a, inverse_root_kernel<T, decltype(halves)::kSide>, dim3(sets), halves.threads(), halves.kShared,
          a.const_data_ptr<T>(), inverse.mutable_data_ptr<T>(), trace.mutable_data_ptr<T>(),
          error.mutable_data_ptr<float>(), kept.mutable_data_ptr<double>(), halves);
    });
  });
  return {inverse, trace, error};
}

STABLE_TORCH_LIBRARY_IMPL(ivfast, IVFAST_CUDA_KEY, m) { m.impl("inverse_root.cuda", TORCH_BOX(&inverse_root)); }

}  // namespace ivfast
