// The multi-class Jensen–Shannon loss of rows of logits; included once per instruction set.
//
// Few classes: each lane of a vector holds a logit of a different row. Many classes: a vector holds logits of one row.
#pragma once

#include <cmath>
#include <type_traits>

#include "lanes.h"
#include "multi_js.h"

namespace ivfast {
namespace IVFAST_ISA {
namespace {

constexpr int64_t few_classes = 32;

// e^x for x <= 0, NaN for NaN
template <class T>
IVFAST_INLINE Vec<T> exp_nonpositive(Vec<T> x) {
  const Vec<T> e = exp2_nonpositive<Vec<T>, typename Simd<T>::Bits>(x * T(1.4426950408889634), T());
  return x == x ? e : x;
}

// One set's constants. Row r adds unit π_c (lse − own x_rc − even Σ_c x_rc).
template <class T>
struct Target {
  T own, even;
  double unit;
  const T* weights;

  explicit Target(const MultiJsRows& rows)
      : own(T(1 - rows.smoothing)),
        even(T(rows.smoothing / double(rows.classes))),
        unit(1 / (double(rows.n) * (rows.weights ? 1. : double(rows.classes)))),
        weights(static_cast<const T*>(rows.weights)) {}
  double weight(int64_t c) const { return weights ? unit * double(weights[c]) : unit; }
};

// Up to `lanes` rows of one class, with few classes. Adds lse − target to `loss` in as many lanes.
template <bool forward, bool backward, int known, class S, class T>
IVFAST_INLINE void lanes_of_rows(
    const MultiJsRows& rows, const Target<T>& target, int64_t label, T scale, int64_t row, int64_t count, Vec<T>& loss) {
  const int64_t classes = known ? known : rows.classes;
  Vec<T> x[known ? known : few_classes];
  strided_load<T>(x, static_cast<const S*>(rows.logits) + row * classes, classes, count);
  T* const lse_at = rows.lse ? static_cast<T*>(rows.lse) + row : nullptr;

  Vec<T> most = x[0], sum{}, aim{};
  if constexpr (forward) {
    for (int64_t c = 1; c < classes; ++c) most = most < x[c] ? x[c] : most;
    const Vec<T> shift = most - most == Vec<T>{} ? most : Vec<T>{};  // Σ target (x − shift) keeps what an offset loses
    if (target.even != 0)
      for (int64_t c = 0; c < classes; ++c) aim += target.even * (x[c] - shift);
    if (target.own != 0) aim += target.own * (x[label] - shift);
  } else {
    most = load_part<T>(lse_at, 0, count);  // as good as the maximum, because the shares are normalised
  }
  for (int64_t c = 0; c < classes; ++c) {
    const Vec<T> e = exp_nonpositive<T>(x[c] - most);
    sum += e;
    if constexpr (backward) x[c] = e;
  }
  if constexpr (forward) {
    const Vec<T> log_sum = log2_normal<Vec<T>, typename Simd<T>::Bits>(sum, T()) * T(0.6931471805599453);
    const Vec<T> infinite = Vec<T>{} + T(INFINITY), special = most < infinite ? sum : most;
    // inf − inf is NaN, but its log-sum-exp is inf
    if (lse_at) store_part<T>(lse_at, sum == sum ? most + log_sum : special, 0, count);
    loss += first_lanes<T>((sum == sum ? log_sum : special) - aim, count);
  }

  if constexpr (backward) {
    const Vec<T> factor = T(1) / sum;
    for (int64_t c = 0; c < classes; ++c) x[c] = (x[c] * factor - target.even) * scale;
    x[label] -= target.own * scale;
    strided_store<T>(static_cast<S*>(rows.gradient) + row * classes, x, classes, count);
  }
}

// One row of many classes. `scratch` holds it in the dtype of the arithmetic if the storage type differs.
template <bool forward, bool backward, class S, class T>
IVFAST_INLINE double row_of_classes(const MultiJsRows& rows, const Target<T>& target, int64_t row, T* scratch) {
  constexpr int L = lanes<T>;
  const int64_t classes = rows.classes, whole = classes / L * L, label = (rows.first + row) / rows.n;
  const S* const from = static_cast<const S*>(rows.logits) + row * classes;
  const double weight = target.weight(label);
  const T* x;
  if constexpr (std::is_same_v<S, T>) {
    x = from;
  } else {
    each_part<T>(classes, [&](int64_t c) { store_part<T>(scratch, load_part<T>(from, c, classes), c, classes); });
    x = scratch;
  }
  const T own = x[label];
  Vec<T> tail = Vec<T>{} - T(INFINITY);
  for (int64_t c = whole; c < classes; ++c) tail[c - whole] = x[c];
  const auto loaded = [&](int64_t c) __attribute__((always_inline)) { return load_vector(x + c); };

  // four sums, so that each lane adds only about a thousandth of 65,536 terms
  const auto sum_of_exp = [&](T shift) __attribute__((always_inline)) {
    Vec<T> sums[4] = {exp_nonpositive<T>(tail - shift)};
    int64_t c = 0;
    for (; c + 4 * L <= whole; c += 4 * L)
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) sums[v] += exp_nonpositive<T>(loaded(c + v * L) - shift);
    for (; c < whole; c += L) sums[0] += exp_nonpositive<T>(loaded(c) - shift);
    double sum = 0;
    for (const Vec<T>& part : sums) sum += sum_lanes_double<T>(part);
    return sum;
  };

  double loss = 0, sum;
  T shift;  // the maximum, or the log-sum-exp: as good, because the shares are normalised
  if constexpr (forward) {
    Vec<T> tops[4] = {tail, tail, tail, tail};
    int64_t c = 0;
    for (; c + 4 * L <= whole; c += 4 * L)
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) tops[v] = tops[v] < loaded(c + v * L) ? loaded(c + v * L) : tops[v];
    for (; c < whole; c += L) tops[0] = tops[0] < loaded(c) ? loaded(c) : tops[0];
    for (int v = 1; v < 4; ++v) tops[0] = tops[0] < tops[v] ? tops[v] : tops[0];
    shift = most_lane<T>(tops[0]);
    sum = sum_of_exp(shift);
    const double base = shift - shift == 0 ? shift : 0;  // what a large offset would round off cancels
    const double log_sum = shift == T(INFINITY) ? double(shift) : double(shift) - base + std::log(sum);
    if (rows.lse) static_cast<T*>(rows.lse)[row] = T(base + log_sum);
    double aim = target.own != 0 ? double(target.own) * (double(own) - base) : 0;
    if (target.even != 0) {
      double all = 0;
      for (int64_t k = 0; k < classes; ++k) all += double(x[k]) - base;
      aim += double(target.even) * all;
    }
    loss = weight * (log_sum - aim);
  } else {
    shift = static_cast<const T*>(rows.lse)[row];
    sum = sum_of_exp(shift);
  }

  if constexpr (backward) {
    S* const to = static_cast<S*>(rows.gradient) + row * classes;
    const T scale = T(weight * rows.scale), factor = T(1 / sum);
    T* const out = std::is_same_v<S, T> ? reinterpret_cast<T*>(to) : scratch;
    for (int64_t c = 0; c < whole; c += L) {
      store_vector(out + c, (exp_nonpositive<T>(loaded(c) - shift) * factor - target.even) * scale);
    }
    tail = (exp_nonpositive<T>(tail - shift) * factor - target.even) * scale;
    for (int64_t c = whole; c < classes; ++c) out[c] = tail[c - whole];
    out[label] -= target.own * scale;
    if constexpr (!std::is_same_v<S, T>)
      each_part<T>(classes, [&](int64_t c) { store_part<T>(to, load_part<T>(scratch, c, classes), c, classes); });
  }
  return loss;
}

// `known` classes, or rows.classes if that is 0
template <bool forward, bool backward, int known, class S, class T>
double run_few(const MultiJsRows& rows) {
  const Target<T> target(rows);
  double sums[lanes<T>] = {};
  int64_t label = rows.first / rows.n;
  for (int64_t row = rows.first; row < rows.last; ++label) {  // the rows of one class
    const double weight = target.weight(label);
    const int64_t end = (label + 1) * rows.n < rows.last ? (label + 1) * rows.n : rows.last;
    while (row < end) {
      Vec<T> part{};  // over few rows; the long sum is in double
      for (int group = 0; group < 16 && row < end; ++group, row += lanes<T>) {
        const int64_t count = end - row < lanes<T> ? end - row : lanes<T>;
        lanes_of_rows<forward, backward, known, S, T>(rows, target, label, T(weight * rows.scale), row - rows.first, count, part);
      }
      if constexpr (forward)
        for (int l = 0; l < lanes<T>; ++l) sums[l] += weight * double(part[l]);
    }
    row = end;
  }
  double loss = 0;
  for (double sum : sums) loss += sum;
  return loss;
}

template <bool forward, bool backward, class S, class T>
double run(const MultiJsRows& rows) {
  if (rows.classes == 5) return run_few<forward, backward, 5, S, T>(rows);  // t = 4, as in the papers
  if (rows.classes <= few_classes) return run_few<forward, backward, 0, S, T>(rows);
  const Target<T> target(rows);
  T* const scratch = static_cast<T*>(rows.scratch);
  double loss = 0;
  for (int64_t row = 0; row < rows.last - rows.first; ++row) {
    loss += row_of_classes<forward, backward, S, T>(rows, target, row, scratch);
  }
  return loss;
}

template <class S, class T>
MultiJsStages stages_of() {
  return {run<true, false, S, T>, [](const MultiJsRows& rows) { run<false, true, S, T>(rows); }, run<true, true, S, T>};
}

}  // namespace

MultiJsStages multi_js_stages(Storage storage) {
  return IVFAST_BY_STORAGE(storage, stages_of);
}

}  // namespace IVFAST_ISA
}  // namespace ivfast
