// Gradient of the SVGD direction in one launch, or two for larger sets.
#include "svgd.h"

#include <tuple>

namespace ivfast {

// Up to this n² d, the gradient takes one launch with one block per set. Above, one block per tile spreads a set over
// the device, and ∂h takes a second launch. Not measured yet.
constexpr int64_t kOneBlock = 64 * 64 * 32;

// With e_ij = (x_i − x_j)·(g_i − g_j) and B_ij = (k_ij/n) [g_i·s_j + g_j·s_i + (2/h) e_ij], which contains only
// differences of x:
// ∂S = (1/n) K G,  ∂X = (2/h) [B X − (B 1)∘X + r∘G/n − ∂S],  ∂h = Σ_ij [½ B_ij d²_ij − k_ij e_ij/n]/h².
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
      fill_tile<D>(X, rows, d, [&](int row, int c) { return static_cast<float>(x[(first + row) * d + c]) - centre; });
      fill_tile<D>(G, rows, d, [&](int row, int c) { return static_cast<float>(grad[(first + row) * d + c]); });
      fill_tile<D>(S, rows, d, [&](int row, int c) {
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

std::tuple<Tensor, Tensor, Tensor> svgd_direction_backward(
    Tensor grad, Tensor x, std::optional<Tensor> score, Tensor bandwidth, Tensor row_sum) {
  const Sets sets = direction_sets(x);
  grad = as_contiguous(grad);
  x = as_contiguous(x);
  score = as_contiguous(score);
  bandwidth = as_contiguous(bandwidth);
  row_sum = as_contiguous(row_sum);
  Tensor dx = empty(x, sets.full, x.scalar_type());
  Tensor dscore = score ? empty(x, sets.full, x.scalar_type()) : empty(x, {0}, x.scalar_type());
  Tensor dbandwidth = empty(x, sets.batch, ScalarType::Float);
  const int blocks = static_cast<int64_t>(sets.n) * sets.n * sets.d <= kOneBlock ? 1 : tiles_of(sets.n);
  Tensor parts = blocks == 1 ? dbandwidth : empty(x, {sets.count, blocks}, ScalarType::Float);
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
  m.impl("svgd_direction_backward.cuda", TORCH_BOX(&svgd_direction_backward));
}

}  // namespace ivfast
