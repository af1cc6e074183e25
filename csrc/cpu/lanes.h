// Lanes of a vector: loads, stores, sums, and short rows as one vector per column; included once per instruction set.
#pragma once

#include <type_traits>

#if IVFAST_VECTOR_BYTES > 16
#include <immintrin.h>
#endif

#include "tiles.h"

namespace ivfast {
namespace IVFAST_ISA {
namespace {

// 0, 1, …, lanes − 1
template <class T>
IVFAST_INLINE typename Simd<T>::Bits lane_numbers() {
  typename Simd<T>::Bits lane;
  for (int l = 0; l < lanes<T>; ++l) lane[l] = l;
  return lane;
}

// Σ of the lanes, by halves
template <class T, int step, int... lane>
IVFAST_INLINE Vec<T> fold(Vec<T> v, std::integer_sequence<int, lane...> numbers) {
#if defined(__clang__) || __GNUC__ >= 12
  v += __builtin_shufflevector(v, v, (lane ^ step)...);
#else
  v += __builtin_shuffle(v, typename Simd<T>::Bits{(lane ^ step)...});
#endif
  if constexpr (step > 1) return fold<T, step / 2>(v, numbers);
  return v;
}
template <class T>
IVFAST_INLINE T sum_lanes(Vec<T> v) {
  return fold<T, lanes<T> / 2>(v, std::make_integer_sequence<int, lanes<T>>())[0];
}

// The largest of the lanes; NaN counts only in lane 0
template <class T, int step, int... lane>
IVFAST_INLINE Vec<T> fold_most(Vec<T> v, std::integer_sequence<int, lane...> numbers) {
#if defined(__clang__) || __GNUC__ >= 12
  const Vec<T> other = __builtin_shufflevector(v, v, (lane ^ step)...);
#else
  const Vec<T> other = __builtin_shuffle(v, typename Simd<T>::Bits{(lane ^ step)...});
#endif
  v = v < other ? other : v;
  if constexpr (step > 1) return fold_most<T, step / 2>(v, numbers);
  return v;
}
template <class T>
IVFAST_INLINE T most_lane(Vec<T> v) {
  return fold_most<T, lanes<T> / 2>(v, std::make_integer_sequence<int, lanes<T>>())[0];
}

// Σ of the lanes, in double
template <class T>
IVFAST_INLINE double sum_lanes_double(Vec<T> v) {
  if constexpr (std::is_same_v<T, double>) {
    return sum_lanes<double>(v);
  } else {
    typedef float Half __attribute__((vector_size(IVFAST_VECTOR_BYTES / 2)));
    Half half[2];
    __builtin_memcpy(half, &v, sizeof v);
    return sum_lanes<double>(__builtin_convertvector(half[0], Vec<double>) + __builtin_convertvector(half[1], Vec<double>));
  }
}

// The lanes below `count`; the others are 0
template <class T>
IVFAST_INLINE Vec<T> first_lanes(Vec<T> v, int64_t count) {
  if (count >= lanes<T>) return v;
  return lane_numbers<T>() < typename Simd<T>::Bits{} + typename Simd<T>::Scalar(count) ? v : Vec<T>{};
}

// A vector of row [count] from its element c on, with zeros past the end; and back.
template <class T, class S>
IVFAST_INLINE Vec<T> load_part(const S* row, int64_t c, int64_t count) {
  if (count - c >= lanes<T>) return load_vector(row + c);
  return load_lanes<T>(row + c, count - c < lanes<T> ? count - c : lanes<T>, count - c);
}
template <class T, class S>
IVFAST_INLINE void store_part(S* row, Vec<T> v, int64_t c, int64_t count) {
  if (count - c >= lanes<T>) return store_vector(row + c, v);
  for (int64_t l = 0; l < count - c; ++l) store(row + c + l, T(v[l]));
}

// f(c) for the first element of each vector that covers [0, count)
template <class T, class F>
IVFAST_INLINE void each_part(int64_t count, const F& f) {
  for (int64_t c = 0; c < count; c += lanes<T>) f(c);
}

// 0, or NaN if one of x [count] is NaN or infinite
template <class T, class S>
IVFAST_INLINE T nan_of(const S* x, int64_t count) {
  Vec<T> total = {};
  each_part<T>(count, [&](int64_t c) __attribute__((always_inline)) { total += T(0) * load_part<T>(x, c, count); });
  return sum_lanes<T>(total);
}

// `lanes` short rows [count, width] as `width` columns; lanes beyond `count` repeat the last row.
template <class T, class S>
IVFAST_INLINE void strided_load(Vec<T>* columns, const S* from, int64_t width, int64_t count) {
  constexpr int L = lanes<T>;
#if IVFAST_VECTOR_BYTES > 16
  if constexpr (std::is_same_v<S, float>) {
    typename Simd<T>::Bits row = lane_numbers<T>();
    const auto last = typename Simd<T>::Bits{} + int32_t(count - 1);
    if (count < L) row = row < last ? row : last;
    row *= int32_t(width);
#if IVFAST_VECTOR_BYTES == 64
    for (int64_t c = 0; c < width; ++c) columns[c] = (Vec<T>)_mm512_i32gather_ps((__m512i)row, from + c, 4);
#else
    for (int64_t c = 0; c < width; ++c) columns[c] = (Vec<T>)_mm256_i32gather_ps(from + c, (__m256i)row, 4);
#endif
    return;
  }
#endif
  T* const flat = reinterpret_cast<T*>(columns);
  for (int l = 0; l < L; ++l) {
    const S* const row = from + (l < count ? l : count - 1) * width;
    for (int64_t c = 0; c < width; ++c) flat[c * L + l] = load(row[c]);
  }
}

template <class T, class S>
IVFAST_INLINE void strided_store(S* to, const Vec<T>* columns, int64_t width, int64_t count) {
  constexpr int L = lanes<T>;
#if IVFAST_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<S, float>) {
    if (count == L) {
      const __m512i row = (__m512i)(lane_numbers<T>() * int32_t(width));
      for (int64_t c = 0; c < width; ++c) _mm512_i32scatter_ps(to + c, row, (__m512)columns[c], 4);
      return;
    }
  }
#endif
  const T* const flat = reinterpret_cast<const T*>(columns);
  for (int64_t l = 0; l < count; ++l)
    for (int64_t c = 0; c < width; ++c) store(to + l * width + c, flat[c * L + l]);
}

}  // namespace
}  // namespace IVFAST_ISA
}  // namespace ivfast
