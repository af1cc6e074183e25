// SVGD direction and its gradient for small particle sets: n particles in d <= 128 dimensions, one launch each way.
//
// A block holds a tile of 32 rows i and walks over tiles of 32 rows j; K exists 32 by 32 at a time, in shared memory.
// Distances are sums of squared differences: nothing cancels, and the diagonal is exactly 0.
#include "launch.h"

#include <optional>
#include <tuple>
#include <type_traits>

namespace ivfast {

using torch::stable::Tensor;

constexpr int kTile = 32;
constexpr int kThreads = 256;
constexpr int kPairs = kTile + 4;  // row stride of a tile of pairs: float4-aligned, off the banks' period
constexpr int kMaxD = 128;

// A tile of samples: 32 rows of D >= d floats at this stride, zero outside the n x d that exist.
template <int D>
constexpr int kStride = D + 4;

__device__ __forceinline__ float4 vec4(const float* p) { return *reinterpret_cast<const float4*>(p); }

__device__ __forceinline__ float part(const float4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

template <int Count>
__device__ __forceinline__ void copy(float (&to)[Count], const float* from) {
  if constexpr (Count == 4) {
    const float4 v = vec4(from);
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  } else {
    for (int at = 0; at < Count; ++at) to[at] = from[at];
  }
}

// tile[row][column] = value(row, column)
template <int D, class F>
__device__ __forceinline__ void fill(float* tile, int rows, int d, F value) {
  const int column = threadIdx.x % D;
#pragma unroll
  for (int step = 0; step < kTile * D / kThreads; ++step) {
    const int row = threadIdx.x / D + step * (kThreads / D);
    tile[row * kStride<D> + column] = row < rows && column < d ? value(row, column) : 0.f;
  }
}

// The mean of column threadIdx.x % D over the block's own rows. φ and its gradient do not move with x, their rounding
// does: any point among the particles does as a centre. Nobody may be using `scratch`.
template <int D, class T>
__device__ __forceinline__ float centre_of(const T* x, int rows, int d, float* scratch) {
  const int column = threadIdx.x % D;
  float sum = 0.f;
#pragma unroll
  for (int step = 0; step < kTile * D / kThreads; ++step) {
    const int row = threadIdx.x / D + step * (kThreads / D);
    if (row < rows && column < d) sum += static_cast<float>(x[row * d + column]);
  }
  scratch[threadIdx.x] = sum;
  __syncthreads();
  float total = 0.f;
  for (int group = 0; group < kThreads / D; ++group) total += scratch[group * D + column];
  return total / rows;
}

// Sum over the 16 threads that share a row of pairs; they are half a warp.
__device__ __forceinline__ float row_total(float v) {
#pragma unroll
  for (int lane = 8; lane > 0; lane /= 2) v += __shfl_xor_sync(0xffffffffu, v, lane);
  return v;
}

template <int D, class T>
__global__ void __launch_bounds__(kThreads) svgd_forward_kernel(
    const T* __restrict__ x, const T* __restrict__ score, const float* __restrict__ bandwidth, T* __restrict__ phi,
    float* __restrict__ row_sum, int n, int d) {
  // this block: rows first_i .. first_i + 31 of one set
  const int64_t set = blockIdx.x;
  const int first_i = blockIdx.y * kTile, rows_i = min(kTile, n - first_i);
  const float two_over_h = 2.f / bandwidth[set], to_exponent = -0.5f * 1.44269504f * two_over_h;
  x += set * n * d;
  score += score ? set * n * d : 0;

  float* X_i = reinterpret_cast<float*>(dynamic_shared);
  float* X_j = X_i + kTile * kStride<D>;
  float* V_j = X_j + kTile * kStride<D>;
  float* K_ji = V_j + kTile * kStride<D>;
  float* r_i = K_ji + kTile * kPairs;

  const float centre = centre_of<D>(x + first_i * d, rows_i, d, X_j);
  fill<D>(X_i, rows_i, d, [&](int row, int c) { return static_cast<float>(x[(first_i + row) * d + c]) - centre; });

  // pairs: rows i, i + 16 by columns j, j + 16; outputs: kRows rows by 4 dimensions
  constexpr int kRows = D / 32;
  const int i = threadIdx.x / 16, j = threadIdx.x % 16;
  const int out_row = threadIdx.x / (D / 4) * kRows, out_column = threadIdx.x % (D / 4) * 4;
  float r[2] = {}, KV[kRows][4] = {};

  for (int first_j = 0; first_j < n; first_j += kTile) {
    const int rows_j = min(kTile, n - first_j);
    __syncthreads();  // the tiles of the last round are read
    fill<D>(X_j, rows_j, d, [&](int row, int c) { return static_cast<float>(x[(first_j + row) * d + c]) - centre; });
    // V = S − (2/h) X, S = −x without a score
    fill<D>(V_j, rows_j, d, [&](int row, int c) {
      const int at = (first_j + row) * d + c;
      const float x_j = static_cast<float>(x[at]);
      return (score ? static_cast<float>(score[at]) : -x_j) - two_over_h * (x_j - centre);
    });
    __syncthreads();

    float d2[2][2] = {};
#pragma unroll 4
    for (int k = 0; k < D; k += 4) {
      const float4 a[2] = {vec4(X_i + i * kStride<D> + k), vec4(X_i + (i + 16) * kStride<D> + k)};
      const float4 b[2] = {vec4(X_j + j * kStride<D> + k), vec4(X_j + (j + 16) * kStride<D> + k)};
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const float difference = part(a[pair / 2], c) - part(b[pair % 2], c);
          d2[pair / 2][pair % 2] += difference * difference;
        }
      }
    }
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      const int j_here = j + pair % 2 * 16;
      const float k = j_here < rows_j ? exp2f(to_exponent * d2[pair / 2][pair % 2]) : 0.f;
      r[pair / 2] += k;
      K_ji[j_here * kPairs + i + pair / 2 * 16] = k;
    }
    __syncthreads();

#pragma unroll 8
    for (int j_all = 0; j_all < kTile; ++j_all) {
      const float4 v = vec4(V_j + j_all * kStride<D> + out_column);
      float k[kRows];
      copy(k, K_ji + j_all * kPairs + out_row);
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
#pragma unroll
        for (int c = 0; c < 4; ++c) KV[row][c] += k[row] * part(v, c);
      }
    }
  }

  // φ = (1/n) [K V + (2/h) r∘X]
  for (int half = 0; half < 2; ++half) {
    const float total = row_total(r[half]);
    if (j == 0) r_i[i + 16 * half] = total;
  }
  __syncthreads();
  const int thread = threadIdx.x;
  if (thread < rows_i) row_sum[set * n + first_i + thread] = r_i[thread];
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int at = out_row + row, column = out_column + c;
      if (at < rows_i && column < d) {
        phi[(set * n + first_i + at) * d + column] =
            static_cast<T>((KV[row][c] + two_over_h * r_i[at] * X_i[at * kStride<D> + column]) / n);
      }
    }
  }
}

// With e_ij = (x_i − x_j)·(g_i − g_j) and B_ij = (k_ij/n) [g_i·s_j + g_j·s_i + (2/h) e_ij], where only differences of x
// occur: ∂S = (1/n) K G,  ∂X = (2/h) [B X − (B 1)∘X + r∘G/n − ∂S],  ∂h = Σ_ij [½ B_ij d²_ij − k_ij e_ij/n]/h².
template <int D, class T>
__global__ void __launch_bounds__(kThreads) svgd_backward_kernel(
    const T* __restrict__ grad, const T* __restrict__ x, const T* __restrict__ score,
    const float* __restrict__ bandwidth, const float* __restrict__ row_sum, T* __restrict__ dx, T* __restrict__ dscore,
    float* __restrict__ dbandwidth, int n, int d) {
  // this block: tiles blockIdx.y, blockIdx.y + gridDim.y, … of one set
  const int64_t set = blockIdx.x;
  const float two_over_h = 2.f / bandwidth[set], to_exponent = -0.5f * 1.44269504f * two_over_h;
  const float per_n = 1.f / n;
  x += set * n * d;
  grad += set * n * d;
  score += score ? set * n * d : 0;

  float* X_i = reinterpret_cast<float*>(dynamic_shared);
  float* G_i = X_i + kTile * kStride<D>;
  float* S_i = G_i + kTile * kStride<D>;
  float* X_j = S_i + kTile * kStride<D>;
  float* G_j = X_j + kTile * kStride<D>;
  float* S_j = G_j + kTile * kStride<D>;
  float* K_ji = S_j + kTile * kStride<D>;
  float* B_ji = K_ji + kTile * kPairs;
  float* b_i = B_ji + kTile * kPairs;

  constexpr int kRows = D / 32;
  const int i = threadIdx.x / 16, j = threadIdx.x % 16;
  const int out_row = threadIdx.x / (D / 4) * kRows, out_column = threadIdx.x % (D / 4) * 4;
  float dh = 0.f;

  for (int first_i = blockIdx.y * kTile; first_i < n; first_i += gridDim.y * kTile) {
    const int rows_i = min(kTile, n - first_i);
    const float centre = centre_of<D>(x + first_i * d, rows_i, d, X_j);
    const auto load = [&](int first, int rows, float* X, float* G, float* S) {
      fill<D>(X, rows, d, [&](int row, int c) { return static_cast<float>(x[(first + row) * d + c]) - centre; });
      fill<D>(G, rows, d, [&](int row, int c) { return static_cast<float>(grad[(first + row) * d + c]); });
      fill<D>(S, rows, d, [&](int row, int c) {
        const int at = (first + row) * d + c;
        return score ? static_cast<float>(score[at]) : -static_cast<float>(x[at]);
      });
    };
    load(first_i, rows_i, X_i, G_i, S_i);
    float b[2] = {}, KG[kRows][4] = {}, BX[kRows][4] = {};

    for (int first_j = 0; first_j < n; first_j += kTile) {
      const int rows_j = min(kTile, n - first_j);
      __syncthreads();  // the tiles of the last round are read
      load(first_j, rows_j, X_j, G_j, S_j);
      __syncthreads();

      float d2[2][2] = {}, e[2][2] = {}, gs[2][2] = {};
#pragma unroll 1
      for (int k = 0; k < D; k += 4) {
        const int at_i = i * kStride<D> + k, at_j = j * kStride<D> + k, below = 16 * kStride<D>;
        const float4 x_i[2] = {vec4(X_i + at_i), vec4(X_i + at_i + below)};
        const float4 g_i[2] = {vec4(G_i + at_i), vec4(G_i + at_i + below)};
        const float4 s_i[2] = {vec4(S_i + at_i), vec4(S_i + at_i + below)};
        const float4 x_j[2] = {vec4(X_j + at_j), vec4(X_j + at_j + below)};
        const float4 g_j[2] = {vec4(G_j + at_j), vec4(G_j + at_j + below)};
        const float4 s_j[2] = {vec4(S_j + at_j), vec4(S_j + at_j + below)};
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
          const int p = pair / 2, q = pair % 2;
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            const float difference = part(x_i[p], c) - part(x_j[q], c);
            d2[p][q] += difference * difference;
            e[p][q] += difference * (part(g_i[p], c) - part(g_j[q], c));
            gs[p][q] += part(g_i[p], c) * part(s_j[q], c);
            gs[p][q] += part(g_j[q], c) * part(s_i[p], c);
          }
        }
      }
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        const int p = pair / 2, q = pair % 2, i_here = i + 16 * p, j_here = j + 16 * q;
        const float k = i_here < rows_i && j_here < rows_j ? exp2f(to_exponent * d2[p][q]) * per_n : 0.f;
        const float B = k * (gs[p][q] + two_over_h * e[p][q]);
        b[p] += B;
        dh += 0.5f * B * d2[p][q] - k * e[p][q];
        K_ji[j_here * kPairs + i_here] = k;
        B_ji[j_here * kPairs + i_here] = B;
      }
      __syncthreads();

#pragma unroll 4
      for (int j_all = 0; j_all < kTile; ++j_all) {
        const float4 g = vec4(G_j + j_all * kStride<D> + out_column);
        const float4 xj = vec4(X_j + j_all * kStride<D> + out_column);
        float k[kRows], B[kRows];
        copy(k, K_ji + j_all * kPairs + out_row);
        copy(B, B_ji + j_all * kPairs + out_row);
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            KG[row][c] += k[row] * part(g, c);
            BX[row][c] += B[row] * part(xj, c);
          }
        }
      }
    }

    for (int half = 0; half < 2; ++half) {
      const float total = row_total(b[half]);
      if (j == 0) b_i[i + 16 * half] = total;
    }
    __syncthreads();
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const int at = out_row + row;
      if (at >= rows_i) continue;
      const float r = row_sum[set * n + first_i + at] * per_n;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int column = out_column + c, in_tile = at * kStride<D> + column;
        if (column >= d) continue;
        const float dX = two_over_h * (BX[row][c] - b_i[at] * X_i[in_tile] + r * G_i[in_tile] - KG[row][c]);
        const int64_t out = (set * n + first_i + at) * d + column;
        dx[out] = static_cast<T>(score ? dX : dX - KG[row][c]);
        if (score) dscore[out] = static_cast<T>(KG[row][c]);
      }
    }
  }

  // the block's share of ∂h
  __syncthreads();
  dh = row_total(dh);
  if (j == 0) b_i[i] = dh;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0.f;
    for (int row = 0; row < kThreads / 16; ++row) total += b_i[row];
    dbandwidth[set * gridDim.y + blockIdx.y] = total * 0.25f * two_over_h * two_over_h;
  }
}

// total[set] = Σ_part parts[set][part]
__global__ void sum_parts_kernel(const float* __restrict__ parts, float* __restrict__ total, int64_t sets, int count) {
  const int64_t set = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (set >= sets) return;
  float sum = 0.f;
  for (int part = 0; part < count; ++part) sum += parts[set * count + part];
  total[set] = sum;
}

struct Sets {
  int64_t count;
  int n, d, tiles;
};

Sets sets_of(const Tensor& x) {
  const int64_t n = x.size(x.dim() - 2), d = x.size(x.dim() - 1);
  STD_TORCH_CHECK(n >= 1 && d >= 1, "svgd_direction takes x [..., n, d] of n, d >= 1, got n = ", n, ", d = ", d);
  STD_TORCH_CHECK(
      d <= kMaxD, "svgd_direction in CUDA C++ takes x [..., n, d] of d <= ", kMaxD, ", got n = ", n, ", d = ", d);
  STD_TORCH_CHECK(
      n <= 65535 * kTile, "svgd_direction in CUDA C++ takes x [..., n, d] of n <= ", 65535 * kTile, ", got n = ", n);
  return {x.numel() / (n * d), static_cast<int>(n), static_cast<int>(d), static_cast<int>((n + kTile - 1) / kTile)};
}

constexpr size_t shared_bytes(int tiles, int pair_tiles, int D) {
  return sizeof(float) * (tiles * kTile * (D + 4) + pair_tiles * kTile * kPairs + kTile);
}

// f(D) for the narrowest tile that holds d, D a compile-time constant
template <class F>
void by_width(int d, F f) {
  if (d <= 32) return f(std::integral_constant<int, 32>{});
  if (d <= 64) return f(std::integral_constant<int, 64>{});
  return f(std::integral_constant<int, 128>{});
}

std::optional<Tensor> contiguous(const std::optional<Tensor>& x) {
  return x ? std::optional(torch::stable::contiguous(*x)) : std::nullopt;
}

std::tuple<Tensor, Tensor> svgd_direction(Tensor x, std::optional<Tensor> score, Tensor bandwidth) {
  const Sets sets = sets_of(x);
  x = torch::stable::contiguous(x);
  score = contiguous(score);
  bandwidth = torch::stable::contiguous(bandwidth);
  Tensor phi = torch::stable::empty_like(x);
  Tensor row_sum = torch::stable::new_empty(bandwidth, x.sizes().slice(0, x.dim() - 1));
  by_dtype("svgd_direction", x, [&](auto zero) {
    using T = decltype(zero);
    if (sets.count == 0) return;
    by_width(sets.d, [&](auto D) {
      launch(
          x, svgd_forward_kernel<D, T>, dim3(sets.count, sets.tiles), kThreads, shared_bytes(3, 1, D),
          x.const_data_ptr<T>(), score ? score->const_data_ptr<T>() : nullptr, bandwidth.const_data_ptr<float>(),
          phi.mutable_data_ptr<T>(), row_sum.mutable_data_ptr<float>(), sets.n, sets.d);
    });
  });
  return {phi, row_sum};
}

std::tuple<Tensor, Tensor, Tensor> svgd_direction_backward(
    Tensor grad, Tensor x, std::optional<Tensor> score, Tensor bandwidth, Tensor row_sum) {
  const Sets sets = sets_of(x);
  grad = torch::stable::contiguous(grad);
  x = torch::stable::contiguous(x);
  score = contiguous(score);
  bandwidth = torch::stable::contiguous(bandwidth);
  row_sum = torch::stable::contiguous(row_sum);
  Tensor dx = torch::stable::empty_like(x);
  Tensor dscore = score ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor dbandwidth = torch::stable::empty_like(bandwidth);
  // One block per set is one launch; a block per tile spreads a larger set over the device and adds a launch for ∂h.
  const bool one_block = static_cast<int64_t>(sets.n) * sets.n * sets.d <= 64 * 64 * 32;
  const int blocks = one_block ? 1 : sets.tiles;
  Tensor parts = blocks == 1 ? dbandwidth : torch::stable::new_empty(bandwidth, {sets.count, blocks});
  by_dtype("svgd_direction_backward", x, [&](auto zero) {
    using T = decltype(zero);
    if (sets.count == 0) return;
    by_width(sets.d, [&](auto D) {
      launch(
          x, svgd_backward_kernel<D, T>, dim3(sets.count, blocks), kThreads, shared_bytes(6, 2, D),
          grad.const_data_ptr<T>(), x.const_data_ptr<T>(), score ? score->const_data_ptr<T>() : nullptr,
          bandwidth.const_data_ptr<float>(), row_sum.const_data_ptr<float>(), dx.mutable_data_ptr<T>(),
          dscore.mutable_data_ptr<T>(), parts.mutable_data_ptr<float>(), sets.n, sets.d);
    });
    if (blocks > 1) {
      launch(
          x, sum_parts_kernel, dim3((sets.count + kThreads - 1) / kThreads), kThreads, 0, parts.const_data_ptr<float>(),
          dbandwidth.mutable_data_ptr<float>(), sets.count, blocks);
    }
  });
  return {dx, dscore, dbandwidth};
}

STABLE_TORCH_LIBRARY_IMPL(ivfast, IVFAST_CUDA_KEY, m) {
  m.impl("svgd_direction.cuda", TORCH_BOX(&svgd_direction));
  m.impl("svgd_direction_backward.cuda", TORCH_BOX(&svgd_direction_backward));
}

}  // namespace ivfast
