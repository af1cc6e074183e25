// The stages of the maximum mean discrepancy and its gradients; included once per instruction set.
//
// x and y form one pooled sample, each half padded to whole panels. With u_ij = ‖x_i − x_j‖²/2, c = s b/2 for each
// scale and w the weight of the pair's kind (x with x, y with y, x with y),
//   k = Σ_s c/(c + u) or Σ_s exp(−u/c),   MMD² = Σ_ij w k_ij,
//   g = 4w dk/dr² = −2w Σ_s c/(c + u)² or −2w Σ_s exp(−u/c)/c,   ∂x_i = (Σ_j g_ij) x_i − Σ_j g_ij x_j.
// A sample's pair with itself is never computed: its k(0) is added or left out exactly.
#pragma once

#include "distances.h"
#include "mmd.h"
#include "reciprocal.h"
#include "tiles.h"

namespace ivfast {
namespace IVFAST_ISA {
namespace {

template <class T>
struct Limits;
template <>
struct Limits<float> {
  static constexpr double distance = 0x1p126, scale = 0x1p120;
};
template <>
struct Limits<double> {
  static constexpr double distance = 0x1p1022, scale = 0x1p1000;
};

// The scalars and the workspace. Matrices are rows [padded, ld] or panels [padded, d].
template <class T>
struct Pool {
  int64_t d, width, ld, edge, first[2];  // y's rows start at first[1]
  T *centre, *half_norms, *panels;
  T *x, *g, *gx;     // if gradients are requested: X, G1 and GX
  T *c, *per_c;      // per scale: c; 1/c
  double* totals;    // per block: its part of MMD²
  double weight[3];  // by kind
  int64_t bytes;

  explicit Pool(const TwoSamples& s) : d(s.d), width(round_up(s.d, lanes<T>)), edge(mmd_tile(s.n[0] + s.n[1])) {
    ld = width * sizeof(T) % 1024 ? width : width + lanes<T>;  // rows must not map to the same cache set
    first[0] = 0, first[1] = round_up(s.n[0], lanes<T>);
    const int64_t padded = first[1] + round_up(s.n[1], lanes<T>);
    const int64_t rows = s.dx[0] || s.dx[1] ? padded : 0, sums = s.dx[1] ? padded : s.dx[0] ? first[1] : 0;
    char *const base = static_cast<char*>(s.workspace), *next = base;
    const auto take = [&](int64_t count, auto*& pointer) {
      pointer = reinterpret_cast<decltype(+pointer)>(next);
      next += round_up(count * int64_t(sizeof(*pointer)), 64);
    };
    take(width, centre), take(padded, half_norms), take(padded * d, panels);
    take(rows * ld, x), take(sums, g), take(sums * ld, gx);
    take(s.count, c), take(s.count, per_c), take(s.blocks(), totals);
    bytes = next - base;

    const double n = double(s.n[0]), m = double(s.n[1]), left_out = s.unbiased ? 1 : 0;
    weight[0] = 1 / (n * (n - left_out)), weight[1] = 1 / (m * (m - left_out)), weight[2] = -1 / (n * m);
  }
};

// Rows [first, last) of sample k.
struct Block {
  int k;
  int64_t first, last;

  Block(const TwoSamples& s, int64_t block) : k(block >= s.blocks(0)) {
    first = (k ? block - s.blocks(0) : block) * s.size;
    last = first + s.size < s.n[k] ? first + s.size : s.n[k];
  }
};

template <class T>
int64_t bytes(const TwoSamples& s) {
  return Pool<T>(s).bytes;
}

// The scales and the centre. Any centre works: distances do not depend on it, only their rounding does.
template <class S, class T>
void prepare(const TwoSamples& s) {
  const Pool<T> w(s);
  const S *const x = static_cast<const S*>(s.x[0]), *const y = static_cast<const S*>(s.x[1]);
  if constexpr (std::is_same_v<S, double>) {
    median_of_columns(w.centre, w.width, x, s.n[0], y, s.n[1], s.d);
  } else {
    const T n = T(s.n[0]), m = T(s.n[1]);
    T* const other = w.panels;  // not yet packed; round_up(d) <= padded d
    centre(w.centre, x, s.n[0], s.d);
    centre(other, y, s.n[1], s.d);
    for (int64_t k = 0; k < w.width; k += lanes<T>)
      at(w.centre + k) = at(w.centre + k) * (n / (n + m)) + at(other + k) * (m / (n + m));
  }
  for (int64_t i = 0; i < s.count; ++i) {
    const double c = 0.5 * s.scales[i] * s.bandwidth, most = Limits<T>::scale, least = 1 / most;
    const double within = c > most ? most : c < least ? least : c;
    w.c[i] = T(within), w.per_c[i] = T(1 / within);
  }
}

// Converts, centres and pads the rows of a block.
template <class S, class T>
IVFAST_INLINE void pack(const TwoSamples& s, const Pool<T>& w, const Block& block) {
  constexpr int L = lanes<T>;
  const S* const from = static_cast<const S*>(s.x[block.k]);
  const int64_t n = s.n[block.k];
  for (int64_t i = block.first; i < block.last; i += L) {
    const int64_t to = w.first[block.k] + i;
    T* const panel = w.panels + to * w.d;
    for (int64_t k = 0; k < w.width; k += L) {
      const int64_t count = w.d - k < L ? w.d - k : L;
      Vec<T> rows[L];
      for (int r = 0; r < L; ++r) {
        const int64_t at_row = (i + r) * w.d + k;
        rows[r] = Vec<T>{};
        if (i + r < n) rows[r] = load_row<T>(from + at_row, count, n * w.d - at_row) - at(w.centre + k);
        if (s.dx[0] || s.dx[1]) at(w.x + (to + r) * w.ld + k) = rows[r];
        if (s.dx[block.k]) at(w.gx + (to + r) * w.ld + k) = Vec<T>{};
      }
      store_panel<T>(panel, rows, k, count);
    }
    at(w.half_norms + to) = half_norms(panel, w.d);
    if (s.dx[block.k]) at(w.g + to) = Vec<T>{};
  }
}

// A sum in float64 of vectors.
template <class T>
struct DoubleSum {
  static constexpr int parts = int(sizeof(double) / sizeof(T));
  Vec<double> sums[parts] = {};

  inline __attribute__((always_inline)) void add(Vec<T> value) {
    typedef T Part __attribute__((vector_size(IVFAST_VECTOR_BYTES / parts)));
    Part part[parts];
    __builtin_memcpy(part, &value, sizeof value);
    for (int p = 0; p < parts; ++p) sums[p] += __builtin_convertvector(part[p], Vec<double>);
  }
  double total() const {
    Vec<double> sum = sums[0];
    for (int p = 1; p < parts; ++p) sum += sums[p];
    double result = 0;
    for (int l = 0; l < lanes<double>; ++l) result += sum[l];
    return result;
  }
};

// k and, if `slope` is set, −dk/du for C vectors of u
template <bool imq, bool slope, int C, class T>
IVFAST_INLINE void kernel(Vec<T> (&k)[C], Vec<T> (&s)[C], const Vec<T> (&u)[C], const T* c, const T* per_c,
                          int64_t count) {
#pragma GCC unroll 4
  for (int v = 0; v < C; ++v) k[v] = s[v] = T(0) * u[v];  // NaN stays NaN
  for (int64_t i = 0; i < count; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < C; ++v)
      if constexpr (imq) {
        const Vec<T> inverse = reciprocal(c[i] + u[v]), term = c[i] * inverse;
        k[v] += term;
        if constexpr (slope) s[v] += term * inverse;
      } else {
        const T exponent = per_c[i] * T(-1.4426950408889634);
        const Vec<T> term = exp2_nonpositive<Vec<T>, typename Simd<T>::Bits>(exponent * u[v], T());
        k[v] += term;
        if constexpr (slope) s[v] += per_c[i] * term;
      }
}

// The sum of k over a tile of u; if `slope` is set, u becomes factor·dk/du. With `edge`, columns from `cols` on and, on
// the diagonal, a row's pair with itself count as 0.
template <bool imq, bool slope, bool edge, class T>
double sum_tile(T* tile_u, const Pool<T>& w, int64_t count, int64_t rows, int64_t cols, bool diagonal, T factor) {
  using Bits = typename Simd<T>::Bits;
  constexpr int L = lanes<T>, most = IVFAST_VECTOR_BYTES == 64 ? 4 : 2;
  DoubleSum<T> total;
  Bits lane;
  for (int l = 0; l < L; ++l) lane[l] = l;
  for (int64_t i = 0; i < rows; ++i)
    columns<T, most>(round_up(cols, L) / L, [&](auto group, int64_t j) __attribute__((always_inline)) {
      constexpr int C = decltype(group)::value;
      T* const at_u = tile_u + i * tile + j;
      Vec<T> u[C], k[C], s[C];
#pragma GCC unroll 4
      for (int v = 0; v < C; ++v) u[v] = at(at_u + v * L);
      kernel<imq, slope, C>(k, s, u, w.c, w.per_c, count);
      if constexpr (edge)
#pragma GCC unroll 4
        for (int v = 0; v < C; ++v) {
          const Bits column = lane + typename Simd<T>::Scalar(j + v * L);
          Bits counts = column < Bits{} + typename Simd<T>::Scalar(cols);
          if (diagonal) counts &= column != Bits{} + typename Simd<T>::Scalar(i);
          k[v] = counts ? k[v] : Vec<T>{}, s[v] = counts ? s[v] : Vec<T>{};
        }
      Vec<T> sum = k[0];
#pragma GCC unroll 4
      for (int v = 1; v < C; ++v) sum += k[v];
      total.add(sum);
      if constexpr (slope)
#pragma GCC unroll 4
        for (int v = 0; v < C; ++v) at(at_u + v * L) = factor * s[v];
    });
  return total.total();
}

template <class T>
double sum_tile(T* u, const TwoSamples& s, const Pool<T>& w, bool slope, int64_t rows, int64_t cols, bool diagonal,
                T factor) {
  const bool edge = diagonal || cols % lanes<T>;
  const auto sum = s.imq ? slope ? edge ? sum_tile<true, true, true, T> : sum_tile<true, true, false, T>
                                 : edge ? sum_tile<true, false, true, T> : sum_tile<true, false, false, T>
                         : slope ? edge ? sum_tile<false, true, true, T> : sum_tile<false, true, false, T>
                                 : edge ? sum_tile<false, false, true, T> : sum_tile<false, false, false, T>;
  return sum(u, w, s.count, rows, cols, diagonal, factor);
}

// The tile of rows [i, i + rows) of sample a and [j, j + cols) of sample b, at most `tile` each: its part of MMD² and
// of the requested sums of both sides. Padding rows are not masked, because their sums are never read.
template <class T>
double pair_tile(const TwoSamples& s, const Pool<T>& w, int a, int64_t i, int64_t rows, int b, int64_t j,
                 int64_t cols) {
  const int64_t row_groups = round_up(rows, group<T>), col_groups = round_up(cols, group<T>);
  i += w.first[a], j += w.first[b];
  const Range t{i, row_groups, j, round_up(cols, lanes<T>)};
  const bool diagonal = i == j;
  const double weight = w.weight[a == b ? a : 2];
  alignas(64) T G[tile * tile];
  half_squares(G, w.panels, w.half_norms, t, w.d, [&](Vec<T> u, int64_t, int64_t) __attribute__((always_inline)) {
    const Vec<T> zero = {};
    const Vec<T> most = Vec<T>{} + T(Limits<T>::distance), positive = zero > u ? zero : u;
    return most < positive ? most : positive;
  });
  const bool slope = s.dx[a] || s.dx[b];
  const double sum = sum_tile<T>(G, s, w, slope, rows, cols, diagonal, T(-2 * weight));
  if (s.dx[a]) {
    add_row_sums(w.g + i, G, rows, t.cols);
    accumulate<tile, 1>(w.gx + i * w.ld, G, w.x + j * w.ld, row_groups, cols, w.ld, w.width);
  }
  if (s.dx[b] && !diagonal) {
    add_column_sums(w.g + j, G, rows, t.cols);
    accumulate<1, tile>(w.gx + j * w.ld, G, w.x + i * w.ld, col_groups, rows, w.ld, w.width);
  }
  return (diagonal ? 1 : 2) * weight * sum;
}

// Every pair of tiles of two blocks of rows; within one block, every pair once.
template <class T>
double pair_blocks(const TwoSamples& s, const Pool<T>& w, const Block& a, const Block& b) {
  const bool same = a.k == b.k && a.first == b.first;
  const auto size = [&](int64_t i, int64_t last) { return i + w.edge < last ? w.edge : last - i; };
  double total = 0;
  for (int64_t i = a.first; i < a.last; i += w.edge)
    for (int64_t j = same ? i : b.first; j < b.last; j += w.edge)
      total += pair_tile<T>(s, w, a.k, i, size(i, a.last), b.k, j, size(j, b.last));
  return total;
}

template <class S, class T>
void begin(const TwoSamples& s, int64_t block) {
  const Pool<T> w(s);
  const Block rows(s, block);
  pack<S, T>(s, w, rows);
  const double itself = s.unbiased ? 0 : w.weight[rows.k] * double(s.count) * double(rows.last - rows.first);
  w.totals[block] = itself + pair_blocks<T>(s, w, rows, rows);
}

template <class T>
void pair(const TwoSamples& s, int64_t block, int64_t other) {
  const Pool<T> w(s);
  w.totals[block] += pair_blocks<T>(s, w, Block(s, block), Block(s, other));
}

template <class T>
void finish(const TwoSamples& s, int64_t block) {
  const Pool<T> w(s);
  const Block rows(s, block);
  if (!s.dx[rows.k]) return;
  for (int64_t i = rows.first; i < rows.last; ++i) {
    const int64_t from = w.first[rows.k] + i;
    const T *const x = w.x + from * w.ld, *const gx = w.gx + from * w.ld, g = w.g[from];
    T* const dx = static_cast<T*>(s.dx[rows.k]) + i * w.d;
    for (int64_t k = 0; k < w.d; ++k) dx[k] = g * x[k] - gx[k];
  }
}

template <class T>
double value(const TwoSamples& s) {
  const Pool<T> w(s);
  double total = 0;
  for (int64_t block = 0; block < s.blocks(); ++block) total += w.totals[block];
  return total;
}

template <class T>
double norm(const TwoSamples& s) {
  const Pool<T> w(s);
  T most = 0;
  for (int k = 0; k < 2; ++k)
    for (int64_t i = w.first[k]; i < w.first[k] + s.n[k]; ++i) most = w.half_norms[i] > most ? w.half_norms[i] : most;
  return double(most);
}

template <class S, class T>
MmdStages stages_of() {
  return {bytes<T>, prepare<S, T>, begin<S, T>, pair<T>, finish<T>, value<T>, norm<T>};
}

}  // namespace

MmdStages mmd_stages(Storage storage) {
  return IVFAST_BY_STORAGE(storage, stages_of);
}

}  // namespace IVFAST_ISA
}  // namespace ivfast
