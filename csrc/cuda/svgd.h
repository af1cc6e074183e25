// Tiles of 32 samples, which the SVGD direction and its gradient process in pairs, for any n and d up to 128.
//
// K exists in shared memory, 32 by 32 at a time. Distances are sums of squared differences: nothing cancels, and the
// diagonal is exactly 0.
#pragma once

#include "particles.h"

#include <optional>

namespace ivfast {

constexpr int kTile = 32;
constexpr int kPairs = kTile + 4;  // row stride of a tile of pairs: float4-aligned, not a multiple of the bank count

// A tile of samples: 32 rows of D >= d floats at this stride, zero outside the n x d that exist.
template <int D>
constexpr int kStride = D + 4;

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
__device__ __forceinline__ void fill_tile(float* tile, int rows, int d, F value) {
  const int column = threadIdx.x % D;
#pragma unroll 8
  for (int step = 0; step < kTile * D / kThreads; ++step) {
    const int row = threadIdx.x / D + step * (kThreads / D);
    tile[row * kStride<D> + column] = row < rows && column < d ? value(row, column) : 0.f;
  }
}

// The mean of column threadIdx.x % D over the block's own rows. No thread may be using `scratch`.
template <int D, class T>
__device__ __forceinline__ float centre_of(const T* x, int rows, int d, float* scratch) {
  const int column = threadIdx.x % D;
  const float share = 1.f / static_cast<float>(rows);
  float sum = 0.f, shares = 0.f;
#pragma unroll
  for (int step = 0; step < kTile * D / kThreads; ++step) {
    const int row = threadIdx.x / D + step * (kThreads / D);
    const float x_here = row < rows && column < d ? static_cast<float>(x[row * d + column]) : 0.f;
    sum += x_here, shares += x_here * share;
  }
  scratch[threadIdx.x] = sum, scratch[kThreads + threadIdx.x] = shares;
  __syncthreads();
  sum = shares = 0.f;
  for (int group = 0; group < kThreads / D; ++group) {
    sum += scratch[group * D + column], shares += scratch[kThreads + group * D + column];
  }
  return mean_of(sum, shares, rows);
}

// X = x − centre for a block's own rows, the centre of column threadIdx.x % D; 0 if a row is so far from it that
// differences of X, or sums about it, would lose what matters. No thread may be using `scratch`.
struct Centre {
  float value;
  bool far;
};

template <int D, class T>
__device__ __forceinline__ Centre fill_own(
    float* X, const T* x, int rows, int d, const Bandwidth& bandwidth, float* scratch) {
  const auto fill = [&](float centre) {
    fill_tile<D>(X, rows, d, [&](int row, int c) { return static_cast<float>(x[row * d + c]) - centre; });
    return centre;
  };
  const float mean = fill(centre_of<D>(x, rows, d, scratch));
  __syncthreads();
  float norm = 0.f;  // of the row that eight threads share
  for (int k = threadIdx.x % 8; k < D; k += 8) {
    const float X_k = X[threadIdx.x / 8 * kStride<D> + k];
    norm += X_k * X_k;
  }
#pragma unroll
  for (int lane = 4; lane > 0; lane /= 2) norm += __shfl_xor_sync(~0u, norm, lane);
  const bool far = __any_sync(~0u, !bandwidth.reaches(norm) || !(fabsf(mean) <= kHuge));
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = far;
  __syncthreads();
  bool any = false;
  for (int warp = 0; warp < kThreads / 32; ++warp) any = any || scratch[warp] != 0.f;
  return any ? Centre{fill(0.f), true} : Centre{mean, false};
}

// f(row, j, x_i − x_j) for `Rows` rows i of a tile from first_row on, all rows j of another, and four columns
template <int D, int Rows, class F>
__device__ __forceinline__ void each_difference(const float* X_i, const float* X_j, int first_row, int column, F f) {
#pragma unroll
  for (int row = 0; row < Rows; ++row) {
    const float4 x_i = vec4(X_i + (first_row + row) * kStride<D> + column);
#pragma unroll 1
    for (int j = 0; j < kTile; ++j) {
      const float4 x_j = vec4(X_j + j * kStride<D> + column);
      f(row, j, make_float4(x_i.x - x_j.x, x_i.y - x_j.y, x_i.z - x_j.z, x_i.w - x_j.w));
    }
  }
}

// Sum over the 16 threads that share a row of pairs; they are half a warp.
__device__ __forceinline__ float row_total(float v) {
#pragma unroll
  for (int lane = 8; lane > 0; lane /= 2) v += __shfl_xor_sync(0xffffffffu, v, lane);
  return v;
}

inline Sets direction_sets(const Tensor& x) {
  return Sets("svgd_direction", x.sizes(), 65535 * kTile, kMostDimensions);
}

inline int tiles_of(int n) { return (n + kTile - 1) / kTile; }

constexpr size_t shared_bytes(int tiles, int pair_tiles, int rows, int D) {
  return sizeof(float) * (tiles * kTile * (D + 4) + pair_tiles * kTile * kPairs + rows * kTile);
}

// f(D) for the narrowest tile that holds d; D is a compile-time constant
template <class F>
void by_width(int d, F f) {
  if (d <= 32) return f(std::integral_constant<int, 32>{});
  if (d <= 64) return f(std::integral_constant<int, 64>{});
  return f(std::integral_constant<int, 128>{});
}

inline std::optional<Tensor> as_contiguous(const std::optional<Tensor>& x) {
  return x ? std::optional(as_contiguous(*x)) : std::nullopt;
}

}  // namespace ivfast
