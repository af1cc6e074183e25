// The median bandwidth of particle sets of n <= 256 and its gradient: one block per set, one launch each way.
#include "median.h"

#include <tuple>

namespace ivfast {

constexpr int kQuads = 16;  // columns of a panel, in fours: two blocks of 256 particles fit on an SM

template <int Tiles, class T>
__global__ void __launch_bounds__(kThreads, 1) median_kernel(
    const T* __restrict__ x, float* __restrict__ h, float* __restrict__ middles, int n, int d, Heuristic heuristic) {
  const int64_t set = blockIdx.x;
  x += set * n * d;

  Selection& selection = *reinterpret_cast<Selection*>(dynamic_shared);
  float* panel = reinterpret_cast<float*>(&selection + 1);
  selection.clear();
  const int quads = min(kQuads, (d + 3) / 4);
  const auto value = [&](int row, int column) { return static_cast<float>(x[row * d + column]); };

  float d2[Tiles][16];
  distances<Tiles>(d2, panel, n, d, quads, [&](int first) {
    __syncthreads();
    fill(panel, x, n, d, first, quads);
    __syncthreads();
  });
  unsigned bits[16 * Tiles];
  bits_of_pairs<Tiles>(bits, d2, n);
  const float2 found = middles_of(bits, heuristic, selection);
  const float bandwidth = bandwidth_of(found, heuristic, n, d, value);

  if (threadIdx.x == 0) h[set] = bandwidth, middles[2 * set] = found.x, middles[2 * set + 1] = found.y;
}

// ∂h/∂x_i = Σ_a Σ_j 2 (x_i − x_j) slope_a/(divisor pairs_a) over the pairs at the middle squared distance m_a, where
// slope_a = ∂med²/∂m_a is ½ for (m₁ + m₂)/2 and (√m₁ + √m₂)/(4 √m_a) for ((√m₁ + √m₂)/2)². A zero adds nothing.
template <int Tiles, class T>
__global__ void __launch_bounds__(kThreads, 1) median_backward_kernel(
    const float* __restrict__ grad, const T* __restrict__ x, const float* __restrict__ middles, T* __restrict__ dx,
    int n, int d, bool squared, float divisor) {
  const int64_t set = blockIdx.x;
  x += set * n * d;
  dx += set * n * d;
  const float m[2] = {middles[2 * set], middles[2 * set + 1]};

  // bit j of chosen[a][i]: the pair (i, j) is at middle a
  const int words = (n + 31) / 32;
  unsigned* chosen = reinterpret_cast<unsigned*>(dynamic_shared);
  unsigned* pairs = chosen + 2 * round_up(n, 2) * words;
  float* panel = reinterpret_cast<float*>(pairs + 4);
  for (int at = threadIdx.x; at < 2 * round_up(n, 2) * words + 4; at += kThreads) chosen[at] = 0;
  const int quads = min(kQuads, (d + 3) / 4);

  float d2[Tiles][16];
  distances<Tiles>(d2, panel, n, d, quads, [&](int first) {
    __syncthreads();
    fill(panel, x, n, d, first, quads);
    __syncthreads();
  });
#pragma unroll
  for (int t = 0; t < Tiles; ++t) {
    const Tile tile = upper_tile(t);
#pragma unroll
    for (int pair = 0; pair < 16; ++pair) {
      const int i = tile.i + pair / 4, j = tile.j + pair % 4;
#pragma unroll
      for (int a = 0; a < 2; ++a) {
        if (i < j && j < n && d2[t][pair] == m[a] && m[a] > 0.f) {
          atomicOr(chosen + (a * n + i) * words + j / 32, 1u << j % 32);
          atomicOr(chosen + (a * n + j) * words + i / 32, 1u << i % 32);
          atomicAdd(pairs + a, 1u);
        }
      }
    }
  }
  __syncthreads();

  float weight[2];
#pragma unroll
  for (int a = 0; a < 2; ++a) {
    const float slope = squared ? 0.5f : 0.25f * (sqrtf(m[0]) + sqrtf(m[1])) / sqrtf(m[a]);
    weight[a] = m[a] == 0.f ? 0.f : 2.f * grad[set] / divisor * slope / static_cast<float>(pairs[a]);
  }
  for (int at = threadIdx.x; at < n * d; at += kThreads) {
    const int i = at / d, column = at % d;
    const float x_i = static_cast<float>(x[at]);
    float sum = 0.f * weight[0] + 0.f * weight[1];  // NaN if no pair is at a middle
    for (int word = 0; word < 2 * words; ++word) {
      const int a = word / words, first_j = word % words * 32;
      for (unsigned left = chosen[(a * n + i) * words + word % words]; left; left &= left - 1) {
        const int j = first_j + __ffs(static_cast<int>(left)) - 1;
        sum += weight[a] * (x_i - static_cast<float>(x[j * d + column]));
      }
    }
    dx[at] = static_cast<T>(sum);
  }
}

size_t panel_bytes(int n, int d) { return sizeof(float) * panel_floats(n, std::min(kQuads, (d + 3) / 4)); }

std::tuple<Tensor, Tensor> median_bandwidth(Tensor x, bool full, bool squared, double divisor) {
  const Sets sets("median_bandwidth", x.sizes(), kMostParticles, INT32_MAX / kMostParticles);
  x = as_contiguous(x);
  Tensor h = empty(x, sets.batch, ScalarType::Float);
  std::vector<int64_t> pairs = sets.batch;
  pairs.push_back(2);
  Tensor middles = empty(x, pairs, ScalarType::Float);
  by_dtype("median_bandwidth", x, [&](auto zero) {
    using T = decltype(zero);
    if (sets.count == 0) return;
    by_size(sets.n, [&](auto tiles) {
      launch(
          x, median_kernel<tiles, T>, dim3(sets.count), kThreads, sizeof(Selection) + panel_bytes(sets.n, sets.d),
          x.const_data_ptr<T>(), h.mutable_data_ptr<float>(), middles.mutable_data_ptr<float>(), sets.n, sets.d,
          Heuristic(sets.n, full, squared, divisor));
    });
  });
  return {h, middles};
}

Tensor median_bandwidth_backward(Tensor grad, Tensor x, Tensor middles, bool squared, double divisor) {
  const Sets sets("median_bandwidth_backward", x.sizes(), kMostParticles, INT32_MAX / kMostParticles);
  grad = as_contiguous(grad), x = as_contiguous(x), middles = as_contiguous(middles);
  Tensor dx = empty(x, sets.full, x.scalar_type());
  const size_t chosen = sizeof(unsigned) * (2 * round_up(sets.n, 2) * ((sets.n + 31) / 32) + 4);
  by_dtype("median_bandwidth_backward", x, [&](auto zero) {
    using T = decltype(zero);
    if (sets.count == 0) return;
    by_size(sets.n, [&](auto tiles) {
      launch(
          x, median_backward_kernel<tiles, T>, dim3(sets.count), kThreads, chosen + panel_bytes(sets.n, sets.d),
          grad.const_data_ptr<float>(), x.const_data_ptr<T>(), middles.const_data_ptr<float>(),
          dx.mutable_data_ptr<T>(), sets.n, sets.d, squared, static_cast<float>(divisor));
    });
  });
  return dx;
}

STABLE_TORCH_LIBRARY_IMPL(ivfast, IVFAST_CUDA_KEY, m) {
  m.impl("median_bandwidth.cuda", TORCH_BOX(&median_bandwidth));
  m.impl("median_bandwidth_backward.cuda", TORCH_BOX(&median_bandwidth_backward));
}

}  // namespace ivfast
