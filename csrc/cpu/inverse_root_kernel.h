// The Newton–Schulz iteration for a^−½ of a symmetric matrix; included once per instruction set.
//
// Matrices are [size, size] padded to whole vectors, with rows `ld` apart: one vector more than `size`, because rows a
// power of two apart map to few cache sets. All matrices are polynomials in a, so only the blocks on and right of the
// diagonal are computed, and then mirrored.
#include <algorithm>
#include <cmath>
#include <limits>

#include "inverse_root.h"
#include "lanes.h"

namespace ivfast {
namespace IVFAST_ISA {
namespace {

template <class T>
struct Limits;  // ‖E‖ for a last step to E² and to E³, and full steps before it
template <>
struct Limits<float> {
  static constexpr double last = 1e-2, cubic = 4e-2;  // X is accurate to 3e-7 and 7e-7
  static constexpr int steps = 4;                     // condition number up to about 100: float is accurate enough
};
template <>
struct Limits<double> {
  static constexpr double last = 1e-5, cubic = 2e-4;  // 3e-16 and 4e-16
  static constexpr int steps = 16;                    // condition number up to 10⁸
};

struct Size {
  int64_t size, ld;
  int64_t area() const { return size * ld; }
};
template <class T>
Size padded(int64_t d) {
  const int64_t size = round_up(d, lanes<T>);
  return {size, size + lanes<float>};
}

// f(Σ_k a_ki b_kj, i, j) for each vector of columns j of every row i, on and right of the diagonal blocks
template <class T, class F>
IVFAST_INLINE void products(const T* a, const T* b, Size s, int64_t count, const F& f) {
  constexpr int R = group<T>, L = lanes<T>;
  columns<T>(s.size / L, [&](auto vectors, int64_t j) __attribute__((always_inline)) {
    constexpr int C = decltype(vectors)::value;
    for (int64_t i = 0; i < j + C * L; i += R) {
      Vec<T> acc[R][C] = {};
      const T *left = a + i, *right = b + j;
      for (int64_t k = 0; k < count; ++k, left += s.ld, right += s.ld) {
        Vec<T> column[C];
#pragma GCC unroll 8
        for (int v = 0; v < C; ++v) column[v] = at(right + v * L);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
          for (int v = 0; v < C; ++v) acc[r][v] += left[r] * column[v];
      }
#pragma GCC unroll 8
      for (int v = 0; v < C; ++v)
        if (i / L * L <= j + v * L)
#pragma GCC unroll 16
          for (int r = 0; r < R; ++r) f(acc[r][v], i + r, j + v * L);
    }
  });
}

// Copies the part right of the diagonal blocks, transposed, to their left
template <class T>
void mirror(T* x, Size s) {
  constexpr int L = lanes<T>;
  for (int64_t i = 0; i < s.size; i += L)
    for (int64_t j = i + L; j < s.size; j += L) {
      Vec<T> rows[L];
#pragma GCC unroll 16
      for (int r = 0; r < L; ++r) rows[r] = at(x + (i + r) * s.ld + j);
      transpose<T>(rows);
#pragma GCC unroll 16
      for (int r = 0; r < L; ++r) at(x + (j + r) * s.ld + i) = rows[r];
    }
}

// Row i of the identity at the columns from j on
template <class T>
IVFAST_INLINE Vec<T> identity(int64_t i, int64_t j) {
  const auto diagonal = lane_numbers<T>() == typename Simd<T>::Bits{} + typename Simd<T>::Scalar(i - j);
  return diagonal ? Vec<T>{} + T(1) : Vec<T>{};
}

// out = f(aᵀb, i, j) for matrices whose product is symmetric
template <class T, class F>
IVFAST_INLINE void symmetric_product(T* out, const T* a, const T* b, Size s, const F& f) {
  products(a, b, s, s.size, [&](Vec<T> sum, int64_t i, int64_t j) __attribute__((always_inline)) {
    at(out + i * s.ld + j) = f(sum, i, j);
  });
  mirror(out, s);
}

// out = aᵀb, which is symmetric: one copy of the code for all
template <class T>
void multiply(T* out, const T* a, const T* b, Size s) {
  symmetric_product(out, a, b, s, [](Vec<T> sum, int64_t, int64_t) __attribute__((always_inline)) { return sum; });
}

template <class T>
double norm(const T* x, Size s) {
  Vec<T> sum[4] = {};
  for (int64_t i = 0; i < s.size; ++i)
    for (int64_t j = 0; j < s.size; j += lanes<T>) sum[i % 4] += at(x + i * s.ld + j) * at(x + i * s.ld + j);
  return std::sqrt(double(sum_lanes<T>(sum[0] + sum[1] + sum[2] + sum[3])));
}

constexpr int buffers = 5;  // of the iteration

// With E = I − A in the first of `buffers` buffers from `e` on, returns the buffer that holds X = A^−½, or null if
// `steps` steps are not enough. error: ‖I − XAX‖ up to rounding.
template <class T>
const T* iterate(T* e, Size s, double& error) {
  T *t = e + s.area(), *w = t + s.area(), *x = w + s.area(), *y = x + s.area();
  const auto exchange = [](T*& a, T*& b) { T* const c = a; a = b, b = c; };
  const auto half_e = [&](int64_t i, int64_t j) __attribute__((always_inline)) {
    return identity<T>(i, j) + T(0.5) * at(e + i * s.ld + j);
  };
  for (int step = 0;; ++step) {
    error = norm(e, s);
    const bool last = error <= Limits<T>::cubic;
    if (!last && (step == Limits<T>::steps || !std::isfinite(error))) return nullptr;
    if (last && error > Limits<T>::last) {
      multiply(w, e, e, s);
      symmetric_product<T>(t, w, e, s, [&](Vec<T> sum, int64_t i, int64_t j) __attribute__((always_inline)) {
        return half_e(i, j) + T(0.375) * at(w + i * s.ld + j) + T(0.3125) * sum;
      });
    } else {
      symmetric_product<T>(t, e, e, s, [&](Vec<T> sum, int64_t i, int64_t j) __attribute__((always_inline)) {
        return half_e(i, j) + T(0.375) * sum;
      });
    }
    if (step > 0) multiply(y, x, t, s), exchange(x, y);
    if (last) {
      const double cube = error * error * error;
      error = error > Limits<T>::last ? 35 * error * cube / 128 : 5 * cube / 16;
      return step > 0 ? x : t;
    }
    if (step == 0) {
      for (int64_t i = 0; i < s.area(); ++i) x[i] = t[i];
    }
    multiply(w, t, t, s);
    symmetric_product<T>(y, w, e, s, [&](Vec<T> sum, int64_t i, int64_t j) __attribute__((always_inline)) {
      return identity<T>(i, j) - at(w + i * s.ld + j) + sum;  // I − W (I − E)
    });
    exchange(e, y);
  }
}

// Memory for `Root`, in elements of 8 bytes
template <class T>
int64_t root_size(int64_t d) {
  return buffers * padded<T>(d).area() + 3 * padded<double>(padded<T>(d).size).area();
}

// a^−½ of the symmetric g [d, d] in float64, padded as for `T`
template <class T>
struct Root {
  int64_t d;
  Size s = padded<T>(d), wide = padded<double>(s.size);
  double* g;        // [wide]
  double *x, *m;    // X and gX in float64
  T* iteration;     // `buffers` matrices
  double trace = 0, error = 0;

  Root(double* memory, int64_t d) : d(d), g(memory), x(g + wide.area()), m(x + wide.area()) {
    iteration = reinterpret_cast<T*>(m + wide.area());
  }

  // Whether this arithmetic is accurate enough. If so, sets x, trace and error, to NaN if g is not finite.
  bool run() {
    constexpr int L = lanes<double>;
    double size = 0, bound = 0;
    Vec<double> squares = {};
    for (int64_t i = 0; i < d; ++i) {
      Vec<double> sum = {};
      for (int64_t j = 0; j < wide.size; j += L) {
        const Vec<double> v = at(g + i * wide.ld + j);
        sum += v < 0 ? -v : v, squares += v * v;
      }
      size += g[i * wide.ld + i];
      bound = std::max(bound, sum_lanes<double>(sum));
    }
    const double square = sum_lanes<double>(squares);
    if (!std::isfinite(square)) return fill(std::numeric_limits<double>::quiet_NaN());
    if (size <= 0) return fill(0);
    const double scale = std::max(size / double(d), std::min(bound, std::sqrt(square)) / 2.2);
    T* const e = iteration;
    for (int64_t i = 0; i < s.size; ++i) {
      for (int64_t j = 0; j < s.size; ++j) e[i * s.ld + j] = T(-1 / scale * g[i * wide.ld + j]);
      if (i < d) e[i * s.ld + i] = T(1 - g[i * wide.ld + i] / scale);
    }
    const T* const root = iterate<T>(e, s, error);
    if (!root) return false;
    const double factor = 1 / std::sqrt(scale);
    for (int64_t i = 0; i < s.size; ++i) {
      for (int64_t j = 0; j < s.size; ++j) x[i * wide.ld + j] = factor * double(root[i * s.ld + j]);
      if (i >= d) x[i * wide.ld + i] = 0;
    }
    // One more step of order 2 for the trace only, in float64: errors of X, and the asymmetric part of M's errors,
    // enter only to second order.
    multiply(m, g, x, wide);
    Vec<double> cubic[2] = {};  // of MᵀM ∘ X: in the diagonal blocks, and right of them
    products(m, m, wide, wide.size, [&](Vec<double> sum, int64_t i, int64_t j) __attribute__((always_inline)) {
      cubic[i / L * L != j] += sum * at(x + i * wide.ld + j);
    });
    trace = -sum_lanes<double>(0.5 * cubic[0] + cubic[1]);
    for (int64_t i = 0; i < d; ++i) trace += 1.5 * m[i * wide.ld + i];
    return true;
  }

  bool fill(double value) {
    for (int64_t i = 0; i < wide.area(); ++i) x[i] = value;
    trace = value, error = value;
    return true;
  }
};

template <class S>
int64_t matrix_bytes(const SymmetricMatrix& matrix) {
  return 8 * root_size<double>(matrix.d);
}

template <class S>
void run_matrix(SymmetricMatrix& matrix) {
  const int64_t d = matrix.d;
  Root<double> root(static_cast<double*>(matrix.workspace), d);
  const S* const a = static_cast<const S*>(matrix.a);
  for (int64_t i = 0; i < root.wide.area(); ++i) root.g[i] = 0;
  for (int64_t i = 0; i < d; ++i)
    for (int64_t j = 0; j < d; ++j) root.g[i * root.wide.ld + j] = 0.5 * (double(a[i * d + j]) + double(a[j * d + i]));
  const bool served = root.run();
  S* const inverse = static_cast<S*>(matrix.inverse);
  for (int64_t i = 0; i < d; ++i)
    for (int64_t j = 0; j < d; ++j) inverse[i * d + j] = served ? S(root.x[i * root.wide.ld + j]) : S(NAN);
  matrix.trace = served ? root.trace : NAN, matrix.error = root.error;
}

}  // namespace

MatrixStages matrix_stages(Storage storage) {
  if (storage == Storage::float64) return {matrix_bytes<double>, run_matrix<double>};
  return {matrix_bytes<float>, run_matrix<float>};
}

}  // namespace IVFAST_ISA
}  // namespace ivfast
