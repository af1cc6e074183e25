// The gradient of the SVGD bridge of small particle sets: all iterations in reverse, in one launch with one block per
// set.
//
// With G = ∂L/∂x of the next particles, K' = K − I, e_ij = (x_i − x_j)·(g_i − g_j), p_i = g_i·x_i and
// B_ij = (k'_ij/n) [(1 + 2/h) e_ij − p_i − p_j], the gradient of ⟨φ, G⟩ with respect to x is
// (2/h) [Σ_j B_ij (x_j − x_i) + (1/n) Σ_j k'_ij (g_i − g_j)] − (1/n) [g_i + Σ_j k'_ij g_j].
// Sums over j are of x_j − o and g_j − o', where o and o' belong to the first of the four rows i of a thread: nothing
// cancels. If one of the rows is far from it, or 1 + r' has lost a small r', o and o' are x_i and g_i.
#include "svgd_bridge.h"

namespace ivfast {

// The tile of this thread among those of a chunk: warps take turns, `columns` of them side by side.
__device__ __forceinline__ Tile chunk_tile(int t, int columns) {
  const int lane = threadIdx.x % 32, index = threadIdx.x / 32 + t * (kThreads / 32);
  return {index / columns * 16 + lane / 16 * 8 + lane % 2 * 4, index % columns * 32 + lane / 2 % 8 * 4};
}

// d2[4p + q] += Σ_k (x_ik − x_jk)²,  e[4p + q] += Σ_k (x_ik − x_jk)(g_ik − g_jk), for rows i + p and j + q
__device__ __forceinline__ void add_products(
    float (&d2)[16], float (&e)[16], const float* X, const float* G, int i, int j, int quads) {
  const int width = 4 * quads, at_i = row_at(i, quads), at_j = row_at(j, quads);
#pragma unroll 1
  for (int k = 0; k < width; k += 4) {
    float4 x_i[4], x_j[4], g_i[4], g_j[4];
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      x_i[p] = vec4(X + at_i + p * width + k), x_j[p] = vec4(X + at_j + p * width + k);
      g_i[p] = vec4(G + at_i + p * width + k), g_j[p] = vec4(G + at_j + p * width + k);
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) {
#pragma unroll
      for (int pair = 0; pair < 16; ++pair) {
        const float difference = part(x_i[pair / 4], c) - part(x_j[pair % 4], c);
        d2[pair] += difference * difference;
        e[pair] += difference * (part(g_i[pair / 4], c) - part(g_j[pair % 4], c));
      }
    }
  }
}

// p[i] = g_i·x_i, or the next panel's part added to it; four lanes per row
__device__ __forceinline__ void add_dots(float* p, const float* X, const float* G, int n, int quads, bool first) {
  for (int i = threadIdx.x / 4; i < round_up(n, kThreads / 4); i += kThreads / 4) {
    float sum = 0.f;
    for (int quad = threadIdx.x % 4; quad < quads && i < n; quad += 4) {
      const float4 x = vec4(X + row_at(i, quads) + 4 * quad), g = vec4(G + row_at(i, quads) + 4 * quad);
      sum += x.x * g.x + x.y * g.y + x.z * g.z + x.w * g.w;
    }
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if (threadIdx.x % 4 == 0 && i < round_up(n, 4)) p[i] = first ? sum : p[i] + sum;
  }
}

template <int Tiles, class T>
__global__ void __launch_bounds__(kThreads, 1) svgd_bridge_backward_kernel(
    const T* __restrict__ grad, const float* __restrict__ states, const float* __restrict__ bandwidths,
    const float* __restrict__ row_sums, float* gradients, T* __restrict__ dz, BridgePlan plan, float step_size) {
  // this block: one set; successive bridges and states are `all` elements apart, as are two gradients in turn
  const int n = plan.n, d = plan.d, quads = plan.quads, chunk = plan.chunk;
  const int64_t set = blockIdx.x, sets = gridDim.x, size = n * d, all = sets * size;
  grad += set * size, states += set * size, gradients += set * size, dz += set * size;

  float* X = reinterpret_cast<float*>(dynamic_shared);
  float* G = X + panel_floats(n, quads);
  float* K = G + panel_floats(n, quads);
  float* B = K + kernel_at(round_up(n, 4), chunk);
  float* p = B + kernel_at(round_up(n, 4), chunk);
  if (plan.steps == 0) {
    for (int at = threadIdx.x; at < size; at += kThreads) dz[at] = grad[at];
  }

  for (int step = plan.steps - 1; step >= 0; --step) {
    const float *x = states + step * all, *g = gradients + (step + 1) % 2 * all;
    const bool is_last = step + 1 == plan.steps;
    const auto load = [&](int first) {
      __syncthreads();
      fill(X, x, n, d, first, quads);
      is_last ? fill(G, grad + plan.steps / plan.iterations * all, n, d, first, quads)
              : fill(G, g, n, d, first, quads);
      __syncthreads();
    };
    const Bandwidth bw(bandwidths[step * sets + set]);
    const float per_n = bw.one() / n;
    const float* row_sum = row_sums + (step * sets + set) * n;
    const bool joins = step % plan.iterations == 0;  // these particles are a bridge, so its gradient is added
    const T* joining = grad + step / plan.iterations * all;

    float4 next_g = {}, next_x = {};
    int next_at = -1;
    for (int first_i = 0; first_i < n; first_i += chunk) {
      const int rows = min(chunk, n - first_i), columns = (n + 31) / 32;
      float d2[Tiles][16], e[Tiles][16];
#pragma unroll
      for (int t = 0; t < Tiles; ++t) {
#pragma unroll
        for (int pair = 0; pair < 16; ++pair) d2[t][pair] = e[t][pair] = 0.f;
      }
      for (int first = 0; first < d; first += 4 * quads) {
        if (!plan.one_panel() || (first_i == 0 && (is_last || !plan.resident))) load(first);
        if (first_i == 0) add_dots(p, X, G, n, quads, first == 0);
#pragma unroll
        for (int t = 0; t < Tiles; ++t) {
          const Tile tile = chunk_tile(t, columns);
          if (tile.i < rows && tile.j < n) add_products(d2[t], e[t], X, G, first_i + tile.i, tile.j, quads);
        }
      }
      __syncthreads();  // p is there, and the last chunk of K and B is read
#pragma unroll
      for (int t = 0; t < Tiles; ++t) {
        const Tile tile = chunk_tile(t, columns);
        if (tile.i >= rows || tile.j >= n) continue;
        const float4 p_i = vec4(p + first_i + tile.i), p_j = vec4(p + tile.j);
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          float k[4], b[4];
#pragma unroll
          for (int row = 0; row < 4; ++row) {
            const bool others = tile.i + row < rows && tile.j + q < n && first_i + tile.i + row != tile.j + q;
            k[row] = others ? per_n * exp2f(bw.to_exponent() * d2[t][4 * row + q]) : 0.f;
            b[row] = k[row] * ((1.f + bw.two_over_h) * e[t][4 * row + q] - (part(p_i, row) + part(p_j, q)));
            b[row] = k[row] == 0.f ? 0.f : b[row];
          }
          const int at = kernel_at(tile.j + q, chunk) + tile.i;
          *reinterpret_cast<float4*>(K + at) = make_float4(k[0], k[1], k[2], k[3]);
          *reinterpret_cast<float4*>(B + at) = make_float4(b[0], b[1], b[2], b[3]);
        }
      }

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
          const float4 joined = mine && joins ? load_four(joining + at, d - column) : float4{};
          const float4 x_before = mine && step && plan.resident ? load_four(x - all + at, d - column) : float4{};

          const int origin = row_at(first_i + patch.i, quads) + patch.column;
          const float4 o_x = vec4(X + origin), o_g = vec4(G + origin);
          const float r = mine ? row_sum[i] - 1.f : 1.f;
          const bool far = any_far(X + origin, 4 * quads, min(4, n - first_i - patch.i), bw) ||
                           __any_sync(~0u, !(r > 0.0625f));
          float sums[4][9] = {};  // K' (G − o'), B (X − o), B 1
          if (far) {
            sum_pairs<8>(sums, n, [&](float (&sum)[8], int row, int j) {
              const int at_i = origin + 4 * quads * row, at_j = row_at(j, quads) + patch.column;
              const float4 x_i = vec4(X + at_i), g_i = vec4(G + at_i), x_j = vec4(X + at_j), g_j = vec4(G + at_j);
              const float k = K[kernel_at(j, chunk) + patch.i + row], b = B[kernel_at(j, chunk) + patch.i + row];
#pragma unroll
              for (int c = 0; c < 4; ++c) {
                sum[c] += k * (part(g_j, c) - part(g_i, c));
                sum[4 + c] += unless_zero(b, b * (part(x_j, c) - part(x_i, c)));
              }
            });
          }
          const float *K_j = K + kernel_at(lane, chunk) + patch.i, *X_j = X + row_at(lane, quads) + patch.column;
#pragma unroll 2
          for (int j = far ? round_up(n, 4) : lane; j < round_up(n, 4); j += 4) {
            const float4 k = vec4(K_j), b = vec4(K_j + (B - K)), x_j = vec4(X_j), g_j = vec4(X_j + (G - X));
            K_j += kernel_at(4, chunk), X_j += row_at(4, quads);
#pragma unroll
            for (int c = 0; c < 4; ++c) {
              const float from_o = part(x_j, c) - part(o_x, c), g_from_o = part(g_j, c) - part(o_g, c);
#pragma unroll
              for (int row = 0; row < 4; ++row) {
                sums[row][c] += part(k, row) * g_from_o;
                sums[row][4 + c] += part(b, row) * from_o;
              }
            }
#pragma unroll
            for (int row = 0; row < 4; ++row) sums[row][8] += part(b, row);
          }
          share_out(sums);
          if (!mine) continue;

          const int at_i = row_at(i, quads) + patch.column;
          const float4 x_i = vec4(X + at_i), g_i = vec4(G + at_i);
          const float r_i = per_n * r;
          float moved[4];
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            const float g_ic = part(g_i, c), o = far ? g_ic : part(o_g, c), kg = sums[0][c];
            const float pull = sums[0][4 + c] - sums[0][8] * (part(x_i, c) - part(o_x, c));
            const float dx = bw.two_over_h * (pull + r_i * (g_ic - o) - kg) - (per_n * g_ic + (kg + r_i * o));
            moved[c] = column + c < d ? g_ic + step_size * dx + part(joined, c) : 0.f;
          }
          next_g = make_float4(moved[0], moved[1], moved[2], moved[3]);
          next_x = x_before, next_at = at_i;
          if (step == 0) {
            store_four(dz + at, next_g, d - column);
          } else if (!plan.resident) {
            store_four(gradients + step % 2 * all + at, next_g, d - column);
          }
        }
      }
    }
    if (plan.resident) {
      __syncthreads();
      if (next_at >= 0) {
        *reinterpret_cast<float4*>(X + next_at) = next_x;
        *reinterpret_cast<float4*>(G + next_at) = next_g;
      }
      __syncthreads();
    }
  }
}

Tensor svgd_bridge_backward(
    Tensor grad, Tensor states, Tensor bandwidths, Tensor row_sums, int64_t iterations, double step_size) {
  const auto sizes = grad.sizes();
  const Sets sets("svgd_bridge", sizes.slice(1, sizes.size() - 1), kMostParticles, kMostDimensions);
  const int64_t steps = states.size(0);
  STD_TORCH_CHECK(
      sizes[0] == steps / iterations + 2, "grad must hold ", steps / iterations + 2, " bridges, got ", sizes[0]);
  grad = as_contiguous(grad), states = as_contiguous(states);
  bandwidths = as_contiguous(bandwidths), row_sums = as_contiguous(row_sums);
  Tensor dz = empty(grad, sets.full, grad.scalar_type());
  by_dtype("svgd_bridge_backward", grad, [&](auto zero) {
    using T = decltype(zero);
    if (sets.count == 0) return;
    const int columns = (sets.n + 31) / 32;
    const auto start = [&](auto tiles) {
      const BridgePlan plan(
          grad, "svgd_bridge_backward", sets.n, sets.d, steps, iterations, 2, sizeof(float) * round_up(sets.n, 4),
          kThreads / 32 * tiles / columns * 16);
      Tensor gradients = empty(grad, {plan.resident ? 0 : 2, sets.count, sets.n, sets.d}, ScalarType::Float);
      launch(
          grad, svgd_bridge_backward_kernel<tiles, T>, dim3(sets.count), kThreads, plan.shared,
          grad.const_data_ptr<T>(), states.const_data_ptr<float>(), bandwidths.const_data_ptr<float>(),
          row_sums.const_data_ptr<float>(), gradients.mutable_data_ptr<float>(), dz.mutable_data_ptr<T>(), plan,
          step_size);
    };
    if (columns <= 2) return start(std::integral_constant<int, 1>{});
    if (columns <= 4) return start(std::integral_constant<int, 2>{});
    start(std::integral_constant<int, 3>{});
  });
  return dz;
}

STABLE_TORCH_LIBRARY_IMPL(ivfast, IVFAST_CUDA_KEY, m) {
  m.impl("svgd_bridge_backward.cuda", TORCH_BOX(&svgd_bridge_backward));
}

}  // namespace ivfast
