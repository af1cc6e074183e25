// Samples of diagonal Gaussians and their KL to N(0, I); included once per instruction set.
#pragma once

#include "gaussian.h"
#include "lanes.h"

namespace ivfast {
namespace IVFAST_ISA {
namespace {

// e^x − 1 − x from e = e^x: by its series Σ_{k>=2} x^k/k! near 0, where the difference would lose the digits
template <class T>
IVFAST_INLINE Vec<T> expm1_minus(Vec<T> x, Vec<T> e) {
  constexpr double near = sizeof(T) == 4 ? 0.5 : 0.1;  // there the difference is e^x's error over x²/2 off
  Vec<T> series = Vec<T>{} + T(1. / 362880);
  for (const double coefficient : {1. / 40320, 1. / 5040, 1. / 720, 1. / 120, 1. / 24, 1. / 6, 1. / 2}) series = series * x + T(coefficient);
  const Vec<T> zero{}, size = x < zero ? -x : x, bound = zero + T(near);
  return size < bound ? series * x * x : (e - T(1)) - x;
}

template <class T>
IVFAST_INLINE Vec<T> exp_of(Vec<T> x) {
  return exp_any<Vec<T>, typename Simd<T>::Bits>(x, T());
}

// z = μ + e^{logvar/2} ε,  KL = ½ Σ (μ² + e^logvar − 1 − logvar)
template <class S, class T>
void forward(const GaussianRows& g) {
  for (int64_t row = g.first; row < g.last; ++row) {
    const int64_t at_row = row * g.d;
    const S *const mu = static_cast<const S*>(g.mu) + at_row, *const logvar = static_cast<const S*>(g.logvar) + at_row;
    Vec<T> sum{};
    each_part<T>(g.d, [&](int64_t c) __attribute__((always_inline)) {
      const Vec<T> m = load_part<T>(mu, c, g.d), v = load_part<T>(logvar, c, g.d), deviation = exp_of<T>(v * T(0.5));
      if (g.draws) {
        const Vec<T> draw = load_part<T>(static_cast<const S*>(g.draws) + at_row, c, g.d);
        store_part<T>(static_cast<S*>(g.z) + at_row, m + deviation * draw, c, g.d);
      }
      sum += m * m + expm1_minus<T>(v, deviation * deviation);  // 0 in lanes of zeros
    });
    static_cast<T*>(g.kl)[row] = T(0.5) * sum_lanes<T>(sum);
  }
}

// ∂μ = ∂z + ∂kl μ,  ∂logvar = ½ (∂z ε e^{logvar/2} + ∂kl (e^logvar − 1)),  e^x − 1 = (e^x − 1 − x) + x
template <class S, class T>
void backward(const GaussianRows& g) {
  for (int64_t row = g.first; row < g.last; ++row) {
    const int64_t at_row = row * g.d;
    const S *const mu = static_cast<const S*>(g.mu) + at_row, *const logvar = static_cast<const S*>(g.logvar) + at_row;
    const T dkl = g.dkl ? static_cast<const T*>(g.dkl)[row] : T(0);
    each_part<T>(g.d, [&](int64_t c) __attribute__((always_inline)) {
      const Vec<T> v = load_part<T>(logvar, c, g.d), deviation = exp_of<T>(v * T(0.5));
      Vec<T> dmu{}, dlogvar{};
      if (g.dz) {
        const Vec<T> draw = load_part<T>(static_cast<const S*>(g.draws) + at_row, c, g.d);
        dmu = load_part<T>(static_cast<const S*>(g.dz) + at_row, c, g.d);
        dlogvar = dmu * draw * deviation;
      }
      if (g.dkl) {
        dmu += dkl * load_part<T>(mu, c, g.d);
        dlogvar += dkl * (expm1_minus<T>(v, deviation * deviation) + v);
      }
      store_part<T>(static_cast<S*>(g.dmu) + at_row, dmu, c, g.d);
      store_part<T>(static_cast<S*>(g.dlogvar) + at_row, T(0.5) * dlogvar, c, g.d);
    });
  }
}

template <class S, class T>
GaussianStages gaussian_stages_of() {
  return {forward<S, T>, backward<S, T>};
}

}  // namespace

GaussianStages gaussian_stages(Storage storage) {
  return IVFAST_BY_STORAGE(storage, gaussian_stages_of);
}

}  // namespace IVFAST_ISA
}  // namespace ivfast
