// A small particle set in packed matrices, and sums over the tiles of its symmetric kernel; included once per
// instruction set.
#pragma once

#include "distances.h"
#include "svgd_bridge.h"

namespace ivfast {
namespace IVFAST_ISA {
namespace {

// Matrices are rows [padded n, width] or panels: [padded n, d], for results [padded n, width]. Sums and results of
// padding rows are not read.
template <class T>
struct Small {
  int64_t n, d, width, padded, pairs;
  T *centre, *half_norms, *r, *b, *q;
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
    take(width, centre), take(padded, half_norms), take(padded, r);
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

// Rows [n, d], minus `centre`, into padded rows and panels.
template <class T>
IVFAST_INLINE void pack(T* rows, T* panels, const T* from, const T* centre, int64_t n, int64_t d, int64_t width) {
  constexpr int L = lanes<T>;
  for (int64_t i = 0; i < n; i += L)
    for (int64_t k = 0; k < d; k += L) {
      const int64_t count = d - k < L ? d - k : L;
      Vec<T> block[L];
      for (int r = 0; r < L; ++r) {
        const int64_t at_row = (i + r) * d + k;
        block[r] = i + r < n ? load_row<T>(from + at_row, count, n * d - at_row) : Vec<T>{};
        if (centre && i + r < n) block[r] -= at(centre + k);
        at(rows + (i + r) * width + k) = block[r];
      }
      store_panel<T>(panels + i * d, block, k, count);
    }
}

template <class T>
IVFAST_INLINE void pack_particles(const Small<T>& w, const T* x) {
  centre(w.centre, x, w.n, w.d);
  pack(w.x, w.x_panels, x, w.centre, w.n, w.d, w.width);
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

}  // namespace
}  // namespace IVFAST_ISA
}  // namespace ivfast
