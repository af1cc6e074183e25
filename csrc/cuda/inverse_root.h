// A symmetric matrix of up to 128 rows, held by one thread block in float64, and its inverse square root.
//
// A half of the matrix is stored in tiles of 4 x 4: row i = r·side + I has position r in the tiles of I. Thread t owns
// the t-th tile (I, J) with I >= J, and its element e = 4 r + c is at e·stride + t, so that neighbouring threads own
// neighbouring numbers. Two such halves fit into shared memory. Tiles of the other matrices are in global memory, where
// each is read only by its own thread.
#pragma once

#include <type_traits>
#include <vector>

#include "launch.h"

namespace ivfast {

constexpr int kMostRows = 128;
constexpr int kRootSteps = 24;
constexpr double kLast = 2e-4;  // below this ‖E‖ a step of order 4 is the last: the error, 35 ‖E‖⁴/128, is then 4e-16

template <class T>
__device__ __forceinline__ double to_double(T x) {
  if constexpr (std::is_same_v<T, double>) return x;
  else return static_cast<double>(static_cast<float>(x));
}

template <class T>
__device__ __forceinline__ T from_double(double x) {
  if constexpr (std::is_same_v<T, double>) return x;
  else return static_cast<T>(static_cast<float>(x));
}

// for matrices of up to 4 Side rows
template <int Side>
struct Halves {
  static constexpr int kSide = Side;
  static constexpr int kStride = Side * (Side + 1) / 2;  // between the elements of a tile
  static constexpr int kElements = 16 * kStride, kKept = 3 * kElements;  // of a half; of the part in global memory
  static constexpr int kThreads = (kStride + 31) / 32 * 32;
  static constexpr size_t kShared = 2 * sizeof(double) * kElements;
  int rows, side, tiles;

  explicit Halves(int64_t rows)
      : rows(static_cast<int>(rows)), side((this->rows + 3) / 4), tiles(side * (side + 1) / 2) {}
  int threads() const { return (tiles + 31) / 32 * 32; }
};

// f(Halves) for matrices of this many rows
template <class F>
void by_rows(const char* op, int64_t rows, F f) {
  STD_TORCH_CHECK(rows >= 1 && rows <= kMostRows, op, " in CUDA C++ takes matrices of 1 to ", kMostRows, " rows, got ", rows);
  if (rows <= 64) f(Halves<16>(rows));
  else f(Halves<32>(rows));
}

struct Tile4 {
  double v[4][4];

  template <class F>  // f(r, c, element)
  __device__ __forceinline__ void each(F f) {
#pragma unroll
    for (int e = 0; e < 16; ++e) f(e / 4, e % 4, v[e / 4][e % 4]);
  }
};

// The tile that this thread owns, if any
template <int Side>
struct Owner : Halves<Side> {
  using Matrix = Halves<Side>;
  using Matrix::kStride, Matrix::rows, Matrix::side, Matrix::tiles;
  int I, J, mine;  // which tile; a thread without one reads the last and never writes it
  bool exists;

  __device__ explicit Owner(const Matrix& halves) : Owner(halves, threadIdx.x) {}
  __device__ Owner(const Matrix& halves, int t) : Matrix(halves) {
    I = static_cast<int>((sqrtf(8.f * t + 1.f) - 1.f) / 2.f);
    while (I * (I + 1) / 2 > t) --I;
    while ((I + 1) * (I + 2) / 2 <= t) ++I;
    J = t - I * (I + 1) / 2;
    exists = t < tiles, mine = min(t, tiles - 1);
  }
  __device__ __forceinline__ int row(int r) const { return r * side + I; }
  __device__ __forceinline__ int column(int c) const { return c * side + J; }
  __device__ __forceinline__ bool inside(int r, int c) const { return exists && row(r) < rows && column(c) < rows; }
  __device__ __forceinline__ double one(int r, int c) const { return I == J && r == c ? 1. : 0.; }
  __device__ __forceinline__ Tile4 load(const double* half) const {
    Tile4 tile = {};
    if (exists) tile.each([&](int r, int c, double& x) { x = at(half, r, c); });
    return tile;
  }
  __device__ __forceinline__ void store(double* half, Tile4 tile) const {
    if (exists) tile.each([&](int r, int c, double x) { half[(4 * r + c) * kStride + mine] = x; });
  }
  __device__ __forceinline__ double at(const double* half, int r, int c) const {
    return half[(4 * r + c) * kStride + mine];
  }
  // x(i, j) for each element of this tile that exists in `half`
  template <class F>
  __device__ __forceinline__ void fill(double* half, F x) const {
    if (!exists) return;
#pragma unroll 4
    for (int e = 0; e < 16; ++e) {
      const int i = row(e / 4), j = column(e % 4);
      half[e * kStride + mine] = i < rows && j < rows ? x(i, j) : 0.;
    }
  }
  // replaces each of them with x(element)
  template <class F>
  __device__ __forceinline__ void replace(double* half, F x) const {
    fill(half, [&](int i, int j) { return x(half[(4 * (i / side) + j / side) * kStride + mine]); });
  }
  // f(i, j, element) for each of them
  template <class F>
  __device__ __forceinline__ void each(const double* half, F f) const {
    if (!exists) return;
#pragma unroll 4
    for (int e = 0; e < 16; ++e) {
      const int i = row(e / 4), j = column(e % 4);
      if (i < rows && j < rows) f(i, j, half[e * kStride + mine]);
    }
  }
  // Σ f(r, c, element) over this tile, as part of a sum over the matrix
  template <class F>
  __device__ __forceinline__ double sum(const double* half, F f) const {
    double total = 0;
    if (!exists) return total;
#pragma unroll
    for (int e = 0; e < 16; ++e) total += f(e / 4, e % 4, at(half, e / 4, e % 4));
    return I == J ? total : 2 * total;
  }
};

// The addresses of the elements in rows I, columns K: at + r·row + k·column
struct Place {
  int at, row, column;

  __device__ __forceinline__ Place(int I, int K, int stride) {
    const bool lower = I >= K;
    at = lower ? I * (I + 1) / 2 + K : K * (K + 1) / 2 + I;
    row = lower ? 4 * stride : stride, column = lower ? stride : 4 * stride;
  }
};

// This thread's tile of A B, for symmetric A and B that commute, so that the product is also symmetric
template <int Side>
__device__ __forceinline__ Tile4 product(const Owner<Side>& own, const double* A, const double* B) {
  Tile4 C = {};
  if (!own.exists) return C;
#pragma unroll 1
  for (int K = 0; K < own.side; ++K) {
    const Place a(own.I, K, own.kStride), b(own.J, K, own.kStride);
#pragma unroll 4
    for (int k = 0; k < 4; ++k) {
      double a_k[4], b_k[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        a_k[r] = A[a.at + r * a.row + k * a.column];
        b_k[r] = B[b.at + r * b.row + k * b.column];
      }
      C.each([&](int r, int c, double& x) { x += a_k[r] * b_k[c]; });
    }
  }
  if (own.I == own.J) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int c = 0; c < r; ++c) C.v[r][c] = C.v[c][r] = 0.5 * (C.v[r][c] + C.v[c][r]);
    }
  }
  return C;
}

struct Sum {
  __device__ double operator()(double a, double b) const { return a + b; }
};
struct Largest {
  __device__ double operator()(double a, double b) const { return fmax(a, b); }
};

// The same result in every thread of the block, in a fixed order; its writes have a barrier before and after.
template <class F>
__device__ __forceinline__ double over_block(double value, F combine) {
  __shared__ double parts[32];
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) value = combine(value, __shfl_xor_sync(~0u, value, lane));
  __syncthreads();
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  value = parts[0];
  const int warps = blockDim.x / 32;
  for (int warp = 1; warp < warps; ++warp) value = combine(value, parts[warp]);
  return value;
}

// The divisor of a, at least λ_max / 2.2; a half of a is in shared memory.
template <int Side>
__device__ __forceinline__ double scale_of(const Owner<Side>& own, const double* half) {
  const double trace = over_block(own.sum(half, [&](int r, int c, double x) { return own.one(r, c) * x; }), Sum{});
  const double squares = over_block(own.sum(half, [&](int, int, double x) { return x * x; }), Sum{});
  double row = 0;
  const int i = threadIdx.x;
  if (i < own.rows) {
    for (int K = 0; K < own.side; ++K) {
      const Place place(i % own.side, K, own.kStride);
      for (int k = 0; k < 4; ++k) row += fabs(half[place.at + i / own.side * place.row + k * place.column]);
    }
  }
  const double bound = fmin(over_block(row, Largest{}), sqrt(squares));
  const double scale = fmax(trace / own.rows, bound / 2.2);
  return scale == 0 ? 1. : scale;
}

struct Root {
  double trace, error;
};

// Writes a^−½ over the second of `halves` in shared memory, where the first holds a, 0 beyond its rows. Returns Tr √a
// and the remaining error ‖I − X a X‖, NaN if a is not finite. `kept` is room for three halves in global memory: no
// tile stays in registers during a product, because the registers of 17 warps hold only one.
template <int Side>
__device__ __forceinline__ Root root_of(const Owner<Side>& own, double* halves, double* kept) {
  double *const P = halves, *const Q = P + own.kElements;
  double *const kept_a = kept, *const kept_X = kept + own.kElements, *const kept_A = kept_X + own.kElements;
  own.store(kept_a, own.load(P));
  __syncthreads();
  const double scale = scale_of(own, P);
  Tile4 tile = own.load(P);
  // ones on the diagonal beyond the rows, where nothing changes
  const double per_scale = 1 / scale;
  tile.each([&](int r, int c, double& x) { x = own.row(r) < own.rows ? x * per_scale : own.one(r, c); });
  own.store(P, tile);
  const double start = sqrt(per_scale);
  tile.each([&](int r, int c, double& x) { x = start * own.one(r, c); });
  own.store(kept_X, tile);

  double error = 0;
  for (int step = 0; step < kRootSteps; ++step) {
    error = own.sum(P, [&](int r, int c, double x) { return (own.one(r, c) - x) * (own.one(r, c) - x); });
    error = sqrt(over_block(error, Sum{}));  // P needs its barriers, too
    if (error != error) break;

    own.store(kept_A, own.load(P));
    tile = product(own, P, P);
    if (error <= kLast) {  // X ← X (35 − 35 A + 21 A² − 5 A³)/16 = X (I + E/2 + 3E²/8 + 5E³/16)
      own.store(Q, tile);
      __syncthreads();
      tile = product(own, P, Q);
      tile.each([&](int r, int c, double& x) {
        x = (35 * own.one(r, c) - 35 * own.at(P, r, c) + 21 * own.at(Q, r, c) - 5 * x) / 16;
      });
      __syncthreads();
      own.store(Q, tile), own.store(P, own.load(kept_X));
      __syncthreads();
      own.store(kept_X, product(own, P, Q));
      break;
    }
    // T = (15 − 10 A + 3 A²)/8,  X ← X T,  A ← T² A
    tile.each([&](int r, int c, double& x) { x = (15 * own.one(r, c) - 10 * own.at(P, r, c) + 3 * x) / 8; });
    own.store(Q, tile);
    __syncthreads();
    own.store(P, own.load(kept_X));
    __syncthreads();
    own.store(kept_X, product(own, P, Q));
    tile = product(own, Q, Q);
    __syncthreads();
    own.store(Q, tile), own.store(P, own.load(kept_A));
    __syncthreads();
    tile = product(own, P, Q);
    __syncthreads();
    own.store(P, tile);
  }

  // Tr √a = ½ Tr(aX) (3 − …), as in one more step of order 2: errors of X enter only to second order
  tile = own.load(kept_X);
  tile.each([&](int, int, double& x) { x = error == error ? x : error; });
  __syncthreads();
  own.store(Q, tile), own.store(P, own.load(kept_a));
  __syncthreads();
  tile = product(own, P, Q);
  __syncthreads();
  own.store(P, tile);
  double trace = over_block(own.sum(P, [&](int r, int c, double x) { return own.one(r, c) * x; }), Sum{});
  if (error <= kLast) {
    tile = product(own, P, P);
    const double third = own.sum(Q, [&](int r, int c, double x) { return tile.v[r][c] * x; });
    trace = 1.5 * trace - 0.5 * over_block(third, Sum{});
    error = 35. / 128 * error * error * error * error;
  }
  return {error == error ? trace : error, error};
}

// f(T{}) for the dtype T of x, including float64
template <class F>
void by_any_dtype(const char* op, const Tensor& x, F f) {
  if (x.scalar_type() == ScalarType::Double) f(double{});
  else by_dtype(op, x, f);
}

}  // namespace ivfast
