// Reconstruction losses of each sample, Σ over its elements; included once per instruction set.
#pragma once

#include <cfloat>

#include "lanes.h"
#include "reconstruction.h"

namespace ivfast {
namespace IVFAST_ISA {
namespace {

template <class T>
IVFAST_INLINE Vec<T> magnitude(Vec<T> x) {
  return x < Vec<T>{} ? -x : x;
}

// log(1 + u) for 0 <= u <= 1: with w = 1 + u rounded, log w · u/(w − 1) has the error of u's last digit undone
template <class T>
IVFAST_INLINE Vec<T> log1p_unit(Vec<T> u) {
  const Vec<T> w = u + T(1), zero{};
  const Vec<T> log = log2_normal<Vec<T>, typename Simd<T>::Bits>(w, T()) * T(0.6931471805599453) * (u / (w - T(1)));
  return w - T(1) == zero ? u : log;
}

// Infinite logits as the largest number
template <class T>
IVFAST_INLINE Vec<T> finite(Vec<T> x) {
  const Vec<T> most = Vec<T>{} + (sizeof(T) == 4 ? T(FLT_MAX) : T(DBL_MAX));
  x = x > most ? most : x;
  return x < -most ? -most : x;
}

template <class T>
IVFAST_INLINE Vec<T> exp_minus(Vec<T> size) {
  return exp_any<Vec<T>, typename Simd<T>::Bits>(-size, T());
}

template <Reconstruction kind, class T>
IVFAST_INLINE Vec<T> loss_of(Vec<T> x, Vec<T> t) {
  if constexpr (kind == Reconstruction::l2) return (x - t) * (x - t);
  if constexpr (kind == Reconstruction::l1) return magnitude<T>(x - t);
  x = finite<T>(x);
  const Vec<T> zero{};
  return ((x < zero ? zero : x) - x * t) + log1p_unit<T>(exp_minus<T>(magnitude<T>(x)));
}

// ∂loss/∂x
template <Reconstruction kind, class T>
IVFAST_INLINE Vec<T> slope_of(Vec<T> x, Vec<T> t) {
  const Vec<T> zero{}, one = zero + T(1);
  if constexpr (kind == Reconstruction::l2) return T(2) * (x - t);
  if constexpr (kind == Reconstruction::l1) {
    const Vec<T> difference = x - t;
    const Vec<T> sign = difference > zero ? one : difference < zero ? -one : zero;
    return difference == difference ? sign : difference;
  }
  const Vec<T> e = exp_minus<T>(magnitude<T>(x));  // σ(x) = 1/(1 + e^−x) = e^x/(1 + e^x)
  return (x < zero ? e : one) / (one + e) - t;
}

template <Reconstruction kind, class S, class T>
void forward(const ReconstructionRows& r) {
  constexpr int64_t piece = 4096;  // added up in T; their sums in double
  for (int64_t row = r.first; row < r.last; ++row) {
    const S* const x = static_cast<const S*>(r.output) + row * r.size;
    const S* const t = static_cast<const S*>(r.target) + row * r.size;
    double total = 0;
    for (int64_t first = 0; first < r.size; first += piece) {
      const int64_t count = r.size - first < piece ? r.size - first : piece;
      Vec<T> sum{};
      each_part<T>(count, [&](int64_t c) __attribute__((always_inline)) {
        const Vec<T> loss = loss_of<kind, T>(load_part<T>(x + first, c, count), load_part<T>(t + first, c, count));
        sum += first_lanes<T>(loss, count - c);
      });
      total += double(sum_lanes<T>(sum));
    }
    static_cast<T*>(r.loss)[row] = T(total);
  }
}

template <Reconstruction kind, class S, class T>
void backward(const ReconstructionRows& r) {
  for (int64_t row = r.first; row < r.last; ++row) {
    const int64_t at_row = row * r.size;
    const S *const x = static_cast<const S*>(r.output) + at_row, *const t = static_cast<const S*>(r.target) + at_row;
    const T grad = static_cast<const T*>(r.grad)[row];
    each_part<T>(r.size, [&](int64_t c) __attribute__((always_inline)) {
      const Vec<T> x_c = load_part<T>(x, c, r.size), t_c = load_part<T>(t, c, r.size);
      const Vec<T> dx = grad * slope_of<kind, T>(x_c, t_c);
      store_part<T>(static_cast<S*>(r.doutput) + at_row, dx, c, r.size);
      if (r.dtarget) {
        const Vec<T> dt = kind == Reconstruction::bce ? -grad * finite<T>(x_c) : -dx;
        store_part<T>(static_cast<S*>(r.dtarget) + at_row, dt, c, r.size);
      }
    });
  }
}

template <class S, class T>
ReconstructionStages reconstruction_stages_of(Reconstruction kind) {
  constexpr auto l2 = Reconstruction::l2, l1 = Reconstruction::l1, bce = Reconstruction::bce;
  if (kind == l2) return {forward<l2, S, T>, backward<l2, S, T>};
  if (kind == l1) return {forward<l1, S, T>, backward<l1, S, T>};
  return {forward<bce, S, T>, backward<bce, S, T>};
}

}  // namespace

ReconstructionStages reconstruction_stages(Storage storage, Reconstruction kind) {
  return IVFAST_BY_STORAGE(storage, reconstruction_stages_of, kind);
}

}  // namespace IVFAST_ISA
}  // namespace ivfast
