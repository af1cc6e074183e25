// Pairs of blocks of posteriors: their log-sums or gradients; included once per instruction set.
//
// T is the dtype of the arithmetic, S that of the tensors.
#pragma once

#include <cmath>

#include "as_distance.h"
#include "as_distance_tiles.h"

namespace ivfast {
namespace IVFAST_ISA {
namespace {

// The range of the values of a block.
struct Extent {
  double least, largest, mean;  // least and largest l, largest |u|
  bool nan, clamped;
};

template <class T>
struct View {
  int64_t d, ld;
  struct {
    T *u_panels, *l_panels;  // u and l, padded with u = 0, l = 1
    T *u, *l, *du, *dl;      // backward
  } batches[2];
  Extent* extents;            // per block
  Total *within, *between;    // per block, forward
  int64_t bytes;

  View(const Posteriors& q, bool backward) : d(q.d) {
    const int64_t width = round_up(d, lanes<T>);
    ld = width * sizeof(T) % 1024 ? width : width + lanes<T>;  // rows must not map to the same cache set
    char *const base = static_cast<char*>(q.workspace), *next = base;
    const auto take = [&](int64_t count, auto*& pointer) {
      pointer = reinterpret_cast<decltype(+pointer)>(next);
      next += round_up(count * sizeof(*pointer), 64);
    };
    for (int k = 0; k < 2; ++k) {
      const int64_t padded = round_up(q.n[k], lanes<T>);
      auto& x = batches[k];
      take(padded * d, x.u_panels), take(padded * d, x.l_panels);
      if (backward) take(padded * ld, x.u), take(padded * ld, x.l), take(padded * ld, x.du), take(padded * ld, x.dl);
    }
    take(q.blocks(), extents), take(q.blocks(), within), take(q.blocks(), between);
    bytes = next - base;
  }
};

template <class T, bool backward>
int64_t workspace_bytes(const Posteriors& q) {
  return View<T>(q, backward).bytes;
}

struct Block {
  int batch;
  int64_t first, last;  // its rows

  Block(const Posteriors& q, int64_t block) : batch(block >= q.blocks(0)) {
    first = (block - (batch ? q.blocks(0) : 0)) * q.size;
    last = first + q.size < q.n[batch] ? first + q.size : q.n[batch];
  }
};

// Variances are clamped to 2^±120 (in double 2^±995), and under the prior to below 2^60 (2^497), so that no P leaves the
// range of normal numbers. What float clamps is computed again in double; a clamped variance has no gradient.
template <class T>
struct Clamp {
  Vec<T> lowest, highest;

  explicit Clamp(bool prior)
      : lowest(Vec<T>{} - limit), highest(Vec<T>{} + (prior ? limit / 2 : limit)) {}
  static constexpr T limit = T(sizeof(T) == 4 ? 83.1 : 690);
};

template <class T>
IVFAST_INLINE Vec<T> variance(Vec<T> logvar, const Clamp<T>& clamp) {
  logvar = logvar < clamp.lowest ? clamp.lowest : logvar;  // NaN stays NaN
  logvar = logvar > clamp.highest ? clamp.highest : logvar;
  return exp_moderate<Vec<T>, Bits<T>>(logvar, T());
}

template <class S, class T>
void pack(const Posteriors& q, const View<T>& w, int64_t index, bool prior, bool backward) {
  constexpr int L = lanes<T>;
  const Block block(q, index);
  const auto& x = w.batches[block.batch];
  const int64_t d = q.d, n = q.n[block.batch];
  const S *mu = static_cast<const S*>(q.mu[block.batch]), *logvar = static_cast<const S*>(q.logvar[block.batch]);
  Vec<T> least = Vec<T>{} + T(1), most = least, mean = {};
  Bits<T> nan = {}, outside = {};
  const Clamp<T> clamp(prior);
  for (int64_t i = block.first; i < block.last; i += L)
    for (int64_t k = 0; k < d; k += L) {
      const int64_t count = d - k < L ? d - k : L;
      Vec<T> u[L], l[L];
      for (int r = 0; r < L; ++r) {
        const int64_t row = i + r, from = row * d + k, to = row * w.ld + k, available = n * d - from;
        u[r] = Vec<T>{}, l[r] = Vec<T>{} + T(1);
        if (row < n) {
          const Vec<T> log_l = load_lanes<T>(logvar + from, count, available);
          u[r] = load_lanes<T>(mu + from, count, available), l[r] = variance<T>(log_l, clamp);
          outside |= (log_l < clamp.lowest) | (log_l > clamp.highest);
          nan |= (u[r] - u[r] != Vec<T>{}) | (log_l != log_l);
          const Vec<T> size = u[r] < Vec<T>{} ? -u[r] : u[r];
          mean = size > mean ? size : mean;
          least = l[r] < least ? l[r] : least;
          most = l[r] > most ? l[r] : most;
        }
        if (backward)
          at(x.u + to) = u[r], at(x.l + to) = l[r], at(x.du + to) = Vec<T>{}, at(x.dl + to) = Vec<T>{};
      }
      store_panel<T>(x.u_panels + i * d, u, k, count);
      store_panel<T>(x.l_panels + i * d, l, k, count);
    }
  bool any = false, any_outside = false;
  for (int l = 0; l < L; ++l) any |= nan[l] != 0, any_outside |= outside[l] != 0;
  w.extents[index] = {-double(largest<T>(-least)), largest<T>(most), largest<T>(mean), any, any_outside};
  w.within[index] = w.between[index] = Total();
}

// The limits for a pair of blocks.
struct Limits {
  int64_t merged_steps = 0;  // products of four P that stay in range; 0 if fractions must not be merged
  double largest;            // P

  Limits(const Extent& a, const Extent& b, bool prior) {
    const auto denominator = [&](double x, double y) { return x + y + (prior ? x * y : 0); };
    const double least = denominator(a.least, b.least), u = a.mean > b.mean ? a.mean : b.mean;
    largest = denominator(a.largest, b.largest);
    const double N = u * u * (prior ? 4 + a.largest + b.largest : 4);
    const double low = std::log2(least), high = std::log2(largest), power = 4 * (high > -low ? high : -low);
    // 4 N P³ is the largest numerator; numerators that underflow are less than 2^-49 of a fraction
    if (power <= 100 && 2 + std::log2(N + 1) + 3 * (high > 0 ? high : 0) <= 126)
      merged_steps = power > 1 ? int64_t(125 / power) : 125;
  }
};

// log k without its constant, to base 2.
inline double constant(const Posteriors& q, bool additive, bool prior) {
  const double gaussian = -0.5 * (prior ? 2 : 1) * std::log(2 * M_PI);
  return additive ? gaussian - std::log(double(q.d)) : gaussian * double(q.d);
}

template <bool additive, bool prior, bool backward, class T>
IVFAST_INLINE void pair_blocks(const Posteriors& q, int64_t index, int64_t other) {
  const View<T> w(q, backward);
  if (Block(q, index).batch > Block(q, other).batch) {
    const int64_t swapped = index;
    index = other, other = swapped;
  }
  const Block rows(q, index), cols(q, other);
  const bool within = rows.batch == cols.batch;
  const int which = within ? rows.batch : 2;
  const auto &x = w.batches[rows.batch], &y = w.batches[cols.batch];
  const Limits limits(w.extents[index], w.extents[other], prior);
  Total& total = (within ? w.within : w.between)[index];

  double log2_sum = 0, weight = 0, offset = 0;
  if constexpr (backward) {
    log2_sum = (q.log_sum[which] - constant(q, additive, prior)) * M_LOG2E;
    weight = q.grad[which] * (within ? 2 : 1);
    if (weight == 0) return;
    if (!std::isfinite(log2_sum)) weight = std::nan("");
    if (additive) offset = 0.5 * std::log2(limits.largest) + 1, weight *= std::exp2(offset);  // exponents below 0
    weight *= std::exp2(double(T(log2_sum + offset)) - (log2_sum + offset));  // normalises the shares
  } else if (w.extents[index].nan || w.extents[other].nan) {
    return total.add(0, std::nan(""));
  }
  for (int64_t i = rows.first; i < rows.last; i += tile)
    for (int64_t j = index == other ? i : cols.first; j < cols.last; j += tile) {
      const auto size = [](int64_t from, int64_t last) { return last - from < tile ? last - from : tile; };
      const Pairs<T> pairs{x.u_panels, x.l_panels,           y.u_panels, y.l_panels,           q.d,         i,
                           size(i, rows.last), j, size(j, cols.last), within && i == j, q.unbiased};
      if constexpr (backward) {
        alignas(64) T weights[tile * tile];
        Bits<T> alive[tile * tile / rows_at_once / lanes<T>];
        weights_tile<additive, prior>(weights, alive, pairs, limits.merged_steps, T(weight), T(log2_sum));
        gradient_tile<additive, prior>(weights, alive, pairs, Rows<T>{x.u, x.l, x.du, x.dl},
                                       Rows<T>{y.u, y.l, y.du, y.dl}, w.ld, T(log2_sum + offset));
      } else {
        sum_pairs<additive, prior>(total, pairs, limits.merged_steps);
      }
    }
}

template <class T, bool additive, bool prior, bool backward>
void pair(const Posteriors& q, int64_t block, int64_t other) {
  pair_blocks<additive, prior, backward, T>(q, block, other);
}

template <class S, class T, bool additive, bool prior, bool backward>
void begin(const Posteriors& q, int64_t block) {
  pack<S, T>(q, View<T>(q, backward), block, prior, backward);
  pair<T, additive, prior, backward>(q, block, block);
}

// ∂L/∂ log l_i = l_i ∂L/∂l_i
template <class S, class T, bool prior>
void finish(const Posteriors& q, int64_t index) {
  const View<T> w(q, true);
  const Block block(q, index);
  const auto& x = w.batches[block.batch];
  const Clamp<T> clamp(prior);
  const S* const logvar = static_cast<const S*>(q.logvar[block.batch]);
  const auto is_clamped = [&](T log_l) { return log_l < clamp.lowest[0] || log_l > clamp.highest[0]; };
  for (int64_t i = block.first; i < block.last; ++i) {
    S* dmu = static_cast<S*>(q.dmu[block.batch]) + i * q.d;
    S* dlogvar = static_cast<S*>(q.dlogvar[block.batch]) + i * q.d;
    const T *l = x.l + i * w.ld, *du = x.du + i * w.ld, *dl = x.dl + i * w.ld;
    for (int64_t k = 0; k < q.d; ++k) {
      store(dmu + k, du[k]);
      store(dlogvar + k, is_clamped(load(logvar[i * q.d + k])) ? T(0) : T(0.5) * l[k] * dl[k]);
    }
  }
}

template <class T, bool additive, bool prior>
void collect(Posteriors& q) {
  const View<T> w(q, false);
  Total sums[3];
  for (int64_t index = 0; index < q.blocks(); ++index) {
    const Total &within = w.within[index], &between = w.between[index];
    sums[Block(q, index).batch].add(within.top, within.sum);
    sums[2].add(between.top, between.sum);
  }
  for (int k = 0; k < 3; ++k) {
    const double log2_sum = sums[k].top + std::log2(sums[k].sum) + (k < 2);  // within a batch each pair occurs twice
    q.log_sum[k] = log2_sum / M_LOG2E + constant(q, additive, prior);
  }
}

template <class T, bool backward>
bool clamped(const Posteriors& q) {
  const View<T> w(q, backward);
  bool any = false;
  for (int64_t index = 0; index < q.blocks(); ++index) any |= w.extents[index].clamped;
  return any;
}

template <class S, class T, bool additive, bool prior>
AsDistanceStages stages_of(bool backward) {
  if (backward)
    return {workspace_bytes<T, true>, begin<S, T, additive, prior, true>, pair<T, additive, prior, true>,
            finish<S, T, prior>, nullptr, clamped<T, true>};
  return {workspace_bytes<T, false>, begin<S, T, additive, prior, false>, pair<T, additive, prior, false>, nullptr,
          collect<T, additive, prior>, clamped<T, false>};
}

template <class S, class T>
AsDistanceStages stages_of(const AsDistanceForm& form) {
  if (form.additive)
    return form.prior ? stages_of<S, T, true, true>(form.backward) : stages_of<S, T, true, false>(form.backward);
  return form.prior ? stages_of<S, T, false, true>(form.backward) : stages_of<S, T, false, false>(form.backward);
}

}  // namespace

AsDistanceStages as_distance_stages(Storage storage, AsDistanceForm form) {
  return IVFAST_BY_STORAGE(storage, stages_of, form);
}

}  // namespace IVFAST_ISA
}  // namespace ivfast
