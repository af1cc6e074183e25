// The latent distance of codes through their Gram matrix; included once per instruction set.
//
// W [rows, m] is processed in chunks of rows. Its elements are (z − z₀) − (μ − z₀), with z₀ the first code: they are
// exact relative to their own size however far the mean is from 0.
#include <algorithm>

#include "fld.h"
#include "inverse_root_kernel.h"

namespace ivfast {
namespace IVFAST_ISA {
namespace {

// Arithmetic T on codes stored as S.
template <class S, class T>
struct Layout {
  const Codes& codes;
  const S* z = static_cast<const S*>(codes.z);
  Size s = padded<T>(codes.m), wide = padded<double>(s.size);
  int64_t columns = round_up(codes.d, lanes<float>);
  double* mean;    // μ [d]
  T* slope;        // 2μ/n [d]
  double* sums;    // [parts, d], of z − z₀; after `center` the first holds μ − z₀, which μ would round
  double* roots;   // a Root
  double* grams;   // [parts], Σ over a part's chunks of their Gram matrices
  T* chunks;       // [parts, chunk], rows of W
  T* products;     // [parts], a chunk's Gram matrix; later the first holds I − X for the gradient

  explicit Layout(const Codes& codes) : codes(codes) {
    mean = static_cast<double*>(codes.workspace);
    slope = reinterpret_cast<T*>(mean + columns);
    sums = mean + 2 * columns;
    roots = sums + codes.parts * columns;
    grams = roots + root_size<T>(codes.m);
    chunks = reinterpret_cast<T*>(grams + codes.parts * wide.area());
    products = chunks + codes.parts * chunk * s.ld;
  }
  int64_t bytes() const {
    const char* const end = reinterpret_cast<const char*>(products + codes.parts * s.area());
    return end - static_cast<const char*>(codes.workspace);
  }
  // f(first row, rows, memory) for each chunk of a part
  template <class F>
  void each_chunk(int64_t part, const F& f) const {
    for (int64_t first = part * chunk; first < codes.rows; first += codes.parts * chunk)
      f(first, std::min(chunk, codes.rows - first), chunks + part * chunk * s.ld);
  }
  // Rows of W, with zeros after their m elements
  void fill(T* w, int64_t first, int64_t count) const {
    const int64_t d = codes.d;
    if (codes.wide()) {
      for (int64_t r = 0; r < count; ++r) {
        const double center = sums[first + r];
        for (int64_t i = 0; i < s.size; ++i)
          w[r * s.ld + i] = i < codes.n ? (T(load(z[i * d + first + r])) - T(load(z[first + r]))) - T(center) : T(0);
      }
      return;
    }
    for (int64_t j = 0; j < s.size; j += lanes<T>) {
      const Vec<T> origin = load_part<T>(z, j, d);
      Vec<T> center = {};
      for (int l = 0; l < lanes<T> && j + l < d; ++l) center[l] = T(sums[j + l]);
      for (int64_t r = 0; r < count; ++r)
        at(w + r * s.ld + j) = (load_part<T>(z + (first + r) * d, j, d) - origin) - center;
    }
  }
};

template <class S, class T>
int64_t codes_bytes(const Codes& codes) {
  return Layout<S, T>(codes).bytes();
}

// Σ (z − z₀) over the rows of a part, in T for 64 rows at a time. The columns of a wide set are its rows; `center` sums
// them.
template <class S, class T>
void means(const Codes& codes, int64_t part) {
  const Layout<S, T> at_(codes);
  double* const sums = at_.sums + part * at_.columns;
  for (int64_t j = 0; j < at_.columns; ++j) sums[j] = 0;
  if (codes.wide()) return;
  at_.each_chunk(part, [&](int64_t first, int64_t count, T*) {
    for (int64_t j = 0; j < codes.d; j += lanes<T>) {
      const Vec<T> origin = load_part<T>(at_.z, j, codes.d);
      for (int64_t r = 0; r < count; r += 64) {
        Vec<T> sum = {};
        for (int64_t i = r; i < std::min(r + 64, count); ++i)
          sum += load_part<T>(at_.z + (first + i) * codes.d, j, codes.d) - origin;
        for (int l = 0; l < lanes<T> && j + l < codes.d; ++l) sums[j + l] += double(sum[l]);
      }
    }
  });
}

template <class S, class T>
void center(const Codes& codes) {
  const Layout<S, T> at(codes);
  for (int64_t j = 0; j < codes.d; ++j) {
    double sum = 0;
    if (codes.wide())
      for (int64_t i = 1; i < codes.n; ++i) sum += double(T(load(at.z[i * codes.d + j])) - T(load(at.z[j])));
    else
      for (int64_t part = 0; part < codes.parts; ++part) sum += at.sums[part * at.columns + j];
    at.sums[j] = sum / double(codes.n);
    at.mean[j] = double(load(at.z[j])) + at.sums[j];
    at.slope[j] = T(2 * at.mean[j] / double(codes.n));
  }
  for (int64_t j = codes.d; j < at.columns; ++j) at.slope[j] = 0;
}

// gram += wᵀw of a chunk [count, m], on and right of the diagonal blocks
template <class T>
void add_gram(double* gram, T* product, const T* w, Size s, Size wide, int64_t count) {
  products(w, w, s, count, [&](Vec<T> sum, int64_t i, int64_t j) __attribute__((always_inline)) {
    at(product + i * s.ld + j) = sum;
  });
  for (int64_t i = 0; i < s.size; ++i)
    for (int64_t j = i / lanes<T> * lanes<T>; j < s.size; ++j) gram[i * wide.ld + j] += double(product[i * s.ld + j]);
}

// Σ wᵀw over the chunks of a part, on and right of the diagonal blocks
template <class S, class T>
void scatter(const Codes& codes, int64_t part) {
  const Layout<S, T> at(codes);
  double* const gram = at.grams + part * at.wide.area();
  for (int64_t i = 0; i < at.wide.area(); ++i) gram[i] = 0;
  at.each_chunk(part, [&](int64_t first, int64_t count, T* w) {
    at.fill(w, first, count);
    add_gram(gram, at.products + part * at.s.area(), w, at.s, at.wide, count);
  });
}

template <class T>
bool root(Codes& codes) {
  const Layout<T, T> at(codes);  // the same whatever codes are stored as, which are not read here
  const int64_t m = codes.m, n = codes.n;
  Root<T> root(at.roots, m);
  for (int64_t i = 0; i < root.wide.area(); ++i) root.g[i] = 0;
  double size = 0;  // Tr Σ
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = i; j < m; ++j) {
      double sum = 0;
      for (int64_t part = 0; part < codes.parts; ++part) sum += at.grams[part * at.wide.area() + i * at.wide.ld + j];
      root.g[i * root.wide.ld + j] = root.g[j * root.wide.ld + i] = sum / double(n - 1);
      size += i == j ? sum / double(n - 1) : 0;
    }
  // in float the squares of very large or very small codes leave the range
  if (sizeof(T) < sizeof(double) && !(size > 1e-25 && size < 1e25)) return false;
  const double filled = codes.wide() ? size / double(n - 1) : 0;  // replaces the eigenvalue 0 of the vector 1
  for (int64_t i = 0; codes.wide() && i < m; ++i)
    for (int64_t j = 0; j < m; ++j) root.g[i * root.wide.ld + j] += filled / double(n);
  const bool served = root.run();
  codes.error = root.error;
  codes.distance = size + double(codes.d) - 2 * (root.trace - std::sqrt(filled));
  for (int64_t j = 0; j < codes.d; ++j) codes.distance += at.mean[j] * at.mean[j];
  // the gradient's matrix 2 (I − X) / (n − 1)
  T* const b = at.products;
  for (int64_t i = 0; i < at.s.size; ++i)
    for (int64_t j = 0; j < at.s.size; ++j) {
      const double x = served ? root.x[i * root.wide.ld + j] : 0;
      b[i * at.s.ld + j] = i < m && j < m ? T(2 * (double(i == j) - x) / double(n - 1)) : T(0);
    }
  return served;
}

// R rows of WB at the columns from j on
template <int R, int C, class T>
IVFAST_INLINE void row_products(Vec<T> (&acc)[R][C], const T* w, const T* b, Size s) {
  for (int64_t k = 0; k < s.size; ++k) {
    Vec<T> column[C];
#pragma GCC unroll 8
    for (int v = 0; v < C; ++v) column[v] = at(b + k * s.ld + v * lanes<T>);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < C; ++v) acc[r][v] += w[r * s.ld + k] * column[v];
  }
}

// 2μ/n + WB
template <class S, class T>
void gradients(const Codes& codes, int64_t part) {
  constexpr int L = lanes<T>;
  const Layout<S, T> at_(codes);
  const Size s = at_.s;
  S* const gradient = static_cast<S*>(codes.gradient);
  at_.each_chunk(part, [&](int64_t first, int64_t count, T* w) {
    at_.fill(w, first, count);
    columns<T>(s.size / L, [&](auto vectors, int64_t j) __attribute__((always_inline)) {
      constexpr int C = decltype(vectors)::value, R = C == 1 ? 2 * group<T> : group<T>;
      for (int64_t i = 0; i < count; i += R) {
        Vec<T> acc[R][C] = {};
        row_products<R, C, T>(acc, w + i * s.ld, at_.products + j, s);  // rows beyond `count` are not stored
        for (int r = 0; r < R && i + r < count; ++r)
#pragma GCC unroll 8
          for (int v = 0; v < C; ++v) {
            const int64_t row = first + i + r, c = j + v * L;
            if (codes.wide())
              for (int l = 0; l < L && c + l < codes.n; ++l)
                store(gradient + (c + l) * codes.d + row, at_.slope[row] + acc[r][v][l]);
            else
              store_part<T>(gradient + row * codes.d, at(at_.slope + c) + acc[r][v], c, codes.d);
          }
      }
    });
  });
}

template <class S, class T>
CodesStages codes_stages_of() {
  return {codes_bytes<S, T>, means<S, T>, center<S, T>, scatter<S, T>, root<T>, gradients<S, T>};
}

}  // namespace

CodesStages codes_stages(Storage storage) {
  return IVFAST_BY_STORAGE(storage, codes_stages_of);
}

}  // namespace IVFAST_ISA
}  // namespace ivfast
