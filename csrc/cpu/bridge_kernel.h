// The blockwise and the radial bridge: t+1 outputs from one read, one sum of t+1 gradients; once per instruction set.
#pragma once

#include "bridge.h"
#include "lanes.h"

namespace ivfast {
namespace IVFAST_ISA {
namespace {

template <class S>
IVFAST_INLINE void copy(S* to, const S* from, int64_t count) {
  char* out = reinterpret_cast<char*>(to);
  const char* in = reinterpret_cast<const char*>(from);
  int64_t bytes = count * int64_t(sizeof(S));
  for (; bytes >= 32; bytes -= 32, in += 32, out += 32) __builtin_memcpy(out, in, 32);
  if (bytes >= 16) __builtin_memcpy(out, in, 16), in += 16, out += 16, bytes -= 16;
  if (bytes >= 8) __builtin_memcpy(out, in, 8), in += 8, out += 8, bytes -= 8;
  if (bytes >= 4) __builtin_memcpy(out, in, 4), in += 4, out += 4, bytes -= 4;
  if (bytes >= 2) __builtin_memcpy(out, in, 2);
}

// Elements that stay in the first-level cache while the t+1 outputs or gradients pass, one after the other: side by
// side, at a distance of a power of two, they would evict each other.
constexpr int64_t piece = 1024;

// T_k z: the first k blocks of d/t dimensions from the draws
template <class S, class T>
void blockwise(const SubstitutionRows& b) {
  const int64_t width = b.d / b.t, group = b.d < piece ? piece / b.d : 1;
  for (int64_t first = b.first; first < b.last; first += group) {
    const int64_t last = first + group < b.last ? first + group : b.last;
    for (int64_t k = 0; k <= b.t; ++k)
      for (int64_t row = first; row < last; ++row) {
        S* const out = static_cast<S*>(b.out) + k * b.stride + row * b.d;
        const int64_t at = row * b.d, replaced = k * width;
        copy(out, static_cast<const S*>(b.draws) + at, replaced);
        copy(out + replaced, static_cast<const S*>(b.z) + at + replaced, b.d - replaced);
      }
  }
}

// ∂z_j = Σ_{k <= j / width} grad_kj
template <class S, class T>
void blockwise_backward(const SubstitutionRows& b) {
  using Bits = typename Simd<T>::Bits;
  const int64_t width = b.d / b.t;
  for (int64_t row = b.first; row < b.last; ++row) {
    const S* const grad = static_cast<const S*>(b.grad) + row * b.d;
    each_part<T>(b.d, [&](int64_t c) __attribute__((always_inline)) {
      Vec<T> sum = load_part<T>(grad, c, b.d);
      for (int64_t k = 1; k < b.t && k * width < c + lanes<T>; ++k) {
        const Vec<T> g = load_part<T>(grad + k * b.stride, c, b.d);
        const auto from = typename Simd<T>::Scalar(k * width - c);  // the first lane that k has left as it was
        sum += from <= 0 ? g : (lane_numbers<T>() < Bits{} + from ? Vec<T>{} : g);
      }
      store_part<T>(static_cast<S*>(b.dz) + row * b.d, sum, c, b.d);
    });
  }
}

// T_k z = cos z + sin ε; both ends are copies
template <class S, class T>
void radial(const SubstitutionRows& b) {
  const int64_t end = b.last * b.d;
  for (int64_t first = b.first * b.d; first < end; first += piece) {
    const int64_t count = end - first < piece ? end - first : piece;
    const S *const z = static_cast<const S*>(b.z) + first, *const draws = static_cast<const S*>(b.draws) + first;
    S* out = static_cast<S*>(b.out) + first;
    copy(out, z, count);
    for (int64_t k = 1; k < b.t; ++k) {
      out += b.stride;
      const T cos = T(b.cos[k]), sin = T(b.sin[k]);
      each_part<T>(count, [&](int64_t c) __attribute__((always_inline)) {
        store_part<T>(out, cos * load_part<T>(z, c, count) + sin * load_part<T>(draws, c, count), c, count);
      });
    }
    copy(out + b.stride, draws, count);
  }
}

// ∂z = Σ_k cos_k grad_k
template <class S, class T>
void radial_backward(const SubstitutionRows& b) {
  const int64_t end = b.last * b.d;
  alignas(64) T sum[piece];
  for (int64_t first = b.first * b.d; first < end; first += piece) {
    const int64_t count = end - first < piece ? end - first : piece;
    const S* grad = static_cast<const S*>(b.grad) + first;
    each_part<T>(count, [&](int64_t c) __attribute__((always_inline)) { at(sum + c) = load_part<T>(grad, c, count); });
    for (int64_t k = 1; k < b.t; ++k) {
      grad += b.stride;
      const T cos = T(b.cos[k]);
      each_part<T>(count, [&](int64_t c) __attribute__((always_inline)) {
        at(sum + c) += cos * load_part<T>(grad, c, count);
      });
    }
    S* const dz = static_cast<S*>(b.dz) + first;
    each_part<T>(count, [&](int64_t c) __attribute__((always_inline)) { store_part<T>(dz, at(sum + c), c, count); });
  }
}

template <class S, class T>
SubstitutionStages substitution_stages_of() {
  return {blockwise<S, T>, blockwise_backward<S, T>, radial<S, T>, radial_backward<S, T>};
}

}  // namespace

SubstitutionStages substitution_stages(Storage storage) {
  return IVFAST_BY_STORAGE(storage, substitution_stages_of);
}

}  // namespace IVFAST_ISA
}  // namespace ivfast
