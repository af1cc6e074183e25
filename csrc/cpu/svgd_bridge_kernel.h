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

#include "median_select.h"
#include "svgd_bridge_tiles.h"

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
  med2 += nan_of<T>(w.centre, w.d);
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
    const T m = w.centre[k];
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
      gx += g * at(w.x_panels + i * w.d + k * L), gm += g * w.centre[k];
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

// A distance u loses a few eps ‖x‖². That shows if it is not small beside h and beside the median. Sums may overflow where
// results do not.
template <class T>
bool lost(const BridgeStep& s, double h, bool backward) {
  const Small<T> w(s, backward);
  T norm = 0;
  for (int64_t i = 0; i < w.n; ++i) norm = w.half_norms[i] > norm ? w.half_norms[i] : norm;
  const double wide = backward || s.scale < 1 ? h : h / s.scale;
  const T nan = nan_of<T>(static_cast<const T*>(backward ? s.dx : s.phi), s.n * s.d);
  return sizeof(T) == 4 && (nan != 0 || double(norm) > 0x1p6 * wide || wide < 0x1p-60 || h > 0x1p60);
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
