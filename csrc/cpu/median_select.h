// Order statistics of keys by bisection of their bits; included once per instruction set.
//
// A pass over the keys counts those up to the middle of the range that holds the answer. Once few are left in the
// range, they are moved together. No step depends on the order of the keys, and ties cost nothing.
#pragma once

#if IVFAST_VECTOR_BYTES > 16
#include <immintrin.h>
#endif

#include <type_traits>

#include "median.h"
#include "tiles.h"

namespace ivfast {
namespace IVFAST_ISA {
namespace {

template <class T>
using Bits = typename Simd<T>::Bits;
template <class T>
using Integer = typename Simd<T>::Scalar;

template <class T>
constexpr Integer<T> infinity = sizeof(T) == 4 ? Integer<T>(0x7f800000) : Integer<T>(0x7ff0000000000000);
// The padding of a vector: above every key.
template <class T>
constexpr Integer<T> padding = sizeof(T) == 4 ? Integer<T>(0x7fffffff) : Integer<T>(0x7fffffffffffffff);

template <class T>
IVFAST_INLINE Bits<T> unaligned(const T* p) {
  Bits<T> bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return bits;
}

template <class T>
IVFAST_INLINE int64_t sum(Bits<T> x) {
  int64_t total = 0;
  for (int l = 0; l < lanes<T>; ++l) total += x[l];
  return total;
}

template <class T>
IVFAST_INLINE void pad(T* behind) {
  for (int l = 0; l < lanes<T>; ++l) behind[l] = bit_cast<T>(padding<T>);
}

// Appends the lanes of `value` whose `inside` is −1, and up to a vector of garbage after them.
template <class T>
IVFAST_INLINE T* append(T* out, Bits<T> value, Bits<T> inside) {
#if IVFAST_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    const __mmask16 mask = _mm512_movepi32_mask(__m512i(inside));
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(mask, __m512i(value)));
    return out + __builtin_popcount(mask);
  } else {
    const __mmask8 mask = _mm512_movepi64_mask(__m512i(inside));
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi64(mask, __m512i(value)));
    return out + __builtin_popcount(mask);
  }
#else
#if IVFAST_VECTOR_BYTES == 32
  if (_mm256_testz_si256(__m256i(inside), __m256i(inside))) return out;
#endif
  const Vec<T> values = bit_cast<Vec<T>>(value);
  for (int l = 0; l < lanes<T>; ++l) {
    *out = values[l];
    out -= inside[l];
  }
  return out;
#endif
}

// The number of keys up to `bound`, in whole vectors.
template <class T>
IVFAST_INLINE int64_t count_upto(const T* values, int64_t count, Integer<T> bound) {
  constexpr int L = lanes<T>, chains = 4;
  const Bits<T> bounds = Bits<T>{} + bound;
  Bits<T> upto[chains] = {};
  int64_t i = 0;
  for (; i + chains * L <= count; i += chains * L)
#pragma GCC unroll 4
    for (int c = 0; c < chains; ++c) upto[c] -= unaligned(values + i + c * L) <= bounds;
  for (; i < count; i += L) upto[0] -= unaligned(values + i) <= bounds;
  return sum<T>((upto[0] + upto[1]) + (upto[2] + upto[3]));
}

template <class T>
struct Ends {
  Integer<T> least, greatest;
};

// −1 for low <= key <= high
template <class T>
IVFAST_INLINE Bits<T> in_range(Bits<T> key, Integer<T> low, Integer<T> high) {
  using Unsigned = std::make_unsigned_t<Integer<T>>;
  typedef Unsigned Vector __attribute__((vector_size(IVFAST_VECTOR_BYTES)));
  return Bits<T>(Vector(key - low) <= Vector{} + Unsigned(high - low));
}

// The smallest and the largest key in [low, high], which holds at least one.
template <class T>
IVFAST_INLINE Ends<T> ends(const T* values, int64_t count, Integer<T> low, Integer<T> high) {
  constexpr int L = lanes<T>;
  const Bits<T> lows = Bits<T>{} + low, highs = Bits<T>{} + high;
  Bits<T> least = highs, greatest = lows;
  for (int64_t i = 0; i < count; i += L) {
    const Bits<T> key = unaligned(values + i);
    const Bits<T> up = key >= lows ? key : highs, down = key <= highs ? key : lows;
    least = up < least ? up : least;
    greatest = down > greatest ? down : greatest;
  }
  Ends<T> result{high, low};
  for (int l = 0; l < L; ++l) {
    result.least = least[l] < result.least ? least[l] : result.least;
    result.greatest = greatest[l] > result.greatest ? greatest[l] : result.greatest;
  }
  return result;
}

// The key at `rank` (from 0) of `count` values and the next one. Padding fills the last vector; the next of the last is
// infinite. `scratch` holds count/3 + 64.
template <class T>
IVFAST_INLINE std::pair<Key, Key> select(const T* all, int64_t count, int64_t rank, T* scratch) {
  constexpr int L = lanes<T>;
  const int64_t all_count = count;
  const T* values = all;
  auto [low, high] = ends(values, count, Integer<T>(0), infinity<T>);
  // `rank` is that of the answer among the values; `below` counts those below `low`, `within` those in [low, high]
  for (int64_t below = 0, within = count; low < high && within > 1;) {
    const Integer<T> middle = low + (high - low) / 2;
    const int64_t upto = count_upto(values, count, middle);
    const bool lower = upto > rank;  // a branch would be mispredicted half of the time
    within = lower ? upto - below : within - (upto - below), below = lower ? below : upto;
    high = lower ? middle : high, low = lower ? low : middle + 1;
    if (count <= 4 * L || within > count / 3) continue;
    T* out = scratch;
    for (int64_t i = 0; i < count; i += L) {
      const Bits<T> key = unaligned(values + i);
      out = append<T>(out, key, in_range<T>(key, low, high));
    }
    pad(out);
    values = scratch, count = out - scratch, rank -= below, below = 0;
  }
  const Integer<T> key = ends(values, count, low, infinity<T>).least;
  if (count_upto(values, count, key) > rank + 1) return {key, key};
  Integer<T> next = ends(values, count, Integer<T>(key + 1), infinity<T>).least;
  if (next == infinity<T>) next = ends(all, all_count, Integer<T>(key + 1), infinity<T>).least;
  return {key, next};
}

}  // namespace
}  // namespace IVFAST_ISA
}  // namespace ivfast
