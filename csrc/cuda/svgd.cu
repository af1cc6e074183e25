// SVGD direction in one launch. A block holds a tile of 32 rows i and loops over the tiles of rows j.
//
// With K' = K − I, r' = K'1 and V = S − (2/h) X: φ = (1/n) [S + K'V + (2/h) r'∘X], in which a particle's own term is
// exact. A block with far rows computes φ_i = (1/n) [s_i + Σ_j k'_ij (s_j + (2/h)(x_i − x_j))].
#include "svgd.h"

#include <tuple>

namespace ivfast {

template <int D, class T>
__global__ void __launch_bounds__(kThreads, 4) svgd_forward_kernel(
    const T* __restrict__ x, const T* __restrict__ score, const float* __restrict__ bandwidth, T* __restrict__ phi,
    float* __restrict__ row_sum, int n, int d) {
  // this block: rows first_i .. first_i + 31 of one set
  const int64_t set = blockIdx.x;
  const int first_i = blockIdx.y * kTile, rows_i = min(kTile, n - first_i);
  const Bandwidth b(bandwidth[set]);
  x += set * n * d;
  score += score ? set * n * d : 0;

  float* X_i = reinterpret_cast<float*>(dynamic_shared);
  float* X_j = X_i + kTile * kStride<D>;
  float* V_j = X_j + kTile * kStride<D>;
  float* K_ji = V_j + kTile * kStride<D>;
  float* r_i = K_ji + kTile * kPairs;  // r_i[0] is 1/n until then, which saves a register

  const auto [centre, far] = fill_own<D>(X_i, x + first_i * d, rows_i, d, b, X_j);
  const auto s = [&](int at) { return score ? static_cast<float>(score[at]) : -static_cast<float>(x[at]); };

  // pairs: rows i, i + 16 by columns j, j + 16; outputs: kRows rows by 4 dimensions
  constexpr int kRows = D / 32;
  if (threadIdx.x == 0) r_i[0] = b.one() / n;
  const int i = threadIdx.x / 16, j = threadIdx.x % 16;
  const int out_row = threadIdx.x / (D / 4) * kRows, out_column = threadIdx.x % (D / 4) * 4;
  float r[2] = {}, KV[kRows][4] = {};

  for (int first_j = 0; first_j < n; first_j += kTile) {
    const int rows_j = min(kTile, n - first_j);
    __syncthreads();  // the tiles of the last round are read
    fill_tile<D>(X_j, rows_j, d, [&](int row, int c) {
      return static_cast<float>(x[(first_j + row) * d + c]) - centre;
    });
    fill_tile<D>(V_j, rows_j, d, [&](int row, int c) {
      const int at = (first_j + row) * d + c;
      if (far) return s(at);
      const float X = static_cast<float>(x[at]) - centre, pull = b.two_over_h * X;
      return fabsf(pull) <= kHuge ? s(at) - pull : 0.f * X;  // k' of a row with such a pull is 0
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
      const int i_here = i + pair / 2 * 16, j_here = j + pair % 2 * 16;
      const bool other = j_here < rows_j && first_i + i_here != first_j + j_here;
      const float k = other ? exp2f(b.to_exponent() * d2[pair / 2][pair % 2]) : 0.f;
      r[pair / 2] += k;
      K_ji[j_here * kPairs + i_here] = r_i[0] * k;  // 1/n here, because sums may overflow where φ does not
    }
    __syncthreads();

    if (far) {
      each_difference<D, kRows>(X_i, X_j, out_row, out_column, [&](int row, int j_all, const float4& from_j) {
        const float4 s_j = vec4(V_j + j_all * kStride<D> + out_column);
        const float k = K_ji[j_all * kPairs + out_row + row], pull = b.two_over_h * k;
#pragma unroll
        for (int c = 0; c < 4; ++c) KV[row][c] += unless_zero(k, k * part(s_j, c) + pull * part(from_j, c));
      });
      continue;
    }
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

  const float per_n = b.one() / n;
  for (int half = 0; half < 2; ++half) {
    const float total = row_total(r[half]);
    if (j == 0) r_i[i + 16 * half] = total;
  }
  __syncthreads();
  const int thread = threadIdx.x;
  if (thread < rows_i) row_sum[set * n + first_i + thread] = b.one() + r_i[thread];
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int at = out_row + row, column = out_column + c, in_set = (first_i + at) * d + column;
      if (at < rows_i && column < d) {
        const float rX = far ? 0.f : b.two_over_h * (per_n * r_i[at] * X_i[at * kStride<D> + column]);
        phi[set * n * d + in_set] = static_cast<T>(per_n * s(in_set) + (KV[row][c] + rX));
      }
    }
  }
}

std::tuple<Tensor, Tensor> svgd_direction(Tensor x, std::optional<Tensor> score, Tensor bandwidth) {
  const Sets sets = direction_sets(x);
  x = as_contiguous(x);
  score = as_contiguous(score);
  bandwidth = as_contiguous(bandwidth);
  Tensor phi = empty(x, sets.full, x.scalar_type()), row_sum = empty(x, sets.rows, ScalarType::Float);
  by_dtype("svgd_direction", x, [&](auto zero) {
    using T = decltype(zero);
    if (sets.count == 0) return;
    by_width(sets.d, [&](auto D) {
      launch(
          x, svgd_forward_kernel<D, T>, dim3(sets.count, tiles_of(sets.n)), kThreads, shared_bytes(3, 1, 1, D),
          x.const_data_ptr<T>(), score ? score->const_data_ptr<T>() : nullptr, bandwidth.const_data_ptr<float>(),
          phi.mutable_data_ptr<T>(), row_sum.mutable_data_ptr<float>(), sets.n, sets.d);
    });
  });
  return {phi, row_sum};
}

STABLE_TORCH_LIBRARY_IMPL(ivfast, IVFAST_CUDA_KEY, m) { m.impl("svgd_direction.cuda", TORCH_BOX(&svgd_direction)); }

}  // namespace ivfast
