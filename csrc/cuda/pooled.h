// Two samples of up to 256 rows each, processed by a thread block that owns a few rows of one of them.
//
// A thread owns a column: a row of the block's own sample or of the other one. The gradient of the block's rows needs
// no other block. Sums over blocks are reported, and added by the last block to report (reports.h).
#pragma once

#include "particles.h"
#include "reports.h"

namespace ivfast {

constexpr int kMostColumns = 2 * kMostParticles;
constexpr int kWidest = 128;  // dimensions

// One block's view of `Arrays` arrays [n, d] and [m, d] of the two samples: its own first, with `own` columns, then the
// other with `columns - own`. If no pairs between the samples are needed, columns = own.
template <int Arrays, class T>
struct Pool {
  const T *ours[Arrays], *theirs[Arrays];
  int own, columns, d, first_row;
  bool whole;  // four elements can be loaded at once
};

// The layout of [columns, d] in shared memory: 4 quads dimensions at a time, with rows an odd number of fours apart, so
// that eight threads reading eight consecutive rows hit different banks.
struct Panels {
  int quads = 1, stride = 4, floats = 0;

  Panels(int columns, int d, int arrays, size_t available) {
    const int all = (d + 3) / 4;
    const auto bytes = [&](int quads) { return sizeof(float) * arrays * columns * 4 * (quads | 1); };
    int count = 1;
    for (quads = all; quads > 1 && bytes(quads) > available; quads = (all + count - 1) / count) ++count;
    stride = 4 * (quads | 1), floats = columns * stride;
  }

  // All dimensions at once, for eight threads that read two rows of four fours each
  Panels(int columns, int d) : quads((d + 3) / 4), stride((quads + 3) / 8 * 32 + 16), floats(columns * stride) {}
};

// Four elements of a row in float32, 0 beyond d
template <class T>
__device__ __forceinline__ float4 quad_of(const T* row, int column, int d, bool whole) {
  struct alignas(4 * sizeof(T)) Quad {
    T at[4];
  };
  if (whole) {
    const Quad v = *reinterpret_cast<const Quad*>(row + column);
    return make_float4(
        static_cast<float>(v.at[0]), static_cast<float>(v.at[1]), static_cast<float>(v.at[2]),
        static_cast<float>(v.at[3]));
  }
  float v[4];
#pragma unroll
  for (int c = 0; c < 4; ++c) v[c] = column + c < d ? static_cast<float>(row[column + c]) : 0.f;
  return make_float4(v[0], v[1], v[2], v[3]);
}

template <class T>
__device__ __forceinline__ bool whole_quads(const T* x, int d) {
  return d % 4 == 0 && reinterpret_cast<uintptr_t>(x) % (4 * sizeof(T)) == 0;
}

struct Unchanged {
  __device__ float operator()(int, float x) const { return x; }
};

// The dimensions from `first` on of every column: panels + a · floats holds transform(a, x) of array a, with x = 0
// beyond d. Each thread has eight loads in flight.
template <int Arrays, class T, class F = Unchanged>
__device__ __forceinline__ void fill_panels(
    float* panels, const Panels& plan, const Pool<Arrays, T>& pool, int first, F transform = {}) {
  constexpr int at_once = 8 / Arrays;
  const int rows_on = blockDim.x / plan.quads, quads_on = blockDim.x % plan.quads;
  int row = threadIdx.x / plan.quads, quad = threadIdx.x % plan.quads;
  while (row < pool.columns) {
    float4 v[at_once][Arrays];
    int to[at_once];
#pragma unroll
    for (int load = 0; load < at_once; ++load) {
      const bool is_own = row < pool.own;
      const int column = first + 4 * quad;
      to[load] = row < pool.columns ? row * plan.stride + 4 * quad : -1;
#pragma unroll
      for (int a = 0; a < Arrays; ++a) {
        if (to[load] < 0) continue;
        const T* x = is_own ? pool.ours[a] + row * pool.d : pool.theirs[a] + (row - pool.own) * pool.d;
        v[load][a] = column < pool.d ? quad_of(x, column, pool.d, pool.whole) : float4{};
      }
      row += rows_on, quad += quads_on;
      if (quad >= plan.quads) quad -= plan.quads, ++row;
    }
#pragma unroll
    for (int load = 0; load < at_once; ++load) {
#pragma unroll
      for (int a = 0; a < Arrays; ++a) {
        if (to[load] < 0) continue;
        const float4 x = v[load][a];
        *reinterpret_cast<float4*>(panels + a * plan.floats + to[load]) =
            make_float4(transform(a, x.x), transform(a, x.y), transform(a, x.z), transform(a, x.w));
      }
    }
  }
}

// How the threads of a block divide sums over the columns of a panel of `quads` fours of dimensions: each takes four
// dimensions and a slice of the columns.
struct Slices {
  int quad, slice, count;

  __device__ explicit Slices(int quads) {
    int power = 1;
    while (power < quads) power *= 2;
    quad = threadIdx.x % power, slice = threadIdx.x / power, count = blockDim.x / power;
  }
  __device__ int width() const { return 4 * static_cast<int>(blockDim.x) / count; }
};

// f(row, column, Σ over slices of sums[row][column % 4]): scratch holds 4 Rows floats for each thread. The caller
// provides barriers: no thread may be reading scratch on entry, and it is free after the next barrier.
template <int Rows, class F>
__device__ __forceinline__ void sum_slices(float* scratch, const float (&sums)[Rows][4], const Slices& slices, F f) {
  const int width = slices.width();
#pragma unroll
  for (int row = 0; row < Rows; ++row) {
    *reinterpret_cast<float4*>(scratch + (slices.slice * Rows + row) * width + 4 * slices.quad) =
        make_float4(sums[row][0], sums[row][1], sums[row][2], sums[row][3]);
  }
  __syncthreads();
  for (int at = threadIdx.x; at < Rows * width; at += blockDim.x) {
    float total = 0.f;
#pragma unroll 4
    for (int slice = 0; slice < slices.count; ++slice) total += scratch[slice * Rows * width + at];
    f(at / width, at % width, total);
  }
}

// x [..., n, d] and y [..., m, d]
struct TwoSamples {
  Sets x, y;

  TwoSamples(const char* op, const char* x_name, const Tensor& x_tensor, const char* y_name, const Tensor& y_tensor)
      : x(op, x_tensor.sizes(), INT32_MAX, INT32_MAX), y(op, y_tensor.sizes(), INT32_MAX, INT32_MAX) {
    STD_TORCH_CHECK(
        x.n <= kMostParticles && y.n <= kMostParticles && x.d <= kWidest, op, " in CUDA C++ takes ", x_name,
        " [..., n, d] and ", y_name, " [..., m, d] with n, m <= ", kMostParticles, " and d <= ", kWidest, ", got n = ",
        x.n, ", m = ", y.n, ", d = ", x.d);
    STD_TORCH_CHECK(
        x.d == y.d && x.count == y.count && x_tensor.scalar_type() == y_tensor.scalar_type(), op, " takes ", x_name,
        " and ", y_name, " of the same dtype, batch and d");
  }
};

}  // namespace ivfast
