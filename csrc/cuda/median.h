// The median heuristic of one particle set, computed by the block that holds its distances.
#pragma once

#include "particles.h"
#include "selection.h"

namespace ivfast {

// h = med²/divisor. The ranks of the two middles among the pairs i < j; -1 is a zero on the full matrix's diagonal.
struct Heuristic {
  int first, second;
  bool squared;
  float divisor;

  // Entry k of the sorted full matrix is 0 for k < n, else entry (k − n)/2 of the sorted pairs.
  Heuristic(int64_t n, bool full, bool squared, double divisor) : squared(squared), divisor(float(divisor)) {
    const int64_t count = full ? n * n : n * (n - 1) / 2, below = n == 1 ? -1 : (count - 1) / 2, above = count / 2;
    const auto rank = [&](int64_t k) { return int(full && k >= 0 ? (k < n ? -1 : (k - n) / 2) : k); };
    first = rank(below), second = n == 1 ? -1 : rank(above);
  }

  __device__ float combine(float2 middles) const {
    const float root = 0.5f * (sqrtf(middles.x) + sqrtf(middles.y));
    return squared ? 0.5f * middles.x + 0.5f * middles.y : root * root;
  }
};

// The bits of each squared distance of a pair i < j, kNone elsewhere in the tiles.
template <int Tiles>
__device__ __forceinline__ void bits_of_pairs(
    unsigned (&bits)[16 * Tiles], const float (&d2)[Tiles][16], int n) {
#pragma unroll
  for (int t = 0; t < Tiles; ++t) {
    const Tile tile = upper_tile(t);
#pragma unroll
    for (int pair = 0; pair < 16; ++pair) {
      const int i = tile.i + pair / 4, j = tile.j + pair % 4;
      bits[16 * t + pair] = i < j && j < n ? __float_as_uint(d2[t][pair]) & 0x7FFFFFFFu : kNone;
    }
  }
}

// The two middle squared distances, returned by every thread.
template <int Count>
__device__ __forceinline__ float2 middles_of(
    const unsigned (&bits)[Count], const Heuristic& heuristic, Selection& selection) {
  if (heuristic.second < 0) return make_float2(0.f, 0.f);
  const float2 found = select(bits, max(heuristic.first, 0), heuristic.second, selection);
  return heuristic.first < 0 ? make_float2(0.f, found.y) : found;
}

// How many pairs i < j are equal; value(row, column) is x. Distances of 0 may be squares that vanish.
template <class F>
__device__ __forceinline__ int equal_pairs(int n, int d, F value) {
  int equal = 0;
  for (int at = threadIdx.x % 32; at < n * n; at += 32) {
    const int i = at / n, j = at % n;
    int column = i < j ? 0 : d + 1;
    while (column < d && value(i, column) == value(j, column)) ++column;
    equal += column == d;
  }
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) equal += __shfl_xor_sync(~0u, equal, lane);
  return equal;
}

// If med² is 0, the mean squared distance from the first particle replaces it; if that is 0 too, h = 1. An h that
// float32 does not hold is 0 or infinite.
template <class F>
__device__ __forceinline__ float bandwidth_of(float2 middles, const Heuristic& heuristic, int n, int d, F value) {
  const float med2 = heuristic.combine(middles);
  if (med2 != 0.f) return med2 / heuristic.divisor;
  if (equal_pairs(n, d, value) <= heuristic.second) return 0.f;
  double sum = 0;
  for (int at = threadIdx.x % 32; at < n * d; at += 32) {
    const double difference = static_cast<double>(value(at / d, at % d)) - value(0, at % d);
    sum += difference * difference;
  }
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) sum += __shfl_xor_sync(~0u, sum, lane);
  return sum == 0 ? 1.f : static_cast<float>(sum / n / heuristic.divisor);
}

}  // namespace ivfast
