// Half squared distances in tiles; included once per instruction set.
//
// In float32 u_ij = ‖x_i‖²/2 + ‖x_j‖²/2 − x_i·x_j = ‖x_i − x_j‖²/2 of centred rows. Norms are summed in the same order as
// products: equal rows are at distance exactly 0, and u_ij = u_ji to the last bit. Where that loses too much, operators
// turn to float64, in which squares of differences are summed.
#pragma once

#include <type_traits>

#include "centre.h"
#include "lanes.h"
#include "tiles.h"

namespace ivfast {
namespace IVFAST_ISA {
namespace {

// `load_lanes` in a single load where possible: a vector assembled on the stack stalls until its parts are stored.
template <class T, class S>
IVFAST_INLINE Vec<T> load_row(const S* from, int64_t count, int64_t available) {
  if constexpr (std::is_same_v<S, T>) {
    if (count >= lanes<T>) {
      Vec<T> value;
      __builtin_memcpy(&value, from, sizeof value);
      return value;
    }
  }
  return load_lanes<T>(from, count, available);
}

// The middle of rows [n, d]: in float32 their mean, in float64 their median, which a few far rows do not move. Distances
// do not depend on the centre, only their rounding does, so any centre works.
template <class S, class T>
IVFAST_INLINE void centre(T* out, const S* x, int64_t n, int64_t d) {
  constexpr int L = lanes<T>, chains = 4;
  if constexpr (std::is_same_v<S, double>) return median_of_columns(out, round_up(d, L), x, n, x, 0, d);
  for (int64_t k = 0; k < d; k += L) {
    const int64_t count = d - k < L ? d - k : L;
    const auto sum = [&](T divisor) __attribute__((always_inline)) {
      const auto row = [&](int64_t i) { return load_row<T>(x + i * d + k, count, (n - i) * d - k) / divisor; };
      Vec<T> total[chains] = {};
      int64_t i = 0;
      for (; i + chains <= n; i += chains)
#pragma GCC unroll 4
        for (int c = 0; c < chains; ++c) total[c] += row(i + c);
      for (; i < n; ++i) total[0] += row(i);
      return (total[0] + total[1]) + (total[2] + total[3]);
    };
    at(out + k) = sum(T(1)) / T(n);
    // a sum beyond the range, of numbers within it; otherwise quotients would lose the ties of evenly spaced rows
    if (nan_of<T>(out + k, count) != 0) at(out + k) = sum(T(n));
  }
}

// What a pair of coordinates adds to `half_square`'s sum: x_i x_j in float32, (x_i − x_j)² in float64.
template <class T>
struct Apart {
  template <class A>
  IVFAST_INLINE void add(Vec<T>& sum, A a, Vec<T> b) {
    if constexpr (std::is_same_v<T, double>) {
      const Vec<T> difference = a - b;
      sum += difference * difference;
    } else {
      sum += a * b;
    }
  }
};

// u of that sum and the rows' `half_norms`; not clamped at 0
template <class T, class N>
IVFAST_INLINE Vec<T> half_square(Vec<T> sum, N row, Vec<T> column) {
  if constexpr (std::is_same_v<T, double>) return (row + column) + T(0.5) * sum;
  return (row + column) - sum;
}

// ‖x_i‖²/2 of the rows of one panel; 0 in float64, where u does not need it
template <class T>
IVFAST_INLINE Vec<T> half_norms(const T* panel, int64_t d) {
  Vec<T> norm = {};
  if constexpr (std::is_same_v<T, double>) return norm;
  for (int64_t k = 0; k < d; ++k) norm += at(panel + k * lanes<T>) * at(panel + k * lanes<T>);
  return T(0.5) * norm;
}

// Σ_i ‖x_i − x_0‖²/n
template <class S>
double spread(const S* x, int64_t n, int64_t d) {
  double total = 0;
  for (int64_t e = 0; e < n * d; ++e) {
    const double difference = double(load(x[e])) - double(load(x[e % d]));
    total += difference * difference;
  }
  return total / double(n);
}

// f(u, i, j) for whole groups of rows and whole vectors of columns, i and j counted within the tile
template <class T, class F>
IVFAST_INLINE void half_squares(T* out, const T* panels, const T* half_norms, Range t, int64_t d, const F& f) {
  const T *const rows = half_norms + t.i, *const cols = half_norms + t.j;
  pair_tile_sums<false, Apart<T>>(
      out, panels, panels, t, d, [&](Vec<T> sum, int64_t i, int64_t j) __attribute__((always_inline)) {
        return f(half_square<T>(sum, rows[i], at(cols + j)), i, j);
      });
}

// u; NaN gives 0.
template <class T>
IVFAST_INLINE void distance_tile(T* u, const T* panels, const T* half_norms, int64_t d, Range t) {
  half_squares(u, panels, half_norms, t, d, [&](Vec<T> value, int64_t, int64_t) __attribute__((always_inline)) {
    return value > Vec<T>{} ? value : Vec<T>{};
  });
}

}  // namespace
}  // namespace IVFAST_ISA
}  // namespace ivfast
