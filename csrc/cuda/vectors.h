// Neighbours in memory by 16-byte accesses, if they start on a 16-byte boundary and all of them exist.
#pragma once

#include "launch.h"

#include <cstring>
#include <initializer_list>
#include <type_traits>
#include <vector>

namespace ivfast {

template <class T>
constexpr int kPack = 16 / sizeof(T);

template <class T, int Width>
struct alignas(Width * sizeof(T)) Elements {
  T v[Width];

  static __device__ __forceinline__ Elements from(const T* x) { return *reinterpret_cast<const Elements*>(x); }
  __device__ __forceinline__ void to(T* x) const {
    if constexpr (sizeof(Elements) == sizeof(uint4)) {
      uint4 bits;  // a separate instruction, because nvcc may store a struct selected from two others in pieces
      memcpy(&bits, v, sizeof(bits));
      __stcg(reinterpret_cast<uint4*>(x), bits);
    } else {
      *reinterpret_cast<Elements*>(x) = *this;
    }
  }
};

template <class T>
using Pack = Elements<T, kPack<T>>;

// How many elements x lies past a boundary
template <class T>
__host__ __device__ __forceinline__ int past_boundary(const T* x) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(x) % 16 / sizeof(T));
}

template <class T>
__device__ __forceinline__ bool is_pack(const T* x, int at, int count) {
  return at >= 0 && at + kPack<T> <= count && past_boundary(x + at) == 0;
}

// Elements at, at + 1, … of the `count` elements of x in float32; `outside` if there is none
template <class T>
__device__ __forceinline__ void load_pack(float (&v)[kPack<T>], const T* x, int at, int count, float outside) {
  if (is_pack(x, at, count)) {
    const auto pack = Pack<T>::from(x + at);
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) v[i] = static_cast<float>(pack.v[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) v[i] = at + i >= 0 && at + i < count ? static_cast<float>(x[at + i]) : outside;
  }
}

template <class T>
__device__ __forceinline__ void store_pack(T* x, const float (&v)[kPack<T>], int at, int count) {
  if (is_pack(x, at, count)) {
    Pack<T> pack;
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) pack.v[i] = static_cast<T>(v[i]);
    pack.to(x + at);
  } else {
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) {
      if (at + i >= 0 && at + i < count) x[at + i] = static_cast<T>(v[i]);
    }
  }
}

// a / b for a >= 0, b > 0; a 64-bit division takes five times as long as a 32-bit one
__device__ __forceinline__ int64_t quotient(int64_t a, int64_t b) {
  return (a | b) >> 32 ? a / b : static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// f(T{}, Width): with packs if they divide runs of `run` elements and all arrays start on a boundary, otherwise with
// one element at a time; not called if there is no work
template <class F>
void by_width(
    const char* op, const Tensor& x, int64_t work, int64_t run, std::initializer_list<const void*> arrays, F f) {
  by_dtype(op, x, [&](auto zero) {
    constexpr int pack = kPack<decltype(zero)>;
    bool whole = run % pack == 0;
    for (const void* array : arrays) whole = whole && past_boundary(static_cast<const char*>(array)) == 0;
    if (work == 0) return;
    if (whole) f(zero, std::integral_constant<int, pack>{});
    else f(zero, std::integral_constant<int, 1>{});
  });
}

inline int as_int(const char* op, const char* what, int64_t value) {
  STD_TORCH_CHECK(value >= 0 && value < INT32_MAX, op, " takes ", what, " < 2^31 - 1, got ", value);
  return static_cast<int>(value);
}

inline std::vector<int64_t> sizes_of(const Tensor& x) {
  const auto sizes = x.sizes();
  return {sizes.begin(), sizes.end()};
}

}  // namespace ivfast
