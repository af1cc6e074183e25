// Neighbours in memory by accesses of 16 bytes, where they start on such a boundary and all of them exist.
#pragma once

#include "../common.h"
#include "launch.h"

namespace ivfast {

template <class T>
constexpr int kPack = 16 / sizeof(T);

template <class T>
struct alignas(16) Pack {
  T v[kPack<T>];
};

// How many elements x lies past a boundary
template <class T>
__host__ __device__ __forceinline__ int past_boundary(const T* x) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(x) % 16 / sizeof(T));
}

template <class T>
__device__ __forceinline__ bool is_pack(const T* x, int at, int count) {
  return at >= 0 && at + kPack<T> <= count && past_boundary(x + at) == 0;
}

// Elements at, at + 1, … of the `count` of x in float32; `outside` where there is none
template <class T>
__device__ __forceinline__ void load_pack(float (&v)[kPack<T>], const T* x, int at, int count, float outside) {
  if (is_pack(x, at, count)) {
    const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(x + at);
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
    *reinterpret_cast<Pack<T>*>(x + at) = pack;
  } else {
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) {
      if (at + i >= 0 && at + i < count) x[at + i] = static_cast<T>(v[i]);
    }
  }
}

// a / b for a >= 0, b > 0; a division of 64 bits takes five times as long as one of 32
__device__ __forceinline__ int64_t quotient(int64_t a, int64_t b) {
  return (a | b) >> 32 ? a / b : static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace ivfast
