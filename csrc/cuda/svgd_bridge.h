// How a thread block processes the SVGD bridge of one particle set, forward and backward.
//
// K exists for `chunk` rows i at a time, as chunk columns of [j][i]; X exists for 4 quads columns at a time. Four lanes
// share a tile of 4 rows i by 4 columns of K X, each with every fourth j.
#pragma once

#include "particles.h"

namespace ivfast {

__host__ __device__ constexpr int kernel_at(int j, int chunk) { return j * (chunk + 8) + j / 4 * 8; }

struct BridgePlan {
  int n, d, steps, iterations;  // steps = (t − 1) iterations
  int chunk, quads, per_quad;  // tile / quads is tile per_quad / 2^16 for the tiles of a chunk
  bool resident;  // one chunk, one panel and one tile per four threads: the particles stay in shared memory
  size_t shared;

  // `count` matrices each of K and X in the shared memory of a block, with at most `most` rows of K
  BridgePlan(const Tensor& x, const char* op, int n, int d, int steps, int iterations, int count, size_t fixed,
             int most)
      : n(n), d(d), steps(steps), iterations(iterations) {
    const size_t limit = shared_limit(x);
    const int all = (d + 3) / 4;
    most = std::min(most, round_up(n, 4));
    const auto bytes = [&](int rows, int columns) {
      const size_t floats = kernel_at(round_up(n, 4), rows) + panel_floats(n, columns);
      return fixed + sizeof(float) * count * floats;
    };
    const struct {
      int rows, columns;
    } least[] = {{32, all}, {32, std::min(all, 8)}, {16, std::min(all, 4)}};
    for (const auto& wanted : least) {
      for (chunk = most; chunk >= std::min(wanted.rows, most); chunk = (chunk - 1) / 16 * 16) {
        if (bytes(chunk, wanted.columns) > limit) continue;
        quads = wanted.columns;
        while (quads < all && bytes(chunk, quads + 1) <= limit) ++quads;
        const int panels = (all + quads - 1) / quads;
        quads = (all + panels - 1) / panels;
        per_quad = (1 << 16) / quads + 1;
        resident = panels == 1 && chunk >= n && chunk / 4 * quads <= kThreads / 4;
        shared = bytes(chunk, quads);
        return;
      }
    }
    STD_TORCH_CHECK(
        false, op, " in CUDA C++ needs more shared memory than the ", limit, " bytes of this device for n = ", n,
        ", d = ", d);
  }

  __device__ bool one_panel() const { return 4 * quads >= d; }
};

// The tile of this thread in round `index` of its warp, for a chunk of `rows` rows: rows i..i+3 of it, columns column..
struct Patch {
  int i, column;
  bool exists;

  __device__ Patch(int index, int rows, const BridgePlan& plan) {
    const int tile = index * 8 + threadIdx.x % 32 / 4, row = tile * plan.per_quad >> 16;
    i = 4 * row, column = 4 * (tile - row * plan.quads);
    exists = i < rows;
    if (!exists) i = 0;
  }
  __device__ static int rounds(int rows, int quads) { return ((rows + 3) / 4 * quads + 7) / 8; }
};

// Whether any thread of this warp has a row far from its first row, or from the origin, in these four columns
__device__ __forceinline__ bool any_far(const float* X_i, int width, int rows, const Bandwidth& bandwidth) {
  const float4 o = vec4(X_i);
  bool far = false;
#pragma unroll
  for (int c = 0; c < 4; ++c) far = far || !(fabsf(part(o, c)) <= kHuge);
  for (int row = 1; row < rows; ++row) {
    const float4 x = vec4(X_i + width * row);
    float d2 = 0.f;
#pragma unroll
    for (int c = 0; c < 4; ++c) d2 += (part(x, c) - part(o, c)) * (part(x, c) - part(o, c));
    far = far || !bandwidth.reaches(d2);
  }
  return __any_sync(~0u, far);
}

// sums[row] += Σ_j f, one row at a time: f(sum, row, j) adds a pair to the first Count sums, for every fourth j.
template <int Count, int Width, class F>
__device__ __forceinline__ void sum_pairs(float (&sums)[4][Width], int n, F f) {
  for (int row = 0; row < 4; ++row) {
    float sum[Count] = {};
#pragma unroll 1
    for (int j = threadIdx.x % 4; j < round_up(n, 4); j += 4) f(sum, row, j);
#pragma unroll
    for (int c = 0; c < Count; ++c) {
#pragma unroll
      for (int to = 0; to < 4; ++to) sums[to][c] += to == row ? sum[c] : 0.f;
    }
  }
}

// Each of four lanes holds a share of all rows of v; lane s gets the sum of row s, in v[0].
template <int Width>
__device__ __forceinline__ void share_out(float (&v)[4][Width]) {
  const bool upper = threadIdx.x & 2, odd = threadIdx.x & 1;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
#pragma unroll
    for (int c = 0; c < Width; ++c) {
      const float mine = upper ? v[row + 2][c] : v[row][c], other = upper ? v[row][c] : v[row + 2][c];
      v[row][c] = mine + __shfl_xor_sync(~0u, other, 2);
    }
  }
#pragma unroll
  for (int c = 0; c < Width; ++c) {
    const float mine = odd ? v[1][c] : v[0][c], other = odd ? v[0][c] : v[1][c];
    v[0][c] = mine + __shfl_xor_sync(~0u, other, 1);
  }
}

}  // namespace ivfast
