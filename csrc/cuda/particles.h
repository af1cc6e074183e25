// A particle set held by one thread block: columns in shared memory, squared distances in registers.
//
// Distances are sums of squared differences: nothing cancels, equal particles are at distance exactly 0, and a pair has
// the same bits wherever it is computed.
#pragma once

#include <type_traits>
#include <vector>

#include "launch.h"

namespace ivfast {

constexpr int kThreads = 256;  // per block
constexpr int kMostDimensions = 128;

__device__ __forceinline__ float4 vec4(const float* p) { return *reinterpret_cast<const float4*>(p); }

__device__ __forceinline__ float part(const float4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

__host__ __device__ constexpr int round_up(int value, int multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// A panel: 4 quads columns of n samples at row_at(row, quads), zero outside the n x d that exist. Four floats between
// groups of four rows put eight threads that read rows 4 apart on different banks.
__host__ __device__ constexpr int row_at(int row, int quads) { return row * 4 * quads + row / 4 * 4; }
__host__ __device__ constexpr int panel_floats(int n, int quads) { return row_at(round_up(n, 4), quads); }

constexpr float kLargest = 3.4028234e38f;
// Numbers beyond this are equal, or farther apart than 16 √h for every h; the difference of one below it from any other
// does not overflow.
constexpr float kHuge = 1e30f;

// h, or NaN if it is not positive and finite: with a median that float32 does not hold, 0 or infinity, all kernel
// values would be 0 or 1.
__device__ __forceinline__ float positive_or_nan(float h) {
  return h > 0.f && h <= kLargest ? h : __uint_as_float(0x7FC00000u);
}

// A value that is not negative, without overflow: 0 · ∞ is NaN.
__device__ __forceinline__ float bounded(float value) { return value > kLargest ? kLargest : value; }

// k term, in which the term may have overflowed if k is 0: 0 · ∞ is NaN.
__device__ __forceinline__ float unless_zero(float k, float k_term) { return k == 0.f ? 0.f : k_term; }

// The mean of n numbers: Σx/n, as exact as x if they are evenly spaced, or Σ(x/n) if float32 holds them but not their sum
__device__ __forceinline__ float mean_of(float sum, float sum_of_shares, int n) {
  return fabsf(sum) <= kLargest ? sum / static_cast<float>(n) : sum_of_shares;
}

// What k(x, y) = exp(−‖x − y‖²/h) needs; all NaN for an h that is no bandwidth
struct Bandwidth {
  float h, two_over_h;

  __device__ explicit Bandwidth(float value) : h(positive_or_nan(value)), two_over_h(bounded(2.f / h)) {}
  __device__ float one() const { return 1.f + 0.f * two_over_h; }
  __device__ float to_exponent() const { return -0.5f * 1.44269504f * two_over_h; }  // k = 2^(to_exponent d²)
  // Sums of a_ij (x_i − x_j) are computed about a common origin of some rows i, and lose eps times the distance from
  // it, which is small beside √h up to here. For rows farther away, such sums need differences.
  __device__ bool reaches(float squared_distance) const { return squared_distance * (1.f / 256.f) <= h; }
};

// Four neighbours in a row, of which `count` exist, by a single access if all exist and are aligned.
template <class T>
struct alignas(4 * sizeof(T)) Four {
  T v[4];
};

template <class T>
__device__ __forceinline__ bool is_four(const T* p, int count) {
  return count >= 4 && reinterpret_cast<uintptr_t>(p) % sizeof(Four<T>) == 0;
}

template <class T>
__device__ __forceinline__ float4 load_four(const T* p, int count) {
  float v[4] = {};
  if (is_four(p, count)) {
    const Four<T> four = *reinterpret_cast<const Four<T>*>(p);
#pragma unroll
    for (int c = 0; c < 4; ++c) v[c] = static_cast<float>(four.v[c]);
  } else {
#pragma unroll
    for (int c = 0; c < 4; ++c) v[c] = c < count ? static_cast<float>(p[c]) : 0.f;
  }
  return make_float4(v[0], v[1], v[2], v[3]);
}

template <class T>
__device__ __forceinline__ void store_four(T* p, const float4& v, int count) {
  if (is_four(p, count)) {
    *reinterpret_cast<Four<T>*>(p) = {
        static_cast<T>(v.x), static_cast<T>(v.y), static_cast<T>(v.z), static_cast<T>(v.w)};
  } else {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if (c < count) p[c] = static_cast<T>(part(v, c));
    }
  }
}

// panel[row][column] = x[row][first + column]
template <class T>
__device__ __forceinline__ void fill(float* panel, const T* x, int n, int d, int first, int quads) {
  for (int at = threadIdx.x; at < round_up(n, 4) * quads; at += kThreads) {
    const int row = at / quads, quad = at % quads, column = first + 4 * quad;
    const float4 v = row < n ? load_four(x + row * d + column, d - column) : float4{};
    *reinterpret_cast<float4*>(panel + row_at(row, quads) + 4 * quad) = v;
  }
}

// Rows i..i+3 by columns j..j+3 of the matrix of pairs. A warp covers 16 by 32. Lanes that differ only in the last
// bit read the same columns, and those that differ only in the bit before it the same rows, which shared memory serves
// at once.
struct Tile {
  int i, j;
  __device__ bool exists(int n) const { return i <= j && j < n; }
};

// This thread's tile t among those that cover the pairs i <= j: warps take turns, 2c + 2 of them in block column c.
__device__ __forceinline__ Tile upper_tile(int t) {
  const int lane = threadIdx.x % 32, index = threadIdx.x / 32 + t * (kThreads / 32);
  int column = 0;
  while ((column + 1) * (column + 2) <= index) ++column;
  const int row = index - column * (column + 1);
  return {16 * row + lane / 16 * 8 + lane % 2 * 4, 32 * column + lane / 2 % 8 * 4};
}

// f(tiles) for the number of upper tiles per thread that hold all pairs of up to n = 64, 128 and 256 particles
constexpr int kMostParticles = 256;

template <class F>
void by_size(int n, F f) {
  if (n <= 64) return f(std::integral_constant<int, 1>{});
  if (n <= 128) return f(std::integral_constant<int, 3>{});
  return f(std::integral_constant<int, 9>{});
}

// d2[4p + q] += Σ_k (x_ik − x_jk)² over the columns of a panel, for rows i + p and j + q
__device__ __forceinline__ void add_distances(float (&d2)[16], const float* x_i, const float* x_j, int quads) {
#pragma unroll 1
  for (int k = 0; k < 4 * quads; k += 4) {
    float4 a[4], b[4];
#pragma unroll
    for (int p = 0; p < 4; ++p) a[p] = vec4(x_i + 4 * quads * p + k), b[p] = vec4(x_j + 4 * quads * p + k);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
#pragma unroll
      for (int pair = 0; pair < 16; ++pair) {
        const float difference = part(a[pair / 4], c) - part(b[pair % 4], c);
        d2[pair] += difference * difference;
      }
    }
  }
}

// The squared distances of the block's upper tiles, panel by panel. load(first) fills `panel` with columns first, …
template <int Tiles, class Load>
__device__ __forceinline__ void distances(
    float (&d2)[Tiles][16], const float* panel, int n, int d, int quads, Load load) {
#pragma unroll
  for (int t = 0; t < Tiles; ++t) {
#pragma unroll
    for (int pair = 0; pair < 16; ++pair) d2[t][pair] = 0.f;
  }
  for (int first = 0; first < d; first += 4 * quads) {
    load(first);
#pragma unroll
    for (int t = 0; t < Tiles; ++t) {
      const Tile tile = upper_tile(t);
      if (tile.exists(n)) add_distances(d2[t], panel + row_at(tile.i, quads), panel + row_at(tile.j, quads), quads);
    }
  }
}

// A batch of particle sets x [..., n, d]
struct Sets {
  std::vector<int64_t> full, rows, batch;  // [..., n, d], [..., n], [...]
  int64_t count = 1;
  int n = 0, d = 0;

  Sets(const char* op, torch::headeronly::IntHeaderOnlyArrayRef sizes, int64_t most_n, int64_t most_d) {
    full.assign(sizes.begin(), sizes.end()), rows.assign(sizes.begin(), sizes.end() - 1);
    batch.assign(sizes.begin(), sizes.end() - 2);
    for (const int64_t size : batch) count *= size;
    const int64_t n_here = rows.back(), d_here = full.back();
    STD_TORCH_CHECK(
        n_here >= 1 && d_here >= 1, op, " takes x [..., n, d] with n, d >= 1, got n = ", n_here, ", d = ", d_here);
    STD_TORCH_CHECK(
        n_here <= most_n && d_here <= most_d, op, " in CUDA C++ takes x [..., n, d] with n <= ", most_n, " and d <= ",
        most_d, ", got n = ", n_here, ", d = ", d_here);
    n = static_cast<int>(n_here), d = static_cast<int>(d_here);
  }
};

}  // namespace ivfast
