// φ for the target N(0, I) and its gradient for small particle sets, and the steps of the bridge between them; included
// once per instruction set.
//
// With X = x − m centred, K' = K − I, r' = K'1, γα = 1 and γβ = 2/h, the score −x gives
//   φ_i = (1/n) [−x_i − γ(α + β) (K'X)_i + r'_i (γβ X_i − m)].
// Backward, with B_ij = k'_ij (q_i + q_j − (α + β)(g_i·X_j + X_i·g_j)), q_i = β g_i·X_i − α g_i·m,
// D = (γ/n) [(B1)∘X − BX] and E = (1/n) [r'∘G − K'G],
//   ∂x = (2/h) (E − D) − (1/n) (G + K'G).
#pragma once

#include <cmath>

#include "median_distances.h"
#include "median_select.h"
#include "svgd_bridge.h"

namespace ivfast {
namespace IVFAST_ISA {
namespace {

// The scalars for one h; neither factor of γβ = 2/h overflows.
template <class T>
struct Factors {
  T alpha, beta, gamma, two_over_h, exponent;

  explicit Factors(double h) {
    const double largest = sizeof(T) == 4 ? 3.4028234e38 : 1.7976931348623157e308;
    const auto finite = [&](double value) { return T(value < largest ? value : largest); };
    two_over_h = finite(2 / h), exponent = finite(2 * 1.4426950408889634 / h);
    const bool wide = h >= 1;
    alpha = wide ? T(1) : T(h / 2), beta = wide ? two_over_h : T(1), gamma = wide ? T(1) : two_over_h;
  }
};

// Matrices are rows [padded n, width] or panels: [padded n, d], for results [padded n, width]. Sums and results of
// padding rows are not read.
template <class T>
struct Small {
  int64_t n, d, width, padded, pairs;
  T *mean, *half_norms, *r, *b, *q;
  T *x_panels, *g_panels, *x, *g;
  T *kx, *bx;                 // panels of K'X forward; of K'G and BX backward
  T *u, *values, *scratch;    // forward: all tiles, then all pairs
  int64_t bytes;

  Small(const BridgeStep& s, bool backward) : n(s.n), d(s.d), width(round_up(d, lanes<T>)) {
    padded = round_up(n, lanes<T>), pairs = n * (n - 1) / 2;
    char *const base = static_cast<char*>(s.workspace), *next = base;
    const auto take = [&](int64_t count, T*& pointer) {
      pointer = reinterpret_cast<T*>(next);
      next += round_up(count * int64_t(sizeof(T)), 64);
    };
    const int64_t rows = padded * width, edge = (n + tile - 1) / tile;
    take(width, mean), take(padded, half_norms), take(padded, r);
    take(padded * d, x_panels), take(rows, x), take(rows, kx);
    if (backward)
      take(padded, b), take(padded, q), take(padded * d, g_panels), take(rows, g), take(rows, bx);
    else
      take(edge * (edge + 1) / 2 * tile * tile, u), take(pairs + 64, values), take(pairs / 2 + 64, scratch);
    bytes = next - base;
  }
};

template <class T>
int64_t bytes(int64_t n, int64_t d, bool backward) {
  BridgeStep s{};
  s.n = n, s.d = d;
  return Small<T>(s, backward).bytes;
}

// Rows [n, d], minus `mean`, into padded rows and panels.
template <class T>
IVFAST_INLINE void pack(T* rows, T* panels, const T* from, const T* mean, int64_t n, int64_t d, int64_t width) {
  constexpr int L = lanes<T>;
  for (int64_t i = 0; i < n; i += L)
    for (int64_t k = 0; k < d; k += L) {
      const int64_t count = d - k < L ? d - k : L;
      Vec<T> block[L];
      for (int r = 0; r < L; ++r) {
        const int64_t at_row = (i + r) * d + k;
        block[r] = i + r < n ? load_row<T>(from + at_row, count, n * d - at_row) : Vec<T>{};
        if (mean && i + r < n) block[r] -= at(mean + k);
        at(rows + (i + r) * width + k) = block[r];
      }
      store_panel<T>(panels + i * d, block, k, count);
    }
}

template <class T>
IVFAST_INLINE void pack_particles(const Small<T>& w, const T* x) {
  centre(w.mean, x, w.n, w.d);
  pack(w.x, w.x_panels, x, w.mean, w.n, w.d, w.width);
  for (int64_t i = 0; i < w.padded; i += lanes<T>)
    at(w.half_norms + i) = half_norms(w.x_panels + i * w.d, w.d), at(w.r + i) = Vec<T>{};
  for (int64_t e = 0; e < w.padded * w.width; e += lanes<T>) at(w.kx + e) = Vec<T>{};
}

// Rows [n, d] from f(first row of a panel, column)
template <class T, class F>
IVFAST_INLINE void store_rows(T* out, int64_t n, int64_t d, const F& f) {
  constexpr int L = lanes<T>;
  for (int64_t i = 0; i < n; i += L)
    for (int64_t k = 0; k < d; k += L) {
      const int64_t count = d - k < L ? d - k : L;
      Vec<T> block[L];
#pragma GCC unroll 16
      for (int c = 0; c < L; ++c) block[c] = c < count ? f(i, k + c) : Vec<T>{};
      transpose<T>(block);
      for (int64_t r = 0; r < L && i + r < n; ++r) {
        T* const to = out + (i + r) * d + k;
        if (count == L)
          __builtin_memcpy(to, &block[r], sizeof block[r]);
        else
          for (int64_t l = 0; l < count; ++l) to[l] = block[r][l];
      }
    }
}

// f(range, its corner of `out`) for a tile or, on the diagonal, for strips of its upper triangle.
constexpr int64_t strip = 16;
template <class T, class F>
IVFAST_INLINE void each_range(T* out, int64_t n, int64_t i, int64_t j, const F& f) {
  const int64_t rows = n - i < tile ? n - i : tile, cols = round_up(n - j < tile ? n - j : tile, lanes<T>);
  if (i != j) return f(Range{i, round_up(rows, group<T>), j, cols}, out);
  for (int64_t s = 0; s < rows; s += strip) {
    const int64_t least = rows - s < strip ? rows - s : strip;
    f(Range{i + s, round_up(least, group<T>), j + s, cols - s}, out + s * tile + s);
  }
}

// The lower triangle of a symmetric tile from its upper one.
template <class T>
IVFAST_INLINE void mirror(T* K, int64_t rows) {
  constexpr int L = lanes<T>;
  for (int64_t i = 0; i < rows; i += L)
    for (int64_t j = i + L; j < round_up(rows, L); j += L) {
      Vec<T> block[L];
      for (int r = 0; r < L; ++r) block[r] = at(K + (i + r) * tile + j);
      transpose<T>(block);
      for (int r = 0; r < L; ++r) at(K + (j + r) * tile + i) = block[r];
    }
}

// K' of a tile from its u, in place
template <class T>
IVFAST_INLINE void kernel_tile(T* K, int64_t n, int64_t i, int64_t j, T exponent) {
  each_range(K, n, i, j, [&](Range t, T* corner) __attribute__((always_inline)) {
    for (int64_t r = 0; r < t.rows; ++r)
      for (int64_t c = 0; c < t.cols; c += lanes<T>) {
        T* const k = corner + r * tile + c;
        at(k) = exp2_nonpositive<Vec<T>, Bits<T>>(at(k) * -exponent, T());
      }
  });
  if (i != j) return;
  const int64_t rows = n - i < tile ? n - i : tile;
  for (int64_t r = 0; r < rows; ++r) K[r * tile + r] = 0;
  mirror(K, rows);
}

// sums_j += Σ_i K_ij, out_j += Σ_i K_ij y_i for the columns j of a tile: sums and panels start at its first column,
// rows y at its first row. Multiplies a group of dimensions of y by vectors of K.
template <class T>
void add_columns(T* sums, T* out, const T* K, const T* y, int64_t rows, int64_t vectors, int64_t width) {
  constexpr int R = group<T>, L = lanes<T>;
  columns<T>(vectors, [&](auto count, int64_t j) __attribute__((always_inline)) {
    constexpr int C = decltype(count)::value;
    for (int64_t k = 0; k < width; k += R) {
      Vec<T> acc[R][C] = {}, sum[C] = {};
      for (int64_t i = 0; i < rows; ++i) {
        Vec<T> value[C];
#pragma GCC unroll 8
        for (int v = 0; v < C; ++v) value[v] = at(K + i * tile + j + v * L), sum[v] += value[v];
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
          for (int v = 0; v < C; ++v) acc[r][v] += y[i * width + k + r] * value[v];
      }
#pragma GCC unroll 8
      for (int v = 0; v < C; ++v) {
        if (k == 0) at(sums + j + v * L) += sum[v];
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) at(out + (j + v * L) * width + (k + r) * L) += acc[r][v];
      }
    }
  });
}

// K_ji from a tile's K_ij
template <class T>
void turn(T* turned, const T* K, int64_t rows, int64_t cols) {
  constexpr int L = lanes<T>;
  for (int64_t i = 0; i < rows; i += L)
    for (int64_t j = 0; j < cols; j += L) {
      Vec<T> block[L];
      for (int r = 0; r < L; ++r) block[r] = i + r < rows ? at(K + (i + r) * tile + j) : Vec<T>{};
      transpose<T>(block);
      for (int r = 0; r < L; ++r) at(turned + (j + r) * tile + i) = block[r];
    }
}

// sums += K1, out += K y for a tile of a symmetric matrix
template <class T>
IVFAST_INLINE void add_tile(T* sums, T* out, const T* K, const T* y, int64_t n, int64_t i, int64_t j, int64_t width) {
  constexpr int L = lanes<T>;
  const int64_t rows = n - i < tile ? n - i : tile, cols = n - j < tile ? n - j : tile;
  add_columns(sums + j, out + j * width, K, y + i * width, rows, round_up(cols, L) / L, width);
  if (i == j) return;
  alignas(64) T turned[tile * tile];
  turn(turned, K, rows, cols);
  add_columns(sums + i, out + i * width, turned, y + j * width, cols, round_up(rows, L) / L, width);
}

template <class T, class F>
IVFAST_INLINE void each_tile(int64_t n, const F& f) {
  for (int64_t i = 0; i < n; i += tile)
    for (int64_t j = i; j < n; j += tile) f(i, j);
}

// The pairs of a tile, packed one after another; returns the end. Garbage after a row is overwritten.
template <class T>
IVFAST_INLINE T* gather(T* out, const T* u, int64_t n, int64_t i, int64_t j) {
  constexpr int L = lanes<T>;
  const int64_t rows = n - i < tile ? n - i : tile, cols = n - j < tile ? n - j : tile;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = i == j ? r + 1 : 0; c < cols; c += L) {
      __builtin_memcpy(out, u + r * tile + c, sizeof(Vec<T>));
      out += cols - c < L ? cols - c : L;
    }
  return out;
}

// scale · med²/log n of the packed particles; also writes their u
template <class T>
double bandwidth(const Small<T>& w, const T* x, double scale) {
  T *u = w.u, *end = w.values;
  each_tile<T>(w.n, [&](int64_t i, int64_t j) {
    each_range(u, w.n, i, j, [&](Range t, T* corner) { distance_tile(corner, w.x_panels, w.half_norms, w.d, t); });
    end = gather(end, u, w.n, i, j);
    u += tile * tile;
  });
  pad(end);
  double med2 = 0;
  if (w.pairs) {
    const auto [key, next] = select<T>(w.values, w.pairs, (w.pairs - 1) / 2, w.scratch);
    const double low = std::sqrt(2 * double(bit_cast<T>(Integer<T>(key))));
    const double high = w.pairs % 2 ? low : std::sqrt(2 * double(bit_cast<T>(Integer<T>(next))));
    med2 = (low + high) / 2 * ((low + high) / 2);
  }
  if (!(med2 > 0)) med2 = spread(x, w.n, w.d);
  med2 += nan_of(w.mean, w.d);
  return scale * (med2 != 0 ? med2 / std::log(w.n == 1 ? 2. : double(w.n)) : 1);
}

template <class T>
double direction(const BridgeStep& s) {
  constexpr int L = lanes<T>;
  const Small<T> w(s, false);
  const T* const x = static_cast<const T*>(s.x);
  pack_particles(w, x);
  const double h = T(bandwidth(w, x, s.scale));
  const Factors<T> f(h);
  T* K = w.u;
  each_tile<T>(w.n, [&](int64_t i, int64_t j) {
    kernel_tile(K, w.n, i, j, f.exponent);
    add_tile(w.r, w.kx, K, w.x, w.n, i, j, w.width);
    K += tile * tile;
  });
  const T per_n = T(1) / T(w.n), c = f.gamma * (f.alpha + f.beta);
  for (int64_t i = 0; i < w.n; ++i) static_cast<T*>(s.row_sum)[i] = 1 + w.r[i];
  store_rows(static_cast<T*>(s.phi), w.n, w.d, [&](int64_t i, int64_t k) __attribute__((always_inline)) {
    const Vec<T> X = at(w.x_panels + i * w.d + k * L), KX = at(w.kx + i * w.width + k * L), r = at(w.r + i);
    const T m = w.mean[k];
    return per_n * (r * (f.gamma * f.beta) * X - (X + m) - c * KX - r * m);
  });
  return h;
}

template <class T>
void pull(const BridgeStep& s, double h) {
  constexpr int L = lanes<T>;
  const Small<T> w(s, true);
  const Factors<T> f(h);
  pack_particles(w, static_cast<const T*>(s.x));
  pack<T>(w.g, w.g_panels, static_cast<const T*>(s.pushed), nullptr, w.n, w.d, w.width);
  for (int64_t i = 0; i < w.padded; i += L) {
    Vec<T> gx = {}, gm = {};
    for (int64_t k = 0; k < w.d; ++k) {
      const Vec<T> g = at(w.g_panels + i * w.d + k * L);
      gx += g * at(w.x_panels + i * w.d + k * L), gm += g * w.mean[k];
    }
    at(w.q + i) = f.beta * gx - f.alpha * gm, at(w.b + i) = Vec<T>{};
  }
  for (int64_t e = 0; e < w.padded * w.width; e += L) at(w.bx + e) = Vec<T>{};

  const T c = -(f.alpha + f.beta);
  each_tile<T>(w.n, [&](int64_t i, int64_t j) {
    // B overwrites K, so that everything fits in the L1 cache; for d > depth, B holds partial sums in its own buffer
    alignas(64) T K[tile * tile], deep[tile * tile];
    T* const B = w.d <= depth ? K : deep;
    each_range(K, w.n, i, j, [&](Range t, T* k) { distance_tile(k, w.x_panels, w.half_norms, w.d, t); });
    kernel_tile(K, w.n, i, j, f.exponent);
    add_tile(w.r, w.kx, K, w.g, w.n, i, j, w.width);
    each_range(B, w.n, i, j, [&](Range t, T* b) {
      const T *const k = K + (b - B), *const rows = w.q + t.i, *const cols = w.q + t.j;
      product_tile<true>(b, w.g_panels, w.x_panels, t, w.d,
                         [&](Vec<T> gx, int64_t r, int64_t v) __attribute__((always_inline)) {
                           return at(k + r * tile + v) * (c * gx + (rows[r] + at(cols + v)));
                         });
    });
    if (i == j) mirror(B, w.n - i < tile ? w.n - i : tile);
    add_tile(w.b, w.bx, B, w.x, w.n, i, j, w.width);
  });

  const T per_n = T(1) / T(w.n);
  store_rows(static_cast<T*>(s.dx), w.n, w.d, [&](int64_t i, int64_t k) __attribute__((always_inline)) {
    const Vec<T> X = at(w.x_panels + i * w.d + k * L), G = at(w.g_panels + i * w.d + k * L);
    const Vec<T> KG = at(w.kx + i * w.width + k * L), BX = at(w.bx + i * w.width + k * L);
    const Vec<T> D = per_n * (f.gamma * (at(w.b + i) * X - BX)), E = per_n * (at(w.r + i) * G - KG);
    return f.two_over_h * (E - D) - per_n * (G + KG);
  });
}

// A distance u loses a few eps ‖x‖². That shows if it is not small beside h and beside the median.
template <class T>
bool lost(const BridgeStep& s, double h, bool backward) {
  const Small<T> w(s, backward);
  T norm = 0;
  for (int64_t i = 0; i < w.n; ++i) norm = w.half_norms[i] > norm ? w.half_norms[i] : norm;
  const double wide = backward || s.scale < 1 ? h : h / s.scale;
  return sizeof(T) == 4 && (double(norm) > 0x1p6 * wide || wide < 0x1p-60 || h > 0x1p60);
}

template <class S, class T>
void advance(const BridgeStep& s) {
  const T *const x = static_cast<const T*>(s.x), *const phi = static_cast<const T*>(s.phi);
  const T step_size = T(s.step_size), noise = T(s.noise);
  const S* const draw = static_cast<const S*>(s.draw);
  T* const next = static_cast<T*>(s.next);
  S* const bridge = static_cast<S*>(s.bridge);
  for (int64_t e = 0; e < s.n * s.d; ++e) next[e] = x[e] + step_size * phi[e] + noise * load(draw[e]);
  for (int64_t e = 0; bridge && e < s.n * s.d; ++e) store(bridge + e, next[e]);
}

template <class S, class T>
void push(const BridgeStep& s) {
  const S* const from = static_cast<const S*>(s.bridge_grad);
  T *const grad = static_cast<T*>(s.grad), *const pushed = static_cast<T*>(s.pushed);
  const T step_size = T(s.step_size);
  for (int64_t e = 0; from && e < s.n * s.d; ++e) grad[e] += load(from[e]);
  for (int64_t e = 0; e < s.n * s.d; ++e) pushed[e] = step_size * grad[e];
}

template <class T>
void collect(const BridgeStep& s) {
  T* const grad = static_cast<T*>(s.grad);
  const T* const dx = static_cast<const T*>(s.dx);
  for (int64_t e = 0; e < s.n * s.d; ++e) grad[e] += dx[e];
}

template <class S, class T>
void finish(const BridgeStep& s) {
  const T* const grad = static_cast<const T*>(s.grad);
  const S* const more = static_cast<const S*>(s.bridge_grad);
  for (int64_t e = 0; e < s.n * s.d; ++e) store(static_cast<S*>(s.bridge) + e, grad[e] + load(more[e]));
}

template <class S, class T>
void widen(const void* from, void* to, int64_t count) {
  for (int64_t e = 0; e < count; ++e) static_cast<T*>(to)[e] = load(static_cast<const S*>(from)[e]);
}

template <class S, class T>
BridgeStages stages_of() {
  return {bytes<T>, direction<T>, advance<S, T>, push<S, T>, pull<T>, lost<T>, collect<T>, finish<S, T>, widen<S, T>};
}

}  // namespace

BridgeStages bridge_stages(Storage storage) {
  return IVFAST_BY_STORAGE(storage, stages_of);
}

}  // namespace IVFAST_ISA
}  // namespace ivfast
