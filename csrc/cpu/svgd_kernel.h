// The stages of the SVGD direction and of its gradient; included once per instruction set.
//
// u_ij = ‖x_i − x_j‖²/2 and k_ij = 2^(−u_ij · 2 log2(e)/h).
// K' = K − I, r' = K'1: a particle's own term is added separately and exactly, however narrow the kernel. With X
// centred, V = αS − βX, γα = 1 and γβ = 2/h,
//   φ_i = (1/n) [s_i + γ (K'V + β r'∘X)_i].
// Backward, with B_ij = k'_ij (g_i·v_j + v_i·g_j + β g_i·x_i + β g_j·x_j), D = (γ/n) [(B1)∘X − BX] and
// E = (1/n) [r'∘G − K'G],
//   ∂S = (1/n) (G + K'G),   ∂X = −(2/h) (D − E),   ∂h = [(γ/n) Σ_ij B_ij u_ij − 2⟨X, E⟩]/h².
// The sum over pairs is ⟨X, D⟩, which would leave eps (‖x‖²/h)² for pairs of equal rows.
#pragma once

#include "distances.h"
#include "svgd.h"
#include "tiles.h"

namespace ivfast {
namespace IVFAST_ISA {
namespace {

// The scalars and the workspace of one particle set. Matrices are rows [padded n, ld] or panels [padded n, d].
template <class T>
struct View {
  int64_t n, d, width, ld, padded, edge;
  bool bandwidth_gradient;
  T alpha, beta, gamma, two_over_h, exponent;
  T *centre, *half_norms, *r, *b, *p;            // r = r', b = B1, p_i = β g_i·x_i
  T *x_panels, *v_panels, *g_panels;
  T *v, *kv;                                   // forward: V and K'V
  T *x, *g, *bx, *kg;                          // backward: X, G, BX and K'G
  double* dh;                                  // a partial sum per 32 rows
  int64_t bytes;

  View(const SvgdSet& set, bool backward) : n(set.n), d(set.d), bandwidth_gradient(set.bandwidth_gradient) {
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
    take(width, centre), take(padded, half_norms), take(padded, r), take(padded * d, x_panels);
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

template <class S, class T, bool backward>
void set_centre(const SvgdSet& set) {
  const View<T> w(set, backward);
  centre(w.centre, static_cast<const S*>(set.x), w.n, w.d);
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
          xr = raw - at(w.centre + k);
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
    at(w.half_norms + i) = half_norms(w.x_panels + i * w.d, w.d);
    at(w.r + i) = Vec<T>{};
    if (backward) {
      Vec<T> gx = {};
      for (int64_t k = 0; k < w.d; ++k)
        gx += at(w.g_panels + i * w.d + k * L) * at(w.x_panels + i * w.d + k * L);
      at(w.b + i) = Vec<T>{}, at(w.p + i) = w.beta * gx;
    }
    for (int64_t row = i; row < i + L; ++row)
      if (row >= w.n) w.half_norms[row] = T(__builtin_inff());
  }
}

// K and, unless `U` is null, u. Padding rows have infinite norms, so that their k is 0. A tile on the diagonal gets
// k_ii = 0.
template <class T>
IVFAST_INLINE void kernel_tile(T* K, T* U, const T* x, const T* half_norms, T exponent, Range t, int64_t d) {
  half_squares(K, x, half_norms, t, d, [&](Vec<T> u, int64_t i, int64_t j) __attribute__((always_inline)) {
    if (U) at(U + i * tile + j) = u;
    return exp2_nonpositive<Vec<T>, typename Simd<T>::Bits>(u * -exponent, T());
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

// Σ B∘U of a tile. u is infinite for padding and may be for far pairs, whose k is 0.
template <class T>
IVFAST_INLINE double slope_tile(const T* B, const T* U, int64_t rows, int64_t cols) {
  double sum = 0;
  for (int64_t i = 0; i < rows; ++i) {
    Vec<T> row = {};
    for (int64_t j = 0; j < cols; j += lanes<T>) {
      const Vec<T> b = at(B + i * tile + j);
      row += b == Vec<T>{} ? Vec<T>{} : b * at(U + i * tile + j);
    }
    sum += sum_lanes_double<T>(row);
  }
  return sum;
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
  alignas(64) T K[tile * tile], U[backward ? tile * tile : 1];
  kernel_tile(K, backward && w.bandwidth_gradient ? U : nullptr, w.x_panels, w.half_norms, w.exponent, t, w.d);
  add(K, w.r, backward ? w.kg : w.kv, backward ? w.g : w.v);
  if constexpr (backward) {
    alignas(64) T B[tile * tile];
    gradient_tile(B, K, w.g_panels, w.v_panels, w.p, t, w.d);
    add(B, w.b, w.bx, w.x);
    if (w.bandwidth_gradient)
      w.dh[i / 32] += w.gamma * ((diagonal ? 1 : 2) * slope_tile(B, U, rows, t.cols) / double(w.n));
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
  for (int64_t slot = first / 32; backward && slot <= (last - 1) / 32; ++slot) w.dh[slot] = 0;
  pair_blocks<T, backward>(w, first, last, first, last);
}

template <class T, bool backward>
void pair(const SvgdSet& set, int64_t first, int64_t last, int64_t other_first, int64_t other_last) {
  pair_blocks<T, backward>(View<T>(set, backward), first, last, other_first, other_last);
}

template <class S, class T>
void finish_forward(const SvgdSet& set, int64_t first, int64_t last) {
  const View<T> w(set, false);
  const T nan = nan_of<T>(w.centre, w.d), per_n = T(1) / T(w.n) + nan;  // k has lost it
  for (int64_t i = first; i < last; ++i) {
    const S *x = static_cast<const S*>(set.x) + i * w.d, *score = static_cast<const S*>(set.score);
    S* phi = static_cast<S*>(set.phi) + i * w.d;
    const T *kv = w.kv + i * w.ld, r_beta = w.beta * w.r[i];
    static_cast<T*>(set.row_sum)[i] = 1 + w.r[i] + nan;
    for (int64_t k = 0; k < w.d; ++k) {
      const T raw = load(x[k]), s = score ? load(score[i * w.d + k]) : -raw;
      store(phi + k, per_n * (s + w.gamma * (kv[k] + r_beta * (raw - w.centre[k]))));
    }
  }
}

template <class S, class T>
void finish_backward(const SvgdSet& set, int64_t first, int64_t last) {
  const View<T> w(set, true);
  const T per_n = T(1) / T(w.n) + nan_of<T>(w.centre, w.d);
  S* const dscore = static_cast<S*>(set.dscore);
  for (int64_t i = first; i < last; ++i) {
    S* dx = static_cast<S*>(set.dx) + i * w.d;
    const T *x = w.x + i * w.ld, *g = w.g + i * w.ld, *kg = w.kg + i * w.ld, *bx = w.bx + i * w.ld;
    const T b = w.b[i], r = w.r[i];
    Vec<T> dh = {};
    for (int64_t k = 0; k < w.width; k += lanes<T>) {
      const Vec<T> D = per_n * (w.gamma * (b * at(x + k) - at(bx + k)));
      const Vec<T> E = per_n * (r * at(g + k) - at(kg + k)), dS = per_n * (at(g + k) + at(kg + k));
      const Vec<T> dX = w.two_over_h * (E - D);
      if (w.bandwidth_gradient) dh -= 2 * E * at(x + k);
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
// h near the ends of the range has squares of differences beyond them, and sums may overflow where results do not.
template <class S, class T, bool backward>
bool lost(const SvgdSet& set) {
  const View<T> w(set, backward);
  T norm = 0, sum = 0, nan = 0;
  for (int64_t i = 0; i < w.n; ++i) {
    norm = w.half_norms[i] > norm ? w.half_norms[i] : norm;
    sum = w.r[i] > sum ? w.r[i] : sum;
  }
  for (void* result : {set.phi, set.dx, set.dscore})
    if (result) nan += nan_of<T>(static_cast<const S*>(result), w.n * w.d);
  const bool extreme = set.h < 0x1p-60 || set.h > 0x1p60;
  return extreme || nan != 0 || double(norm) > (sum > 0 ? 0x1p6 : 0x1p20) * set.h;
}

template <class S, class T>
SvgdStages stages_of(bool backward) {
  if (backward)
    return {workspace_bytes<T, true>, set_centre<S, T, true>, begin<S, T, true>, pair<T, true>,
            finish_backward<S, T>, bandwidth_gradient<T>, lost<S, T, true>};
  return {workspace_bytes<T, false>, set_centre<S, T, false>, begin<S, T, false>, pair<T, false>,
          finish_forward<S, T>, nullptr, lost<S, T, false>};
}

}  // namespace

SvgdStages svgd_stages(Storage storage, bool backward) {
  return IVFAST_BY_STORAGE(storage, stages_of, backward);
}

}  // namespace IVFAST_ISA
}  // namespace ivfast
