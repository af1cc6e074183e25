// The SVGD bridge of small particle sets: all iterations of a set and their medians, in one launch, one block per set.
//
// h = scale med²/log n, k_ij = exp(−‖x_i − x_j‖²/h), K' = K − I, r' = K'1, and for the N(0, I) target
// φ_i = (1/n) [−x_i + Σ_j k'_ij ((2/h)(x_i − x_j) − x_j)],  x ← x + step_size φ + noise ε.
// Sums over j are of x_j − o, o being the first of the four rows i of a thread, or x_i if one of them is far from it:
// nothing cancels wherever the data lie.
#include "svgd_bridge.h"

#include <tuple>

#include "median.h"

namespace ivfast {

// The rows i of a chunk of K', from the tiles of pairs i < j and their mirror images.
template <int Tiles>
__device__ __forceinline__ void write_kernel(
    float* K, const unsigned (&d2)[16 * Tiles], float exponent, int n, int first_i, int chunk) {
#pragma unroll
  for (int t = 0; t < Tiles; ++t) {
    const Tile tile = upper_tile(t);
    if (!tile.exists(n)) continue;
    const int row = tile.i - first_i, column = tile.j - first_i;
    const bool rows = row >= 0 && row < chunk, columns = column >= 0 && column < chunk && tile.i != tile.j;
    if (!rows && !columns) continue;
    float k[16];
#pragma unroll
    for (int pair = 0; pair < 16; ++pair) {
      const unsigned bits = d2[16 * t + pair];
      k[pair] = bits == kNone ? 0.f : exp2f(exponent * __uint_as_float(bits));
    }
    if (tile.i == tile.j) {
#pragma unroll
      for (int pair = 0; pair < 16; ++pair) {
        const int p = pair / 4, q = pair % 4;
        if (p >= q) k[pair] = p > q ? k[4 * q + p] : 0.f;
      }
    }
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      if (rows) {
        float* const to = K + kernel_at(tile.j + q, chunk) + row;
        *reinterpret_cast<float4*>(to) = make_float4(k[q], k[4 + q], k[8 + q], k[12 + q]);
      }
      if (columns) {
        float* const to = K + kernel_at(tile.i + q, chunk) + column;
        *reinterpret_cast<float4*>(to) = make_float4(k[4 * q], k[4 * q + 1], k[4 * q + 2], k[4 * q + 3]);
      }
    }
  }
}

template <int Tiles, class T>
__global__ void __launch_bounds__(kThreads, Tiles == 1 ? 2 : 1) svgd_bridge_kernel(
    const T* __restrict__ z, const T* __restrict__ draws, T* __restrict__ bridges, float* states,
    float* __restrict__ bandwidths, float* __restrict__ row_sums, BridgePlan plan, Heuristic heuristic, float step_size,
    float scale, float noise) {
  // this block: one set; successive bridges, states and draws are `all` elements apart
  const int n = plan.n, d = plan.d, quads = plan.quads, chunk = plan.chunk;
  const int64_t set = blockIdx.x, sets = gridDim.x, size = n * d, all = sets * size;
  z += set * size, draws += set * size, bridges += set * size, states += set * size;

  Selection& selection = *reinterpret_cast<Selection*>(dynamic_shared);
  float* X = reinterpret_cast<float*>(&selection + 1);
  float* K = X + panel_floats(n, quads);
  selection.clear();
  const int64_t last = (plan.steps / plan.iterations + 1) * all;
  for (int at = threadIdx.x; at < size; at += kThreads) {
    bridges[at] = z[at];
    bridges[last + at] = draws[plan.steps * all + at];
    if (plan.steps) states[at] = static_cast<float>(z[at]);
  }

  for (int step = 0; step < plan.steps; ++step) {
    const float* x = states + step * all;
    const auto load = [&](int first) {
      __syncthreads();
      step ? fill(X, x, n, d, first, quads) : fill(X, z, n, d, first, quads);
      __syncthreads();
    };

    unsigned d2[16 * Tiles];
    {
      float sums[Tiles][16];
      distances<Tiles>(sums, X, n, d, quads, [&](int first) {
        if (step == 0 || !plan.resident) load(first);
      });
      bits_of_pairs<Tiles>(d2, sums, n);
    }
    const float2 middles = middles_of(d2, heuristic, selection);
    const float h =
        scale * bandwidth_of(middles, heuristic, n, d, [&](int row, int column) { return x[row * d + column]; });
    if (threadIdx.x == 0) bandwidths[step * sets + set] = h;
    const Bandwidth b(h);
    const float per_n = b.one() / n;

    float* const next_state = step + 1 < plan.steps ? states + (step + 1) * all : nullptr;
    T* const bridge = (step + 1) % plan.iterations ? nullptr : bridges + (step + 1) / plan.iterations * all;
    float4 next = {};
    int next_at = -1;
    for (int first_i = 0; first_i < n; first_i += chunk) {
      const int rows = min(chunk, n - first_i);
      if (first_i) __syncthreads();  // the last chunk is read
      write_kernel<Tiles>(K, d2, b.to_exponent(), n, first_i, chunk);

      for (int first = 0; first < d; first += 4 * quads) {
        if (plan.one_panel()) {
          __syncthreads();
        } else {
          load(first);
        }
        for (int round = threadIdx.x / 32; round < Patch::rounds(rows, quads); round += kThreads / 32) {
          const Patch patch(round, rows, plan);
          const int lane = threadIdx.x % 4, i = first_i + patch.i + lane, column = first + patch.column;
          const bool mine = patch.exists && i < n;
          const int at = i * d + column;
          const float4 draw = mine ? load_four(draws + step * all + at, d - column) : float4{};

          const float* const X_i = X + row_at(first_i + patch.i, quads) + patch.column;
          const float4 o = vec4(X_i);
          const bool far = any_far(X_i, 4 * quads, min(4, n - first_i - patch.i), b);
          float KX[4][5] = {};  // the fifth column is r'
          const float *K_j = K + kernel_at(lane, chunk) + patch.i, *X_j = X + row_at(lane, quads) + patch.column;
          if (far) {
            sum_pairs<5>(KX, n, [&](float (&sum)[5], int row, int j) {
              const float k = K[kernel_at(j, chunk) + patch.i + row];
              const float4 x_i = vec4(X_i + 4 * quads * row), x_j = vec4(X + row_at(j, quads) + patch.column);
#pragma unroll
              for (int c = 0; c < 4; ++c) sum[c] += unless_zero(k, k * (part(x_j, c) - part(x_i, c)));
              sum[4] += k;
            });
          }
#pragma unroll(Tiles > 3 ? 1 : 4)
          for (int j = far ? round_up(n, 4) : lane; j < round_up(n, 4); j += 4) {
            const float4 k = vec4(K_j), x_j = vec4(X_j);
            K_j += kernel_at(4, chunk), X_j += row_at(4, quads);
#pragma unroll
            for (int c = 0; c < 4; ++c) {
              const float from_o = part(x_j, c) - part(o, c);
#pragma unroll
              for (int row = 0; row < 4; ++row) KX[row][c] += part(k, row) * from_o;
            }
#pragma unroll
            for (int row = 0; row < 4; ++row) KX[row][4] += part(k, row);
          }
          share_out(KX);
          if (!mine) continue;

          const float r = KX[0][4];
          next_at = row_at(i, quads) + patch.column;
          const float4 x_i = vec4(X + next_at);
          float moved[4];
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            const float o_c = far ? part(x_i, c) : part(o, c);
            const float repulsion = b.two_over_h * (r * (part(x_i, c) - o_c) - KX[0][c]);
            const float phi = per_n * (repulsion - KX[0][c]) - (per_n * part(x_i, c) + per_n * r * o_c);
            moved[c] = column + c < d ? part(x_i, c) + step_size * phi + noise * part(draw, c) : 0.f;
          }
          next = make_float4(moved[0], moved[1], moved[2], moved[3]);
          if (column == 0) row_sums[(step * sets + set) * n + i] = b.one() + r;
          if (next_state) store_four(next_state + at, next, d - column);
          if (bridge) store_four(bridge + at, next, d - column);
        }
      }
    }
    if (plan.resident) {
      __syncthreads();
      if (next_at >= 0) *reinterpret_cast<float4*>(X + next_at) = next;
      __syncthreads();
    }
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> svgd_bridge(
    Tensor z, Tensor draws, int64_t t, int64_t iterations, double step_size, double scale, double noise) {
  const Sets sets("svgd_bridge", z.sizes(), kMostParticles, kMostDimensions);
  const int64_t steps = (t - 1) * iterations;
  z = as_contiguous(z), draws = as_contiguous(draws);
  STD_TORCH_CHECK(
      draws.scalar_type() == z.scalar_type() && draws.numel() == (steps + 1) * z.numel(), "draws must hold ", steps + 1,
      " blocks of z's shape and dtype");
  const auto stack = [&](int64_t count, std::vector<int64_t> sizes, ScalarType dtype) {
    sizes.insert(sizes.begin(), count);
    return empty(z, sizes, dtype);
  };
  Tensor bridges = stack(t + 1, sets.full, z.scalar_type()), states = stack(steps, sets.full, ScalarType::Float);
  Tensor bandwidths = stack(steps, sets.batch, ScalarType::Float), sums = stack(steps, sets.rows, ScalarType::Float);
  const double log_n = std::log(std::max(2, sets.n));
  by_dtype("svgd_bridge", z, [&](auto zero) {
    using T = decltype(zero);
    if (sets.count == 0) return;
    by_size(sets.n, [&](auto tiles) {
      const BridgePlan plan(
          z, "svgd_bridge", sets.n, sets.d, steps, iterations, 1, sizeof(Selection), sets.n + 3);
      launch(
          z, svgd_bridge_kernel<tiles, T>, dim3(sets.count), kThreads, plan.shared, z.const_data_ptr<T>(),
          draws.const_data_ptr<T>(), bridges.mutable_data_ptr<T>(), states.mutable_data_ptr<float>(),
          bandwidths.mutable_data_ptr<float>(), sums.mutable_data_ptr<float>(), plan,
          Heuristic(sets.n, false, false, log_n), step_size, scale, noise);
    });
  });
  return {bridges, states, bandwidths, sums};
}

STABLE_TORCH_LIBRARY_IMPL(ivfast, IVFAST_CUDA_KEY, m) { m.impl("svgd_bridge.cuda", TORCH_BOX(&svgd_bridge)); }

}  // namespace ivfast
