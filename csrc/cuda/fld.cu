// The latent distance ‖μ‖² + Tr(Σ + I) − 2 Tr √Σ of small codes and its gradient, in three launches: chunks of a Gram
// matrix, its inverse root (one block per set), and the gradient; in float64 throughout.
//
// For n > d the matrix is Σ, computed over chunks of samples, each about its own mean, and combined by Chan's formula.
// For n <= d it is CCᵀ, computed over chunks of dimensions, which only need their own means.
#include "inverse_root.h"

#include <algorithm>
#include <optional>
#include <tuple>

namespace ivfast {

constexpr int kPanel = 4096, kMostInPanel = 256;
constexpr int kScatterThreads = 256, kGradientThreads = 128;
constexpr int kPerThread = 8;  // of the summed axis, in the gradient
constexpr int kMostChunks = 32, kBlocks = 264;  // per set, merged by one block; enough to fill a GPU

// The codes z [n, d] of a set as min(n, d) rows i of the matrix, and an axis l over which its elements are sums
template <bool Wide>
struct Codes {
  int64_t n, d;
  int rows, side, width, chunks;  // width: number of l in a panel
  int64_t span;                   // number of l in a chunk

  Codes(int64_t n, int64_t d, int64_t sets) : n(n), d(d), rows(static_cast<int>(Wide ? n : d)), side((rows + 3) / 4) {
    width = std::min(kMostInPanel, 1024 / side / kPerThread * kPerThread);
    const int64_t most = std::clamp<int64_t>(kBlocks / std::max<int64_t>(sets, 1), 1, kMostChunks);
    span = std::max<int64_t>(2 * width, (length() + most - 1) / most);
    chunks = static_cast<int>((length() + span - 1) / span);
  }
  __host__ __device__ int64_t length() const { return Wide ? d : n; }
  __device__ __forceinline__ int64_t at(int64_t l, int i) const { return Wide ? i * d + l : l * d + i; }
  __host__ __device__ int stride() const { return 4 * side + 1; }  // odd: neither axis of a panel stays on one bank
};

// The result of a chunk: a half, and the means of its rows or, for wide codes, ‖μ‖² of its part
template <int Side>
constexpr int kReport = Halves<Side>::kElements + 4 * Side;

__device__ __forceinline__ double lanes_total(double x) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(~0u, x, lane);
  return x;
}

// panel[l · stride + i] = z − μ for l from `first`, 0 beyond `count` and the rows. `means` holds μ_i for tall codes (an
// input) and μ_l for wide codes (computed here). There are barriers before and after.
template <bool Wide, class T>
__device__ __forceinline__ void fill_panel(
    double* panel, double* means, const T* z, const Codes<Wide>& codes, int64_t first, int count) {
  const int columns = codes.stride() - 1, stride = codes.stride(), threads = blockDim.x;
  __syncthreads();
  for (int at = threadIdx.x; at < codes.width * columns; at += threads) {
    const int l = Wide ? at % codes.width : at / columns, i = Wide ? at / codes.width : at % columns;
    double x = 0;
    if (l < count && i < codes.rows) x = to_double(z[codes.at(first + l, i)]) - (Wide ? 0. : means[i]);
    panel[l * stride + i] = x;
  }
  __syncthreads();
  if constexpr (Wide) {
    for (int l = threadIdx.x / 32; l < codes.width; l += threads / 32) {
      const int lane = threadIdx.x % 32;
      double mean = 0;
      for (int i = lane; i < codes.rows; i += 32) mean += panel[l * stride + i];
      mean = lanes_total(mean) / codes.rows;
      for (int i = lane; i < codes.rows; i += 32) panel[l * stride + i] -= mean;
      if (lane == 0) means[l] = mean;
    }
    __syncthreads();
  }
}

template <class T, bool Wide, int Side>
__global__ void __launch_bounds__(Halves<Side>::kThreads > kScatterThreads ? Halves<Side>::kThreads : kScatterThreads)
    fld_scatter_kernel(const T* __restrict__ z, double* __restrict__ reports, Codes<Wide> codes, Halves<Side> shape) {
  // this block: a chunk of a set; each slice of its threads owns all tiles for a part of l
  __shared__ double means[kMostInPanel];
  double* const panel = reinterpret_cast<double*>(dynamic_shared);
  const int64_t set = blockIdx.x / codes.chunks, begin = blockIdx.x % codes.chunks * codes.span;
  const int64_t end = min(begin + codes.span, codes.length());
  const int threads = blockDim.x, slices = threads / shape.tiles;
  const Owner<Side> own(shape, threadIdx.x % shape.tiles);
  const int slice = threadIdx.x / shape.tiles;
  z += set * codes.n * codes.d, reports += int64_t{blockIdx.x} * kReport<Side>;

  if (!Wide) {
    const int groups = threads / codes.rows, group = threadIdx.x / codes.rows, i = threadIdx.x % codes.rows;
    double total = 0;
    if (group < groups) {
      for (int64_t l = begin + group; l < end; l += groups) total += to_double(z[codes.at(l, i)]);
      panel[group * codes.rows + i] = total;
    }
    __syncthreads();
    if (threadIdx.x < codes.rows) {
      for (int other = 1; other < groups; ++other) total += panel[other * codes.rows + i];
      means[i] = total / (end - begin);
      reports[shape.kElements + i] = means[i];
    }
  }

  Tile4 C = {};
  double square = 0;
  for (int64_t first = begin; first < end; first += codes.width) {
    const int count = static_cast<int>(min(int64_t{codes.width}, end - first));
    fill_panel(panel, means, z, codes, first, count);
    for (int l = slice; l < count && slice < slices; l += slices) {
      const double* const x = panel + l * codes.stride();
      double a[4], b[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) a[r] = x[own.row(r)], b[r] = x[own.column(r)];
      C.each([&](int r, int c, double& sum) { sum += a[r] * b[c]; });
    }
    if (Wide) {
      for (int l = threadIdx.x; l < count; l += threads) square += means[l] * means[l];
    }
  }

  __syncthreads();
  if (slice > 0 && slice < slices) C.each([&](int r, int c, double x) { panel[(4 * r + c) * threads + threadIdx.x] = x; });
  __syncthreads();
  if (slice == 0) {
    for (int other = 1; other < slices; ++other) {
      const int at = threadIdx.x + other * shape.tiles;
      C.each([&](int r, int c, double& x) { x += panel[(4 * r + c) * threads + at]; });
    }
    own.store(reports, C);
  }
  if (Wide) square = over_block(square, Sum{});
  if (Wide && threadIdx.x == 0) reports[shape.kElements] = square;
}

// S: dtype of the distance. If the gradient is requested, I − (CᵀC)^−½ or I − (CCᵀ)^−½ goes to `remainders`
// [4 side, 4 side], and the means of tall codes go to `means`.
template <class S, bool Wide, int Side>
__global__ void __launch_bounds__(Halves<Side>::kThreads, 1) fld_root_kernel(
    const double* __restrict__ reports, double* remainders, double* means, S* __restrict__ distance,
    float* __restrict__ error, double* kept, Codes<Wide> codes, Halves<Side> shape) {
  __shared__ double mu[kMostRows], terms[2];
  const Owner<Side> own(shape);
  double *const halves = reinterpret_cast<double*>(dynamic_shared), *const X = halves + own.kElements;
  const int64_t set = blockIdx.x;
  const int m = own.rows, thread = threadIdx.x;
  reports += set * codes.chunks * kReport<Side>, kept += set * own.kKept;
  const double n = static_cast<double>(codes.n);

  // μ = Σ_c n_c μ_c / n
  double square = 0;
  if (Wide) {
    if (thread == 0) {
      for (int chunk = 0; chunk < codes.chunks; ++chunk) square += reports[chunk * kReport<Side> + own.kElements];
    }
  } else if (thread < m) {
    double mean = 0;
    for (int chunk = 0; chunk < codes.chunks; ++chunk) {
      const int64_t count = min(codes.span, codes.length() - chunk * codes.span);
      mean += count / n * reports[chunk * kReport<Side> + own.kElements + thread];
    }
    mu[thread] = mean, square = mean * mean;
    if (means) means[set * m + thread] = mean;
  }
  square = over_block(square, Sum{});

  // Σ_c S_c + n_c (μ_c − μ)(μ_c − μ)ᵀ
  Tile4 a = {};
  for (int chunk = 0; chunk < codes.chunks; ++chunk) {
    const double *const report = reports + chunk * kReport<Side>, *const mu_c = report + own.kElements;
    const int64_t count = min(codes.span, codes.length() - chunk * codes.span);
    double u[4] = {}, v[4] = {};
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int i = own.row(r), j = own.column(r);
      if (!Wide && i < m) u[r] = count * (mu_c[i] - mu[i]);
      if (!Wide && j < m) v[r] = mu_c[j] - mu[j];
    }
    a.each([&](int r, int c, double& x) { x += own.at(report, r, c) + u[r] * v[c]; });
  }
  a.each([&](int, int, double& x) { x /= n - 1; });
  own.store(halves, a);
  const auto diagonal = [&](int r, int c, double x) { return own.one(r, c) * x; };
  const double size = over_block(own.sum(halves, diagonal), Sum{});
  // 11ᵀ replaces the zero eigenvalue that centring leaves
  const double filled = Wide ? size / (n - 1) : 0.;
  if (Wide) own.replace(halves, [&](double x) { return x + filled / n; });
  if (thread == 0) terms[0] = square + size + codes.d, terms[1] = sqrt(filled);

  const Root root = root_of(own, halves, kept);

  if (remainders) {
    const int columns = 4 * own.side;
    remainders += set * columns * columns;
    own.each(X, [&](int i, int j, double x) {
      remainders[i * columns + j] = remainders[j * columns + i] = (i == j ? 1. : 0.) - x;
    });
  }
  if (thread == 0) {
    distance[set] = static_cast<S>(terms[0] - 2 * (root.trace - terms[1]));
    error[set] = static_cast<float>(root.error);
  }
}

// 2μ/n + 2/(n − 1) (x − μ)(I − a^−½), or with I − a^−½ on the left for wide codes
template <class T, bool Wide>
__global__ void __launch_bounds__(kGradientThreads) fld_gradient_kernel(
    const T* __restrict__ z, const double* __restrict__ remainders, const double* __restrict__ tall_means,
    T* __restrict__ gradient, Codes<Wide> codes, int blocks) {
  __shared__ double means[kMostInPanel];
  double* const panel = reinterpret_cast<double*>(dynamic_shared);
  const int64_t set = blockIdx.x / blocks;
  const int columns = 4 * codes.side, groups = codes.width / kPerThread, thread = threadIdx.x;
  // neighbouring threads write neighbouring numbers: this thread has i = side c + I, l = groups p + group
  const int I = Wide ? thread / groups : thread % codes.side, group = Wide ? thread % groups : thread / codes.side;
  const bool works = I < codes.side && group < groups;
  z += set * codes.n * codes.d, gradient += set * codes.n * codes.d, remainders += set * columns * columns;
  if (!Wide) {
    for (int i = thread; i < codes.rows; i += kGradientThreads) means[i] = tall_means[set * codes.rows + i];
  }
  const double per_n = 2. / codes.n, per_rest = 2. / (codes.n - 1);

  for (int64_t first = blockIdx.x % blocks * codes.width; first < codes.length(); first += int64_t{blocks} * codes.width) {
    const int count = static_cast<int>(min(int64_t{codes.width}, codes.length() - first));
    fill_panel(panel, means, z, codes, first, count);
    if (!works) continue;
    double sums[kPerThread][4] = {};
    for (int k = 0; k < codes.rows; ++k) {
      double b[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) b[c] = codes.side * c + I < codes.rows ? remainders[k * columns + codes.side * c + I] : 0.;
#pragma unroll
      for (int p = 0; p < kPerThread; ++p) {
        const double x = panel[(groups * p + group) * codes.stride() + k];
#pragma unroll
        for (int c = 0; c < 4; ++c) sums[p][c] += x * b[c];
      }
    }
#pragma unroll
    for (int p = 0; p < kPerThread; ++p) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int l = groups * p + group, i = codes.side * c + I;
        if (l >= count || i >= codes.rows) continue;
        gradient[codes.at(first + l, i)] = from_double<T>(per_n * means[Wide ? l : i] + per_rest * sums[p][c]);
      }
    }
  }
}

template <bool Wide>
void launch_fld(
    const Tensor& z, const Codes<Wide>& codes, int64_t sets, const Tensor& distance, const Tensor* gradient,
    const Tensor& error) {
  by_rows("fld_gram", codes.rows, [&](auto shape) {
    constexpr int side = decltype(shape)::kSide;
    const auto doubles = [&](int64_t count) { return empty(z, {count}, ScalarType::Double); };
    Tensor reports = doubles(sets * codes.chunks * kReport<side>), kept = doubles(sets * shape.kKept);
    std::optional<Tensor> remainders, means;
    if (gradient) remainders = doubles(sets * 16 * codes.side * codes.side), means = doubles(sets * codes.rows);
    const size_t shared = sizeof(double) * std::max(codes.width * codes.stride(), kPanel);
    by_any_dtype("fld_gram", z, [&](auto zero) {
      using T = decltype(zero);
      using S = std::conditional_t<std::is_same_v<T, double>, double, float>;
      const T* const codes_at = z.const_data_ptr<T>();
      const int threads = std::max(shape.threads(), kScatterThreads);
      launch(
          z, fld_scatter_kernel<T, Wide, side>, dim3(sets * codes.chunks), threads, shared, codes_at,
          reports.mutable_data_ptr<double>(), codes, shape);
      launch(
          z, fld_root_kernel<S, Wide, side>, dim3(sets), shape.threads(), shape.kShared,
          reports.const_data_ptr<double>(), gradient ? remainders->mutable_data_ptr<double>() : nullptr,
          gradient ? means->mutable_data_ptr<double>() : nullptr, distance.mutable_data_ptr<S>(),
          error.mutable_data_ptr<float>(), kept.mutable_data_ptr<double>(), codes, shape);
      if (!gradient) return;
      const int64_t panels = (codes.length() + codes.width - 1) / codes.width;
      const int blocks = static_cast<int>(std::min<int64_t>(panels, 16 * kBlocks));
      launch(
          z, fld_gradient_kernel<T, Wide>, dim3(sets * blocks), kGradientThreads, shared, codes_at,
          remainders->const_data_ptr<double>(), means->const_data_ptr<double>(), gradient->mutable_data_ptr<T>(), codes,
          blocks);
    });
  });
}

std::tuple<Tensor, Tensor, Tensor> fld_gram(Tensor z, bool wants_gradient) {
  STD_TORCH_CHECK(z.dim() >= 2, "fld_gram takes z [..., n, d], got ", z.dim(), " dimensions");
  std::vector<int64_t> batch(z.sizes().begin(), z.sizes().end());
  const int64_t d = batch.back(), n = batch[batch.size() - 2];
  batch.resize(batch.size() - 2);
  int64_t sets = 1;
  for (const int64_t size : batch) sets *= size;
  z = as_contiguous(z);
  std::vector<int64_t> sizes{0};
  if (wants_gradient) sizes.assign(z.sizes().begin(), z.sizes().end());
  Tensor distance = empty(z, batch, arithmetic(z.scalar_type())), error = empty(z, batch, ScalarType::Float);
  Tensor gradient = empty(z, sizes, z.scalar_type());
  const Tensor* const wanted = wants_gradient ? &gradient : nullptr;
  by_rows("fld_gram", std::min(n, d), [&](auto) {
    if (sets == 0) return;
    if (n > d) launch_fld(z, Codes<false>(n, d, sets), sets, distance, wanted, error);
    else launch_fld(z, Codes<true>(n, d, sets), sets, distance, wanted, error);
  });
  return {distance, gradient, error};
}

STABLE_TORCH_LIBRARY_IMPL(ivfast, IVFAST_CUDA_KEY, m) { m.impl("fld_gram.cuda", TORCH_BOX(&fld_gram)); }

}  // namespace ivfast
