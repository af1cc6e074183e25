// MMD² and its gradients in one launch: a block owns four rows of the pooled sample and loops over all of it.
//
// MMD² = w_x Σ k(x, x') + w_y Σ k(y, y') − 2 w_xy Σ k(x, y),  ∂/∂x_i = Σ_j 4 w k'(r²_ij)(x_i − x_j) with w = −w_xy for
// x_j in the other sample. k = Σ_s 1/(1 + r²/c_s) ("imq") or Σ_s exp(−r²/c_s), c_s = s b.
#include "pooled.h"

#include <optional>
#include <tuple>
#include <vector>

namespace ivfast {

constexpr int kRows = 4;
constexpr int kMostScales = 32;

struct Scales {
  float inverse[kMostScales];
  int count;
};

struct MmdPlan {
  int n, m, d;
  bool unbiased;
  double w_x, w_y, w_xy;
  Panels panels;
  Scales scales;
  Ticket signature;
};

struct MmdShared {
  double sums[kMostColumns / 32];
  float inverse[kMostScales];  // 1/c_s
  bool last;  // whether all other blocks have reported
  int apart;  // whether a squared distance of the four rows overflows
  float4 slopes[kMostColumns];  // of the four rows with each column
};

template <bool Imq, class T>
__global__ void __launch_bounds__(kMostColumns, 1) mmd_kernel(
    const T* __restrict__ x, const T* __restrict__ y, const float* __restrict__ bandwidth, float* __restrict__ value,
    float* __restrict__ dx, float* __restrict__ dy, double* reports, MmdPlan plan) {
  // this block: four rows of x against both samples, or four of y, whose pairs with x count only for the gradient
  const int64_t set = blockIdx.x, n = plan.n, m = plan.m, d = plan.d;
  x += set * n * d, y += set * m * d;
  const Reports<1> blocks(reports, set, plan.signature);
  const int tile = blockIdx.y, x_tiles = (plan.n + kRows - 1) / kRows;
  const bool in_x = tile < x_tiles;
  float* const gradient = in_x ? (dx ? dx + set * n * d : nullptr) : (dy ? dy + set * m * d : nullptr);
  Pool<1, T> pool;
  pool.ours[0] = in_x ? x : y, pool.theirs[0] = in_x ? y : x;
  pool.own = in_x ? plan.n : plan.m, pool.columns = in_x || gradient ? plan.n + plan.m : plan.m;
  pool.d = plan.d, pool.first_row = kRows * (in_x ? tile : tile - x_tiles);
  pool.whole = whole_quads(x, plan.d) && whole_quads(y, plan.d);

  MmdShared& shared = *reinterpret_cast<MmdShared*>(dynamic_shared);
  float* panel = reinterpret_cast<float*>(&shared + 1);
  const int column = threadIdx.x, stride = plan.panels.stride, quads = plan.panels.quads;
  const bool is_own = column < pool.own;
  if (column == 0) shared.apart = 0;
  if (column < plan.scales.count) {
    const float inverse = plan.scales.inverse[column];
    shared.inverse[column] = bounded(bandwidth ? inverse / positive_or_nan(bandwidth[set]) : inverse);
  }

  const float* rows[kRows];
  for (int p = 0; p < kRows; ++p) rows[p] = panel + min(pool.first_row + p, pool.own - 1) * stride;
  float d2[kRows] = {};
  int first = 0;
  for (;; first += 4 * quads) {
    fill_panels(panel, plan.panels, pool, first);
    __syncthreads();
    if (column < pool.columns) {
#pragma unroll 2
      for (int k = 0; k < 4 * quads; k += 4) {
        const float4 x_j = vec4(panel + column * stride + k);
#pragma unroll
        for (int p = 0; p < kRows; ++p) {
          const float4 x_i = vec4(rows[p] + k);
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            const float difference = part(x_i, c) - part(x_j, c);
            d2[p] += difference * difference;
          }
        }
      }
    }
    if (first + 4 * quads >= plan.d) break;
    __syncthreads();
  }

  // k, and 4 w dk/dr² for the gradient; pairs between the samples enter the value once, from x's side
  double sum = 0;
  if (column < pool.columns) {
    const double weight = is_own ? (in_x ? plan.w_x : plan.w_y) : -plan.w_xy;
    float k[kRows] = {}, slope[kRows] = {};
    for (int s = 0; s < plan.scales.count; ++s) {
      const float inverse = shared.inverse[s];
#pragma unroll
      for (int p = 0; p < kRows; ++p) {
        const float term = Imq ? __fdividef(1.f, 1.f + d2[p] * inverse) : exp2f(-1.44269504f * d2[p] * inverse);
        k[p] += term;
        slope[p] -= (Imq ? term * term : term) * inverse;
      }
    }
#pragma unroll
    for (int p = 0; p < kRows; ++p) {
      const int row = pool.first_row + p;
      const bool diagonal = is_own && row == column;
      if (row < pool.own && !(diagonal && plan.unbiased)) sum += diagonal ? plan.scales.count : static_cast<double>(k[p]);
      slope[p] *= static_cast<float>(4 * weight);
      if (d2[p] > kLargest) shared.apart = 1;
    }
    shared.slopes[column] = make_float4(slope[0], slope[1], slope[2], slope[3]);
    sum *= is_own ? weight : in_x ? 2 * weight : 0;
  }
  sum = warp_sum(sum);
  if (column % 32 == 0) shared.sums[column / 32] = sum;
  __syncthreads();
  if (column < 32) {
    sum = warp_sum(column < static_cast<int>(blockDim.x) / 32 ? shared.sums[column] : 0.);
    if (column == 0) shared.last = blocks.send({sum});  // what follows hides how long that takes
  }

  if (gradient) {
    const Slices slices(quads);
    const int at = 4 * slices.quad;
    for (bool there = true; first >= 0; first -= 4 * quads, there = false) {  // the last panel is there
      if (!there) {
        __syncthreads();
        fill_panels(panel, plan.panels, pool, first);
        __syncthreads();
      }
      float sums[kRows][4] = {};
      if (slices.quad < quads) {
        float4 x_i[kRows];
#pragma unroll
        for (int p = 0; p < kRows; ++p) x_i[p] = vec4(rows[p] + at);
        const auto add = [&](int j, auto difference) {
          const float4 x_j = vec4(panel + j * stride + at), slope = shared.slopes[j];
#pragma unroll
          for (int p = 0; p < kRows; ++p) {
#pragma unroll
            for (int c = 0; c < 4; ++c) sums[p][c] += part(slope, p) * difference(part(x_i[p], c), part(x_j, c));
          }
        };
        if (shared.apart) {  // the slope of a pair whose difference overflows is 0, and 0 · ∞ is NaN
#pragma unroll 1
          for (int j = slices.slice; j < pool.columns; j += slices.count) {
            add(j, [](float a, float b) { return fabsf(a - b) <= kLargest ? a - b : 0.5f * a - 0.5f * b; });
          }
        } else {
#pragma unroll 2
          for (int j = slices.slice; j < pool.columns; j += slices.count) add(j, [](float a, float b) { return a - b; });
        }
      }
      __syncthreads();
      sum_slices(panel, sums, slices, [&](int row, int c, float total) {
        if (pool.first_row + row < pool.own && c < 4 * quads && first + c < plan.d) {
          gradient[(pool.first_row + row) * d + first + c] = total;
        }
      });
    }
  }

  __syncthreads();
  if (!shared.last) return;
  sum = blocks.total(shared.sums);
  if (column == 0) value[set] = static_cast<float>(sum);
}

std::tuple<Tensor, Tensor, Tensor> mmd(
    Tensor x, Tensor y, std::optional<Tensor> bandwidth, bool imq, std::vector<double> scales, bool unbiased,
    bool x_gradient, bool y_gradient) {
  const TwoSamples sets("mmd", "x", x, "y", y);
  STD_TORCH_CHECK(
      scales.size() <= kMostScales, "mmd in CUDA C++ takes up to ", kMostScales, " scales, got ", scales.size());
  x = as_contiguous(x), y = as_contiguous(y);
  if (bandwidth) bandwidth = as_contiguous(*bandwidth);
  Tensor value = empty(x, sets.x.batch, ScalarType::Float);
  Tensor dx = empty(x, x_gradient ? sets.x.full : std::vector<int64_t>{0}, ScalarType::Float);
  Tensor dy = empty(x, y_gradient ? sets.y.full : std::vector<int64_t>{0}, ScalarType::Float);

  const int n = sets.x.n, m = sets.y.n, columns = n + m, threads = std::max(128, round_up(columns, 32));
  const double n2 = unbiased ? double(n) * (n - 1) : double(n) * n, m2 = unbiased ? double(m) * (m - 1) : double(m) * m;
  const Panels panels(columns, sets.x.d, 1, shared_limit(x) - sizeof(MmdShared));
  MmdPlan plan{n, m, sets.x.d, unbiased, 1 / n2, 1 / m2, 1 / (double(n) * m), panels, {}, new_signature()};
  plan.scales.count = static_cast<int>(scales.size());
  for (size_t s = 0; s < scales.size(); ++s) plan.scales.inverse[s] = static_cast<float>(1 / scales[s]);
  const size_t floats = std::max(panels.floats, x_gradient || y_gradient ? 4 * kRows * threads : 0);
  const int tiles = (n + kRows - 1) / kRows + (m + kRows - 1) / kRows;
  Tensor reports = new_reports<1>(x, sets.x.count, tiles);
  by_dtype("mmd", x, [&](auto zero) {
    using T = decltype(zero);
    if (sets.x.count == 0) return;
    launch(
        x, imq ? mmd_kernel<true, T> : mmd_kernel<false, T>, dim3(sets.x.count, tiles), threads,
        sizeof(MmdShared) + sizeof(float) * floats, x.const_data_ptr<T>(), y.const_data_ptr<T>(),
        bandwidth ? bandwidth->const_data_ptr<float>() : nullptr, value.mutable_data_ptr<float>(),
        x_gradient ? dx.mutable_data_ptr<float>() : nullptr, y_gradient ? dy.mutable_data_ptr<float>() : nullptr,
        reports.mutable_data_ptr<double>(), plan);
  });
  return {value, dx, dy};
}

STABLE_TORCH_LIBRARY_IMPL(ivfast, IVFAST_CUDA_KEY, m) { m.impl("mmd.cuda", TORCH_BOX(&mmd)); }

}  // namespace ivfast
