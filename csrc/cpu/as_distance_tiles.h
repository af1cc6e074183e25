// Tiles of pairs of diagonal Gaussians: log k, its sum, and the gradients; included once per instruction set.
//
// Per pair and dimension ℓ = −½ (log P + N/P) + constant with P = s, N = δ² (Lebesgue measure), or P = s + l_i l_j,
// N = δ² + u_i² l_j + u_j² l_i (weighted by the prior). Logarithms are to base 2 and leave out the constant.
#pragma once

#include "reciprocal.h"
#include "tiles.h"

namespace ivfast {
namespace IVFAST_ISA {
namespace {

// Rows that share the load of a vector of columns.
constexpr int64_t rows_at_once = IVFAST_VECTOR_BYTES == 64 ? 4 : 2;
constexpr double half_log2_e = 0.72134752044448170;

template <class T>
using Bits = typename Simd<T>::Bits;

// Panels of both sides and the tile's position in them; `diagonal` if both are the same rows.
template <class T>
struct Pairs {
  const T *u_i, *l_i, *u_j, *l_j;
  int64_t d, i, rows, j, cols;
  bool diagonal, unbiased;

  // In a row i the columns from here on count, in whole vectors.
  int64_t first(int64_t row) const { return diagonal ? row / lanes<T> * lanes<T> : 0; }

  // On the diagonal tile a pair counts once, and a sample with itself half or not at all; the sum is twice the result.
  Vec<T> choose(int64_t row, int64_t column, T pair, T self, T none) const {
    Bits<T> at;
    for (int l = 0; l < lanes<T>; ++l) at[l] = l;
    at += typename Simd<T>::Scalar(column);
    const Vec<T> nothing = none - Vec<T>{};
    Vec<T> value = pair - Vec<T>{};
    if (diagonal) {
      const Bits<T> here = Bits<T>{} + typename Simd<T>::Scalar(row);
      value = at > here ? value : at < here ? nothing : (unbiased ? none : self) - Vec<T>{};
    }
    return at < Bits<T>{} + typename Simd<T>::Scalar(cols) ? value : nothing;
  }
};

template <class T>
IVFAST_INLINE T largest(Vec<T> x) {
  T top = x[0];
  for (int l = 1; l < lanes<T>; ++l) top = x[l] > top ? x[l] : top;
  return top;
}

template <class T>
struct Fraction {
  Vec<T> N, P;
};

// a/b + c/d = (ad + cb)/(bd) over `merge` dimensions: one reciprocal for all, and ΠP for the logarithm.
template <int merge, bool prior, class T>
IVFAST_INLINE Fraction<T> fraction(const T* u_i, const T* l_i, const T* u_j, const T* l_j) {
  if constexpr (merge > 1) {
    constexpr int half = merge / 2 * lanes<T>;
    const Fraction<T> a = fraction<merge / 2, prior>(u_i, l_i, u_j, l_j);
    const Fraction<T> b = fraction<merge / 2, prior>(u_i + half, l_i + half, u_j + half, l_j + half);
    return {a.N * b.P + b.N * a.P, a.P * b.P};
  } else {
    const Vec<T> delta = at(u_j) - *u_i, s = at(l_j) + *l_i;
    if constexpr (!prior) return {delta * delta, s};
    return {delta * delta + at(l_j) * *u_i * *u_i + at(u_j) * at(u_j) * *l_i, s + *l_i * at(l_j)};
  }
}

// Σ_d N/P and Π_d P of R rows against a vector of columns; the product as a mantissa in [1, 2) and an exponent.
template <class T, int R>
struct Terms {
  Vec<T> sum[R], product[R];
  Bits<T> exponent[R];
};

// The dimensions [first, last). The product is normalised every `steps` fractions: as many as cannot leave the range.
template <int merge, bool prior, class T, int R>
IVFAST_INLINE void add_terms(Terms<T, R>& terms, const T* u_i, const T* l_i, const T* u_j, const T* l_j,
                             int64_t first, int64_t last, int64_t steps) {
  constexpr int L = lanes<T>, mantissa = Layout<T>::mantissa;
  const auto one = bit_cast<typename Simd<T>::Scalar>(T(1));
  for (int64_t k = first; k < last;) {
    const int64_t stop = k + steps * merge < last ? k + steps * merge : last;
    Vec<T> sum[R] = {};
    for (; k < stop; k += merge)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Fraction<T> f = fraction<merge, prior>(u_i + k * L + r, l_i + k * L + r, u_j + k * L, l_j + k * L);
        sum[r] += f.N * reciprocal(f.P);
        terms.product[r] *= f.P;
      }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Bits<T> bits = bit_cast<Bits<T>>(terms.product[r]), exponent = (bits - one) >> mantissa;
      terms.sum[r] += sum[r];
      terms.exponent[r] += exponent;
      terms.product[r] = bit_cast<Vec<T>>(bits - (exponent << mantissa));
    }
  }
}

// f(Σ_d …, i, j) for each group of rows and vector of columns that count
template <class T, class F>
IVFAST_INLINE void groups(const Pairs<T>& p, const F& f) {
  for (int64_t j = 0; j < p.cols; j += lanes<T>)
    for (int64_t i = 0; i < p.rows && p.first(i) <= j; i += rows_at_once) f(i, j);
}

// log2 k, −∞ for pairs that do not count
template <bool prior, class T>
void log_kernel_tile(T* out, const Pairs<T>& p, int64_t merged_steps) {
  constexpr int R = rows_at_once;
  groups(p, [&](int64_t i, int64_t j) __attribute__((always_inline)) {
    const T *u_i = row(p.u_i, p.i + i, p.d), *l_i = row(p.l_i, p.i + i, p.d);
    const T *u_j = p.u_j + (p.j + j) * p.d, *l_j = p.l_j + (p.j + j) * p.d;
    Terms<T, R> terms;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
      terms.sum[r] = Vec<T>{}, terms.product[r] = T(1) - Vec<T>{}, terms.exponent[r] = Bits<T>{};
    const int64_t merged = merged_steps ? p.d / 4 * 4 : 0;
    add_terms<4, prior>(terms, u_i, l_i, u_j, l_j, 0, merged, merged_steps);
    add_terms<1, prior>(terms, u_i, l_i, u_j, l_j, merged, p.d, 1);
    for (int r = 0; r < R; ++r) {
      const Vec<T> log2_product = log2_normal<Vec<T>, Bits<T>>(terms.product[r], T());
      const Vec<T> exponent = __builtin_convertvector(terms.exponent[r], Vec<T>);
      at(out + (i + r) * tile + j) = T(-0.5) * (exponent + log2_product) - T(half_log2_e) * terms.sum[r] +
                                     p.choose(i + r, j, 0, -1, -__builtin_inff());
    }
  });
}

// Σ_d 2^(−½ log2(e) N/P − top)/√P, 0 for pairs that do not count
template <bool prior, class T>
void additive_tile(T* out, const Pairs<T>& p, T top) {
  constexpr int R = rows_at_once, L = lanes<T>;
  groups(p, [&](int64_t i, int64_t j) __attribute__((always_inline)) {
    const T *u_i = row(p.u_i, p.i + i, p.d), *l_i = row(p.l_i, p.i + i, p.d);
    const T *u_j = p.u_j + (p.j + j) * p.d, *l_j = p.l_j + (p.j + j) * p.d;
    Vec<T> sum[R] = {};
    for (int64_t k = 0; k < p.d; ++k)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Fraction<T> f = fraction<1, prior>(u_i + k * L + r, l_i + k * L + r, u_j + k * L, l_j + k * L);
        const Vec<T> root = reciprocal_root(f.P), t = f.N * (root * root) * T(-half_log2_e) - top;
        sum[r] += root * exp2_nonpositive<Vec<T>, Bits<T>>(t, T());
      }
    for (int r = 0; r < R; ++r) at(out + (i + r) * tile + j) = sum[r] * p.choose(i + r, j, 1, T(0.5), 0);
  });
}

// The largest −½ log2(e) N/P of the pairs that count
template <bool prior, class T>
IVFAST_INLINE T largest_exponent(const Pairs<T>& p) {
  constexpr int L = lanes<T>;
  Vec<T> top = Vec<T>{} - __builtin_inff();
  for (int64_t i = 0; i < p.rows; ++i)
    for (int64_t j = p.first(i); j < p.cols; j += L) {
      const T *u_i = row(p.u_i, p.i + i, p.d), *l_i = row(p.l_i, p.i + i, p.d);
      const T *u_j = p.u_j + (p.j + j) * p.d, *l_j = p.l_j + (p.j + j) * p.d;
      const Vec<T> least = p.choose(i, j, 0, 0, -__builtin_inff());
      for (int64_t k = 0; k < p.d; ++k) {
        const Fraction<T> f = fraction<1, prior>(u_i + k * L, l_i + k * L, u_j + k * L, l_j + k * L);
        const Vec<T> t = f.N * reciprocal(f.P) * T(-half_log2_e) + least;
        top = t > top ? t : top;
      }
    }
  return largest<T>(top);
}

// A sum of exponentials: 2^top · sum.
struct Total {
  double top = -__builtin_inf(), sum = 0;

  void add(double other_top, double other_sum) {
    if (other_sum == 0) return;
    if (other_top > top) sum *= __builtin_exp2(top - other_top), top = other_top;
    sum += other_sum * __builtin_exp2(other_top - top);
  }
};

// Σ f(value) of the pairs that count
template <class T, class F>
IVFAST_INLINE double sum_tile(const T* values, const Pairs<T>& p, const F& f) {
  constexpr int L = lanes<T>;
  double totals[L] = {}, total = 0;
  for (int64_t i = 0; i < p.rows; ++i) {
    Vec<T> sum = {};
    for (int64_t j = p.first(i); j < p.cols; j += L) sum += f(at(values + i * tile + j));
    for (int l = 0; l < L; ++l) totals[l] += double(sum[l]);
  }
  for (int l = 0; l < L; ++l) total += totals[l];
  return total;
}

template <bool additive, bool prior, class T>
IVFAST_INLINE void sum_pairs(Total& total, const Pairs<T>& p, int64_t merged_steps) {
  constexpr int L = lanes<T>;
  alignas(64) T values[tile * tile];
  if constexpr (additive) {
    const auto same = [&](Vec<T> value) __attribute__((always_inline)) { return value; };
    additive_tile<prior>(values, p, T(0));
    double sum = sum_tile(values, p, same), top = 0;
    if (!(sum > 0x1p-60)) {  // the terms may have underflowed
      top = largest_exponent<prior>(p);
      if (top == -__builtin_inf()) return;
      additive_tile<prior>(values, p, T(top));
      sum = sum_tile(values, p, same);
    }
    total.add(top, sum);
  } else {
    log_kernel_tile<prior>(values, p, merged_steps);
    Vec<T> tops = Vec<T>{} - __builtin_inff();
    for (int64_t i = 0; i < p.rows; ++i)
      for (int64_t j = p.first(i); j < p.cols; j += L) {
        const Vec<T> value = at(values + i * tile + j);
        tops = value > tops ? value : tops;
      }
    const T top = largest<T>(tops);
    if (top == -__builtin_inff()) return;
    total.add(top, sum_tile(values, p, [top](Vec<T> value) __attribute__((always_inline)) {
      return exp2_nonpositive<Vec<T>, Bits<T>>(value - top, T());
    }));
  }
}

// The share of each pair in the sum, times `weight`; `alive` tells for each group of rows whether a column has any.
// Additive shares are divided among the dimensions later.
template <bool additive, bool prior, class T>
IVFAST_INLINE void weights_tile(T* values, Bits<T>* alive, const Pairs<T>& p, int64_t merged_steps, T weight,
                                T log2_sum) {
  constexpr int L = lanes<T>;
  if constexpr (!additive) log_kernel_tile<prior>(values, p, merged_steps);
  groups(p, [&](int64_t i, int64_t j) __attribute__((always_inline)) {
    Bits<T> any = {};
    for (int64_t r = i; r < i + rows_at_once; ++r) {
      Vec<T> share = p.choose(r, j, 1, T(0.5), 0);
      if constexpr (!additive)
        share = exp2_nonpositive<Vec<T>, Bits<T>>(at(values + r * tile + j) - log2_sum, T());
      share = r < p.rows ? share * weight : Vec<T>{};
      at(values + r * tile + j) = share;
      any |= share != Vec<T>{};
    }
    alive[(i / rows_at_once * tile + j) / L] = any;
  });
}

// Row-major [n, ld] means, variances and sums: du_i = Σ_j w ∂ℓ/∂u_i, dl_i = Σ_j 2 w ∂ℓ/∂l_i.
template <class T>
struct Rows {
  const T *u, *l;
  T *du, *dl;
};

// Both sides of each pair: ∂ℓ/∂u_i = −t_i and ∂ℓ/∂l_i = ½ (t_i² − c_i/P) with t = δ/P and c = 1 (Lebesgue measure), or
// t_i = (δ + u_i l_j)/P and c_i = 1 + l_j (weighted by the prior); δ changes sign for the other side.
template <bool additive, bool prior, class T>
IVFAST_INLINE void gradient_tile(const T* weights, const Bits<T>* alive_, const Pairs<T>& p, const Rows<T>& a,
                                 const Rows<T>& b, int64_t ld, T exponent) {
  constexpr int L = lanes<T>, R = rows_at_once;
  const auto* alive = reinterpret_cast<const typename Simd<T>::Scalar*>(alive_);
  for (int64_t k = 0; k < p.d; k += L)
    for (int64_t i = 0; i < p.rows; i += R) {
      const int64_t from_i = (p.i + i) * ld + k;
      Vec<T> u_i[R], l_i[R], du_i[R] = {}, dl_i[R] = {};
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) u_i[r] = at(a.u + from_i + r * ld), l_i[r] = at(a.l + from_i + r * ld);
      for (int64_t j = p.first(i); j < p.cols; ++j) {
        if (!alive[i / R * tile + j]) continue;
        const int64_t from_j = (p.j + j) * ld + k;
        const Vec<T> u_j = at(b.u + from_j), l_j = at(b.l + from_j);
        Vec<T> du_j = at(b.du + from_j), dl_j = at(b.dl + from_j);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const Vec<T> delta = u_i[r] - u_j, P = prior ? l_i[r] + l_j + l_i[r] * l_j : l_i[r] + l_j;
          Vec<T> w = weights[(i + r) * tile + j] - Vec<T>{}, y;
          if constexpr (additive) {
            Vec<T> N = delta * delta;
            if constexpr (prior) N += u_i[r] * u_i[r] * l_j + u_j * u_j * l_i[r];
            const Vec<T> root = reciprocal_root(P);
            y = root * root;
            w *= root * exp2_nonpositive<Vec<T>, Bits<T>>(N * y * T(-half_log2_e) - exponent, T());
          } else {
            y = reciprocal(P);
          }
          if constexpr (prior) {
            const Vec<T> t_i = (delta + u_i[r] * l_j) * y, t_j = (u_j * l_i[r] - delta) * y;
            const Vec<T> wt_i = w * t_i, wt_j = w * t_j;  // t² alone may overflow
            du_i[r] -= wt_i, du_j -= wt_j;
            dl_i[r] += wt_i * t_i - w * (y + l_j * y), dl_j += wt_j * t_j - w * (y + l_i[r] * y);
          } else {
            const Vec<T> t = delta * y, wt = w * t, wq = wt * t - w * y;
            du_i[r] -= wt, du_j += wt;
            dl_i[r] += wq, dl_j += wq;
          }
        }
        at(b.du + from_j) = du_j, at(b.dl + from_j) = dl_j;
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) at(a.du + from_i + r * ld) += du_i[r], at(a.dl + from_i + r * ld) += dl_i[r];
    }
}

}  // namespace
}  // namespace IVFAST_ISA
}  // namespace ivfast
