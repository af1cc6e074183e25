// The stages of the SVGD direction and of its gradient; included once per instruction set.
//
// t_ij = x_i·x_j − ‖x_i‖²/2 − ‖x_j‖²/2 = −‖x_i − x_j‖²/2 and k_ij = 2^(t_ij · 2 log2(e)/h).
// K' = K − I, r' = K'1: a particle's own term is added separately and exactly, however narrow the kernel. With X
// centred, V = αS − βX, γα = 1 and γβ = 2/h,
//   φ_i = (1/n) [s_i + γ (K'V + β r'∘X)_i].
// Backward, with B_ij = k'_ij (g_i·v_j + v_i·g_j + β g_i·x_i + β g_j·x_j), D = (γ/n) [(B1)∘X − BX] and
// E = (1/n) [r'∘G − K'G],
//   ∂S = (1/n) (G + K'G),   ∂X = −(2/h) (D − E),   ∂h = ⟨X, D − 2E⟩/h².
#pragma once

#include "median_distances.h"
#include "svgd.h"
#include "tiles.h"

namespace ivfast {
namespace IVFAST_ISA {
namespace {

// The scalars and the workspace of one particle set. Matrices are rows [padded n, ld] or panels [padded n, d].
template <class T>
struct View {
  int64_t n, d, width, ld, padded, edge;
  T alpha, beta, gamma, two_over_h, exponent;
  T *mean, *half_norms, *r, *b, *p;            // r = r', b = B1, p_i = β g_i·x_i
  T *x_panels, *v_panels, *g_panels;
  T *v, *kv;                                   // forward: V and K'V
  T *x, *g, *bx, *kg;                          // backward: X, G, BX and K'G
  double* dh;                                  // a partial sum per 32 rows
  int64_t bytes;

  View(const SvgdSet& set, bool backward) : n(set.n), d(set.d) {
    const double largest = sizeof(T) == 4 ? 3.4028234e38 : 1.7976931348623157e308, h = set.h;
    const auto finite = [&](double value) { return T(value < largest ? value : largest); };
    two_over_h = finite(2 / h);
    exponent = finite(2 * 1.4426950408889634 / h);
    const bool wide = h >= 1;  // neither factor overflows
    alpha = wide ? T(1) : T(h / 2), beta = wide ? two_over_h : T(1), gamma = wide ? T(1) : two_over_h;

    width = round_up(d, lanes<T>), padded = round_up(n, lanes<T>), edge = svgd_tile(n);
    ld = width * sizeof(T) % 1024 ? width : width + lanes<T>;  // rows must not map to the same cache set
    char *const base = static_cast<char*>(set.workspace), *next = base;
    const auto take = [&](int64_t count, auto*& pointer) {
      pointer = reinterpret_cast<decltype(+pointer)>(next);
      next += round_up(count * sizeof(*pointer), 64);
    };
    take(width, mean), take(padded, half_norms), take(padded, r), take(padded * d, x_panels);
    if (backward) {
      take(padded, b), take(padded, p), take(padded * d, v_panels), take(padded * d, g_panels);
      take(padded * ld, x), take(padded * ld, g), take(padded * ld, bx), take(padded * ld, kg);
      take(padded / 32 + 1, dh);
    } else {
      take(padded * ld, v), take(padded * ld, kv);
    }
    bytes = next - base;
  }
};

template <class T, bool backward>
int64_t workspace_bytes(int64_t n, int64_t d) {
  SvgdSet set{};
  set.n = n, set.d = d, set.h = 1;
  return View<T>(set, backward).bytes;
}

// Any centre works: the kernel does not depend on it, only its rounding does.
template <class S, class T>
void set_mean(const SvgdSet& set, const View<T>& w) {
  constexpr int L = lanes<T>, chains = 4;
  for (int64_t k = 0; k < w.width; k += L) {
    const S* x = static_cast<const S*>(set.x) + k;
    const int64_t count = w.d - k < L ? w.d - k : L;
    Vec<T> sum[chains] = {};
    int64_t i = 0;
    for (; i + chains <= w.n; i += chains)
#pragma GCC unroll 4
      for (int c = 0; c < chains; ++c) sum[c] += load_lanes<T>(x + (i + c) * w.d, count, (w.n - i - c) * w.d - k);
    for (; i < w.n; ++i) sum[0] += load_lanes<T>(x + i * w.d, count, (w.n - i) * w.d - k);
    at(w.mean + k) = ((sum[0] + sum[1]) + (sum[2] + sum[3])) / T(w.n);
  }
}

template <class S, class T, bool backward>
void centre(const SvgdSet& set) {
  set_mean<S, T>(set, View<T>(set, backward));
}

// Converts, centres and pads the rows [first, last), both multiples of lanes.
template <class S, class T>
void pack(const SvgdSet& set, const View<T>& w, int64_t first, int64_t last, bool backward) {
  constexpr int L = lanes<T>;
  const S *x = static_cast<const S*>(set.x), *score = static_cast<const S*>(set.score);
  const S* grad = static_cast<const S*>(set.grad);
  for (int64_t i = first; i < last; i += L) {
    for (int64_t k = 0; k < w.width; k += L) {
      const int64_t count = w.d - k < L ? w.d - k : L;
      Vec<T> X[L], V[L], G[L];
      for (int r = 0; r < L; ++r) {
        const int64_t row = i + r, from = row * w.d + k, to = row * w.ld + k, available = w.n * w.d - from;
        Vec<T> xr = {}, vr = {}, gr = {};
        if (row < w.n) {
          const Vec<T> raw = load_lanes<T>(x + from, count, available);
          xr = raw - at(w.mean + k);
          vr = w.alpha * (score ? load_lanes<T>(score + from, count, available) : -raw) - w.beta * xr;
          if (backward) gr = load_lanes<T>(grad + from, count, available);
        }
        X[r] = xr;
        if (backward) {
          V[r] = vr, G[r] = gr;
          at(w.x + to) = xr, at(w.g + to) = gr, at(w.bx + to) = Vec<T>{}, at(w.kg + to) = Vec<T>{};
        } else {
          at(w.v + to) = vr, at(w.kv + to) = Vec<T>{};
        }
      }
      store_panel<T>(w.x_panels + i * w.d, X, k, count);
      if (backward) {
        store_panel<T>(w.v_panels + i * w.d, V, k, count);
        store_panel<T>(w.g_panels + i * w.d, G, k, count);
      }
    }
    Vec<T> norm = {}, gx = {};
    for (int64_t k = 0; k < w.d; ++k) {  // in the order of `product`, so that equal particles are at distance 0
      const Vec<T> xk = at(w.x_panels + i * w.d + k * L);
      norm += xk * xk;
      if (backward) gx += at(w.g_panels + i * w.d + k * L) * xk;
    }
    at(w.half_norms + i) = T(0.5) * norm;
    at(w.r + i) = Vec<T>{};
    if (backward) at(w.b + i) = Vec<T>{}, at(w.p + i) = w.beta * gx;
    for (int64_t row = i; row < i + L; ++row)
      if (row >= w.n) w.half_norms[row] = T(__builtin_inff());
  }
}

// K; padding rows have infinite norms, so that their k is 0. A tile on the diagonal gets k_ii = 0.
template <class T>
IVFAST_INLINE void kernel_tile(T* K, const T* x, const T* half_norms, T exponent, Range t, int64_t d) {
  const T *const rows = half_norms + t.i, *const cols = half_norms + t.j;
  product_tile<false>(K, x, x, t, d, [&](Vec<T> xx, int64_t i, int64_t j) __attribute__((always_inline)) {
    return exp2_nonpositive<Vec<T>, typename Simd<T>::Bits>((xx - rows[i] - at(cols + j)) * exponent, T());
  });
  if (t.i == t.j)
    for (int64_t i = 0; i < t.rows; ++i) K[i * tile + i] = 0;
}

// B_ij = k_ij (g_i·v_j + v_i·g_j + p_i + p_j)
template <class T>
IVFAST_INLINE void gradient_tile(T* B, const T* K, const T* g, const T* v, const T* p, Range t, int64_t d) {
  const T *const rows = p + t.i, *const cols = p + t.j;
  product_tile<true>(B, g, v, t, d, [&](Vec<T> gv, int64_t i, int64_t j) __attribute__((always_inline)) {
    return at(K + i * tile + j) * (gv + rows[i] + at(cols + j));
  });
}

// The tiles of rows [i, i_end) and [j, j_end), at most `tile` each.
template <class T, bool backward>
void pair_tile(const View<T>& w, int64_t i, int64_t i_end, int64_t j, int64_t j_end) {
  const int64_t rows = i_end - i, cols = j_end - j;
  const int64_t row_groups = round_up(rows, group<T>), col_groups = round_up(cols, group<T>);
  const Range t{i, row_groups, j, round_up(cols, lanes<T>)};
  const bool diagonal = i == j;
  const auto add = [&](const T* K, T* sums, T* out, const T* y) __attribute__((always_inline)) {
    add_row_sums(sums + i, K, rows, t.cols);
    accumulate<tile, 1>(out + i * w.ld, K, y + j * w.ld, row_groups, cols, w.ld, w.width);
    if (diagonal) return;
    add_column_sums(sums + j, K, rows, t.cols);
    accumulate<1, tile>(out + j * w.ld, K, y + i * w.ld, col_groups, rows, w.ld, w.width);
  };
  alignas(64) T K[tile * tile];
  kernel_tile(K, w.x_panels, w.half_norms, w.exponent, t, w.d);
  add(K, w.r, backward ? w.kg : w.kv, backward ? w.g : w.v);
  if constexpr (backward) {
    alignas(64) T B[tile * tile];
    gradient_tile(B, K, w.g_panels, w.v_panels, w.p, t, w.d);
    add(B, w.b, w.bx, w.x);
  }
}

// Every pair of tiles of two blocks of rows; within one block, every pair once.
template <class T, bool backward>
void pair_blocks(const View<T>& w, int64_t first, int64_t last, int64_t other_first, int64_t other_last) {
  const auto end = [&](int64_t i, int64_t limit) { return i + w.edge < limit ? i + w.edge : limit; };
  for (int64_t i = first; i < last; i += w.edge)
    for (int64_t j = first == other_first ? i : other_first; j < other_last; j += w.edge)
      pair_tile<T, backward>(w, i, end(i, last), j, end(j, other_last));
}

template <class S, class T, bool backward>
void begin(const SvgdSet& set, int64_t first, int64_t last) {
  const View<T> w(set, backward);
  pack<S, T>(set, w, first, round_up(last, lanes<T>), backward);
  pair_blocks<T, backward>(w, first, last, first, last);
}

template <class T, bool backward>
void pair(const SvgdSet& set, int64_t first, int64_t last, int64_t other_first, int64_t other_last) {
  pair_blocks<T, backward>(View<T>(set, backward), first, last, other_first, other_last);
}

template <class S, class T>
void finish_forward(const SvgdSet& set, int64_t first, int64_t last) {
  const View<T> w(set, false);
  const T nan = nan_of(w.mean, w.d), per_n = T(1) / T(w.n) + nan;  // k has lost it
  for (int64_t i = first; i < last; ++i) {
    const S *x = static_cast<const S*>(set.x) + i * w.d, *score = static_cast<const S*>(set.score);
    S* phi = static_cast<S*>(set.phi) + i * w.d;
    const T *kv = w.kv + i * w.ld, r_beta = w.beta * w.r[i];
    static_cast<T*>(set.row_sum)[i] = 1 + w.r[i] + nan;
    for (int64_t k = 0; k < w.d; ++k) {
      const T raw = load(x[k]), s = score ? load(score[i * w.d + k]) : -raw;
      store(phi + k, per_n * (s + w.gamma * (kv[k] + r_beta * (raw - w.mean[k]))));
    }
  }
}

template <class S, class T>
void finish_backward(const SvgdSet& set, int64_t first, int64_t last) {
  const View<T> w(set, true);
  const T per_n = T(1) / T(w.n) + nan_of(w.mean, w.d);
  S* const dscore = static_cast<S*>(set.dscore);
  for (int64_t slot = first / 32; slot <= (last - 1) / 32; ++slot) w.dh[slot] = 0;
  for (int64_t i = first; i < last; ++i) {
    S* dx = static_cast<S*>(set.dx) + i * w.d;
    const T *x = w.x + i * w.ld, *g = w.g + i * w.ld, *kg = w.kg + i * w.ld, *bx = w.bx + i * w.ld;
    const T b = w.b[i], r = w.r[i];
    Vec<T> dh = {};
    for (int64_t k = 0; k < w.width; k += lanes<T>) {
      const Vec<T> D = per_n * (w.gamma * (b * at(x + k) - at(bx + k)));
      const Vec<T> E = per_n * (r * at(g + k) - at(kg + k)), dS = per_n * (at(g + k) + at(kg + k));
      const Vec<T> dX = w.two_over_h * (E - D);
      dh += at(x + k) * (D - 2 * E);
      alignas(64) T dx_lanes[lanes<T>], dS_lanes[lanes<T>];
      at(dx_lanes) = dscore ? dX : dX - dS;  // S = −x
      at(dS_lanes) = dS;
      const int64_t count = w.d - k < lanes<T> ? w.d - k : lanes<T>;
      for (int64_t l = 0; l < count; ++l) store(dx + k + l, dx_lanes[l]);
      for (int64_t l = 0; dscore && l < count; ++l) store(dscore + i * w.d + k + l, dS_lanes[l]);
    }
    T total = 0;
    for (int l = 0; l < lanes<T>; ++l) total += dh[l];
    w.dh[i / 32] += total;
  }
}

template <class T>
double bandwidth_gradient(const SvgdSet& set) {
  const View<T> w(set, true);
  double sum = 0;
  for (int64_t slot = 0; slot <= (w.n - 1) / 32; ++slot) sum += w.dh[slot];
  return sum / set.h / set.h;
}

// A distance u loses a few eps ‖x‖². That shows if it is not small beside h, unless every kernel value is 0 and stays so.
// h near the ends of the range has squares of differences beyond them.
template <class T, bool backward>
bool lost(const SvgdSet& set) {
  const View<T> w(set, backward);
  T norm = 0, sum = 0;
  for (int64_t i = 0; i < w.n; ++i) {
    norm = w.half_norms[i] > norm ? w.half_norms[i] : norm;
    sum = w.r[i] > sum ? w.r[i] : sum;
  }
  const bool extreme = set.h < 0x1p-60 || set.h > 0x1p60;
  return extreme || double(norm) > (sum > 0 ? 0x1p6 : 0x1p20) * set.h;
}

template <class S, class T>
SvgdStages stages_of(bool backward) {
  if (backward)
    return {workspace_bytes<T, true>, centre<S, T, true>, begin<S, T, true>, pair<T, true>,
            finish_backward<S, T>, bandwidth_gradient<T>, lost<T, true>};
  return {workspace_bytes<T, false>, centre<S, T, false>, begin<S, T, false>, pair<T, false>,
          finish_forward<S, T>, nullptr, lost<T, false>};
}

}  // namespace

SvgdStages svgd_stages(Storage storage, bool backward) {
  return IVFAST_BY_STORAGE(storage, stages_of, backward);
}

}  // namespace IVFAST_ISA
}  // namespace ivfast
