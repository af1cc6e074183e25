// Gradient of the SVGD direction in one launch, or two for larger sets.
#include "svgd.h"

#include <tuple>

namespace ivfast {

// Up to this n² d, the gradient takes one launch with one block per set. Above, one block per tile spreads a set over
// the device, and ∂h takes a second launch. Not measured yet.
constexpr int64_t kOneBlock = 64 * 64 * 32;

// With K' = K − I, r' = K'1, e_ij = (x_i − x_j)·(g_i − g_j) and B_ij = (k'_ij/n) [g_i·s_j + g_j·s_i + (2/h) e_ij],
// which contains only differences of x:
// ∂S = (1/n) (G + K'G),  ∂X = (2/h) [B X − (B1)∘X + (1/n) (r'∘G − K'G)],  ∂h = Σ_ij [½ B_ij d²_ij − k'_ij e_ij/n]/h².
// r' is recomputed, because 1 + r' has lost a small r'. A block with far rows sums B_ij (x_j − x_i).
template <int D, class T>
__global__ void __launch_bounds__(kThreads, 2) svgd_backward_kernel(
    const T* __restrict__ grad, const T* __restrict__ x, const T* __restrict__ score,
    const float* __restrict__ bandwidth, T* __restrict__ dx, T* __restrict__ dscore, float* __restrict__ dbandwidth,
    int n, int d) {
  // this block: tiles blockIdx.y, blockIdx.y + gridDim.y, … of one set
  const int64_t set = blockIdx.x;
  const Bandwidth bw(bandwidth[set]);
  const float per_n = bw.one() / n;
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
  float* r_i = b_i + kTile;

  constexpr int kRows = D / 32;
  const int i = threadIdx.x / 16, j = threadIdx.x % 16;
  const int out_row = threadIdx.x / (D / 4) * kRows, out_column = threadIdx.x % (D / 4) * 4;
  float dh = 0.f;

  for (int first_i = blockIdx.y * kTile; first_i < n; first_i += gridDim.y * kTile) {
    const int rows_i = min(kTile, n - first_i);
    const auto [centre, far] = fill_own<D>(X_i, x + first_i * d, rows_i, d, bw, X_j);
    const auto load = [&](int first, int rows, float* G, float* S) {
      fill_tile<D>(G, rows, d, [&](int row, int c) { return static_cast<float>(grad[(first + row) * d + c]); });
      fill_tile<D>(S, rows, d, [&](int row, int c) {
        const int at = (first + row) * d + c;
        return score ? static_cast<float>(score[at]) : -static_cast<float>(x[at]);
      });
    };
    load(first_i, rows_i, G_i, S_i);
    float b[2] = {}, r[2] = {}, KG[kRows][4] = {}, BX[kRows][4] = {};

    for (int first_j = 0; first_j < n; first_j += kTile) {
      const int rows_j = min(kTile, n - first_j);
      __syncthreads();  // the tiles of the last round are read
      fill_tile<D>(X_j, rows_j, d, [&](int row, int c) {
        return static_cast<float>(x[(first_j + row) * d + c]) - centre;
      });
      load(first_j, rows_j, G_j, S_j);
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
        const bool others = i_here < rows_i && j_here < rows_j && first_i + i_here != first_j + j_here;
        const float k = others ? exp2f(bw.to_exponent() * d2[p][q]) * per_n : 0.f;
        const bool meet = k != 0.f;  // else products with k may be 0 · ∞
        const float B = meet ? k * (gs[p][q] + bw.two_over_h * e[p][q]) : 0.f;
        r[p] += k;
        b[p] += B;
        dh += meet ? 0.5f * B * d2[p][q] - k * e[p][q] : 0.f;
        K_ji[j_here * kPairs + i_here] = k;
        B_ji[j_here * kPairs + i_here] = B;
      }
      __syncthreads();

      if (far) {
        each_difference<D, kRows>(X_i, X_j, out_row, out_column, [&](int row, int j_all, const float4& from_j) {
          const float4 g = vec4(G_j + j_all * kStride<D> + out_column);
          const float k = K_ji[j_all * kPairs + out_row + row], B = B_ji[j_all * kPairs + out_row + row];
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            KG[row][c] += k * part(g, c);
            BX[row][c] -= unless_zero(k, B * part(from_j, c));
          }
        });
        continue;
      }
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
      const float total_b = row_total(b[half]), total_r = row_total(r[half]);
      if (j == 0) b_i[i + 16 * half] = far ? 0.f : total_b, r_i[i + 16 * half] = total_r;
    }
    __syncthreads();
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const int at = out_row + row;
      if (at >= rows_i) continue;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int column = out_column + c, in_tile = at * kStride<D> + column;
        if (column >= d) continue;
        const float dS = per_n * G_i[in_tile] + KG[row][c];
        const float D_i = b_i[at] * X_i[in_tile] - BX[row][c], E_i = r_i[at] * G_i[in_tile] - KG[row][c];
        const float dX = bw.two_over_h * (E_i - D_i);
        const int64_t out = (set * n + first_i + at) * d + column;
        dx[out] = static_cast<T>(score ? dX : dX - dS);
        if (score) dscore[out] = static_cast<T>(dS);
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
    dbandwidth[set * gridDim.y + blockIdx.y] = total * 0.25f * bw.two_over_h * bw.two_over_h;
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
    Tensor grad, Tensor x, std::optional<Tensor> score, Tensor bandwidth, Tensor, bool bandwidth_gradient) {
  const Sets sets = direction_sets(x);
  grad = as_contiguous(grad);
  x = as_contiguous(x);
  score = as_contiguous(score);
  bandwidth = as_contiguous(bandwidth);
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
          x, svgd_backward_kernel<D, T>, dim3(sets.count, blocks), kThreads, shared_bytes(6, 2, 2, D),
          grad.const_data_ptr<T>(), x.const_data_ptr<T>(), score ? score->const_data_ptr<T>() : nullptr,
          bandwidth.const_data_ptr<float>(), dx.mutable_data_ptr<T>(), dscore.mutable_data_ptr<T>(),
          parts.mutable_data_ptr<float>(), sets.n, sets.d);
    });
    if (blocks > 1 && bandwidth_gradient) {
      launch(
          x, sum_parts_kernel, dim3((sets.count + kThreads - 1) / kThreads), kThreads, 0, parts.const_data_ptr<float>(),
          dbandwidth.mutable_data_ptr<float>(), sets.count, blocks);
    }
  });
  return {dx, dscore, bandwidth_gradient ? dbandwidth : empty(x, {0}, ScalarType::Float)};
}

STABLE_TORCH_LIBRARY_IMPL(ivfast, IVFAST_CUDA_KEY, m) {
  m.impl("svgd_direction_backward.cuda", TORCH_BOX(&svgd_direction_backward));
}

}  // namespace ivfast
