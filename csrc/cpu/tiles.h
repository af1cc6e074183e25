// Vectors of IVFAST_VECTOR_BYTES, and tiles of pairwise matrices in them; included once per instruction set.
//
// A tile is at most 64×64 and lives on the stack. If the matrix is symmetric, a tile (I, J) is used for the sums of
// rows I and, transposed, for those of rows J.
#pragma once

#include <cstdint>
#include <utility>

#include "../math.h"
#include "convert.h"

#define IVFAST_INLINE static inline __attribute__((always_inline))

namespace ivfast {
namespace IVFAST_ISA {
namespace {

template <class T>
struct Simd;
template <>
struct Simd<float> {
  typedef float Vector __attribute__((vector_size(IVFAST_VECTOR_BYTES), may_alias));
  using Scalar = int32_t;
  typedef Scalar Bits __attribute__((vector_size(IVFAST_VECTOR_BYTES), may_alias));
};
template <>
struct Simd<double> {
  typedef double Vector __attribute__((vector_size(IVFAST_VECTOR_BYTES), may_alias));
  using Scalar = int64_t;
  typedef Scalar Bits __attribute__((vector_size(IVFAST_VECTOR_BYTES), may_alias));
};
template <class T>
using Vec = typename Simd<T>::Vector;
template <class T>
constexpr int lanes = IVFAST_VECTOR_BYTES / int(sizeof(T));

constexpr int64_t tile = 64;  // rows and columns of a tile, and its leading dimension
// The register tile: its rows divide the number of lanes, so that a group of rows lies in one panel.
template <class T>
constexpr int group = lanes<T> < IVFAST_TILE_ROWS ? lanes<T> : IVFAST_TILE_ROWS;

template <class T>
IVFAST_INLINE Vec<T>& at(T* p) {
  return *reinterpret_cast<Vec<T>*>(p);
}
template <class T>
IVFAST_INLINE const Vec<T>& at(const T* p) {
  return *reinterpret_cast<const Vec<T>*>(p);
}
IVFAST_INLINE int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

template <class T, int step, int... lane>
IVFAST_INLINE void swap_blocks(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, lane...>) {
  constexpr int L = lanes<T>;
#if defined(__clang__) || __GNUC__ >= 12
  const Vec<T> low = __builtin_shufflevector(a, b, (lane & step ? L + lane - step : lane)...);
  b = __builtin_shufflevector(a, b, (lane & step ? L + lane : lane + step)...);
#else
  const Vec<T> low = __builtin_shuffle(a, b, typename Simd<T>::Bits{(lane & step ? L + lane - step : lane)...});
  b = __builtin_shuffle(a, b, typename Simd<T>::Bits{(lane & step ? L + lane : lane + step)...});
#endif
  a = low;
}

// log2(lanes) rounds; each swaps the off-diagonal blocks of every square of side 2 step
template <class T, int step = lanes<T> / 2>
IVFAST_INLINE void transpose(Vec<T> (&rows)[lanes<T>]) {
#pragma GCC unroll 16
  for (int r = 0; r < lanes<T>; ++r)
    if (!(r & step)) swap_blocks<T, step>(rows[r], rows[r + step], std::make_integer_sequence<int, lanes<T>>());
  if constexpr (step > 1) transpose<T, step / 2>(rows);
}

// The first `count` lanes, zeros in the others; `available` elements may be read.
template <class T, class S>
IVFAST_INLINE Vec<T> load_lanes(const S* from, int64_t count, int64_t available) {
  constexpr int L = lanes<T>;
  alignas(64) T value[L] = {};
  if (available < L) {
    for (int64_t l = 0; l < count; ++l) value[l] = load(from[l]);
    return at(value);
  }
  const Vec<T> whole = load_vector(from);
  if (count >= L) return whole;
  typename Simd<T>::Bits lane;
  for (int l = 0; l < L; ++l) lane[l] = l;
  return lane < typename Simd<T>::Bits{} + typename Simd<T>::Scalar(count) ? whole : Vec<T>{};
}

// Rows of lanes × lanes into a panel [d, lanes] at its columns [k, k + count).
template <class T>
IVFAST_INLINE void store_panel(T* panel, Vec<T> (&rows)[lanes<T>], int64_t k, int64_t count) {
  transpose<T>(rows);
  if (count >= lanes<T>)
#pragma GCC unroll 16
    for (int c = 0; c < lanes<T>; ++c) at(panel + (k + c) * lanes<T>) = rows[c];
  else
    for (int64_t c = 0; c < count; ++c) at(panel + (k + c) * lanes<T>) = rows[c];
}

// A matrix [n, d] as panels of `lanes` rows, each [d, lanes]: element (i, k) of row i is row(i)[k * lanes].
template <class T>
IVFAST_INLINE const T* row(const T* panels, int64_t i, int64_t d) {
  const int64_t lane = i % lanes<T>;
  return panels + (i - lane) * d + lane;
}

// What a pair of numbers adds to a sum over columns.
template <class T>
struct Product {
  IVFAST_INLINE void add(Vec<T>& sum, T a, Vec<T> b) { sum += a * b; }
};

// acc[r][v] += Σ_k a_{i+r,k} b_{j+v·lanes…,k}, or what `Term` makes of the two, for k in [first, last)
template <class Term, class T, int R, int C>
IVFAST_INLINE void product(Vec<T> (&acc)[R][C], const T* a, const T* b, int64_t d, int64_t first, int64_t last) {
  constexpr int L = lanes<T>;
  for (int64_t k = first; k < last; ++k) {
    Vec<T> column[C];
#pragma GCC unroll 8
    for (int v = 0; v < C; ++v) column[v] = at(b + v * L * d + k * L);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < C; ++v) Term::add(acc[r][v], a[k * L + r], column[v]);
  }
}

template <int C>
struct Count {
  static constexpr int value = C;
};

// f(Count<C>, first column) for groups of C <= IVFAST_TILE_VECTORS vectors that cover `vectors`
template <class T, int C = IVFAST_TILE_VECTORS, class F>
IVFAST_INLINE void columns(int64_t vectors, const F& f, int64_t first = 0) {
  for (; first + C <= vectors; first += C) f(Count<C>{}, first * lanes<T>);
  if constexpr (C > 1)
    if (first < vectors) columns<T, C - 1>(vectors, f, first);
}

// Rows [i, i + rows) against rows [j, j + cols) of matrices padded with zeros: whole groups against whole vectors.
struct Range {
  int64_t i, rows, j, cols;
};

// Two panels of a group of columns stay in the L1 cache while the rows are processed.
constexpr int64_t depth = 128;

// out_ij = f(Σ_k a_ik b_jk [+ Σ_k b_ik a_jk], i, j), i and j counted within the tile [rows, tile]; `Term` as in `product`
template <bool symmetric, class Term, class T, class F>
IVFAST_INLINE void pair_tile_sums(T* out, const T* a, const T* b, Range t, int64_t d, const F& f) {
  constexpr int R = group<T>, L = lanes<T>;
  for (int64_t first = 0; first < d; first += depth) {
    const int64_t last = first + depth < d ? first + depth : d;
    columns<T>(t.cols / L, [&](auto count, int64_t j) __attribute__((always_inline)) {
      constexpr int C = decltype(count)::value;
      for (int64_t i = 0; i < t.rows; i += R) {
        Vec<T> acc[R][C] = {};
        T* const corner = out + i * tile + j;
        if (first > 0)
#pragma GCC unroll 16
          for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < C; ++v) acc[r][v] = at(corner + r * tile + v * L);
        product<Term, T, R, C>(acc, row(a, t.i + i, d), b + (t.j + j) * d, d, first, last);
        if constexpr (symmetric) product<Term, T, R, C>(acc, row(b, t.i + i, d), a + (t.j + j) * d, d, first, last);
        if (last == d)
#pragma GCC unroll 16
          for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < C; ++v) at(corner + r * tile + v * L) = f(acc[r][v], i + r, j + v * L);
        else
#pragma GCC unroll 16
          for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < C; ++v) at(corner + r * tile + v * L) = acc[r][v];
      }
    });
  }
}

template <bool symmetric, class T, class F>
IVFAST_INLINE void product_tile(T* out, const T* a, const T* b, Range t, int64_t d, const F& f) {
  pair_tile_sums<symmetric, Product<T>>(out, a, b, t, d, f);
}

// out_i += Σ_j K_ij y_j for `rows` rows i, in whole groups, and `cols` columns j; K_ij at i * row_step +
// j * column_step. The tile's sum starts at 0, so the long sum over tiles is rounded only once per tile.
template <int row_step, int column_step, class T>
void accumulate(T* out, const T* K, const T* y, int64_t rows, int64_t cols, int64_t ld, int64_t width) {
  constexpr int R = group<T>, L = lanes<T>;
  columns<T>(width / L, [&](auto count, int64_t k) __attribute__((always_inline)) {
    constexpr int C = decltype(count)::value;
    for (int64_t i = 0; i < rows; i += R) {
      Vec<T> acc[R][C] = {};
      for (int64_t j = 0; j < cols; ++j) {
        Vec<T> value[C];
#pragma GCC unroll 8
        for (int v = 0; v < C; ++v) value[v] = at(y + j * ld + k + v * L);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
          for (int v = 0; v < C; ++v) acc[r][v] += K[(i + r) * row_step + j * column_step] * value[v];
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < C; ++v) at(out + (i + r) * ld + k + v * L) += acc[r][v];
    }
  });
}

// out_i += Σ_j K_ij
template <class T>
void add_row_sums(T* out, const T* K, int64_t rows, int64_t cols) {
  constexpr int L = lanes<T>;
  for (int64_t i = 0; i < rows; i += L) {
    Vec<T> sums[L] = {}, total = {};
#pragma GCC unroll 16
    for (int r = 0; r < L; ++r)
      for (int64_t j = 0; i + r < rows && j < cols; j += L) sums[r] += at(K + (i + r) * tile + j);
    transpose<T>(sums);
#pragma GCC unroll 16
    for (int l = 0; l < L; ++l) total += sums[l];
    at(out + i) += total;
  }
}

// out_j += Σ_i K_ij
template <class T>
void add_column_sums(T* out, const T* K, int64_t rows, int64_t cols) {
  constexpr int L = lanes<T>;
  for (int64_t j = 0; j < cols; j += L) {
    Vec<T> sum = {};
    for (int64_t i = 0; i < rows; ++i) sum += at(K + i * tile + j);
    at(out + j) += sum;
  }
}

}  // namespace
}  // namespace IVFAST_ISA
}  // namespace ivfast
