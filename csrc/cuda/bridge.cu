// Blockwise and radial bridges and the block substitution: each input read once, each output written once, one launch.
//
// A thread handles one 16-byte pack of neighbours, at the same place in every bridge, or one element if unaligned.
#include "vectors.h"

#include <cmath>
#include <tuple>

namespace ivfast {

constexpr int kBridgeThreads = 256;
constexpr int kMostAngles = 64;  // steps whose cosines and sines are passed as kernel arguments

// Rows of d = blocks · width elements
struct Blocks {
  int64_t elements;
  int d, width;

  // f(i, row, block) for elements at, at + 1, …
  template <int Width, class F>
  __device__ __forceinline__ void each(int64_t at, F f) const {
    int64_t row = quotient(at, d);
    int column = static_cast<int>(at - row * d), block = column / width, within = column - block * width;
#pragma unroll
    for (int i = 0; i < Width; ++i) {
      f(i, row, block);
      if (++column == d) column = block = within = 0, ++row;
      else if (++within == width) within = 0, ++block;
    }
  }
};

template <int Width>
__device__ __forceinline__ int64_t own_place() {
  return (int64_t{blockIdx.x} * kBridgeThreads + threadIdx.x) * Width;
}

// T_k replaces the blocks before k
template <int Width, class T>
__global__ void __launch_bounds__(kBridgeThreads) blockwise_kernel(
    const T* __restrict__ z, const T* __restrict__ draws, T* __restrict__ bridges, Blocks blocks, int t) {
  const int64_t at = own_place<Width>();
  if (at >= blocks.elements) return;
  int block_of[Width];
  blocks.each<Width>(at, [&](int i, int64_t, int block) { block_of[i] = block; });
  const auto z_at = Elements<T, Width>::from(z + at), draws_at = Elements<T, Width>::from(draws + at);
  for (int k = 0; k <= t; ++k) {
    Elements<T, Width> out;
#pragma unroll
    for (int i = 0; i < Width; ++i) out.v[i] = k > block_of[i] ? draws_at.v[i] : z_at.v[i];
    out.to(bridges + k * blocks.elements + at);
  }
}

// ∂z = Σ ∂T_k z over k <= block; the others are not read
template <int Width, class T>
__global__ void __launch_bounds__(kBridgeThreads, 4) blockwise_backward_kernel(
    const T* __restrict__ grad, T* __restrict__ dz, Blocks blocks) {
  const int64_t at = own_place<Width>();
  if (at >= blocks.elements) return;
  int block_of[Width], last = 0;
  float sum[Width] = {};
  blocks.each<Width>(at, [&](int i, int64_t, int block) { block_of[i] = block, last = max(last, block); });
#pragma unroll 4
  for (int k = 0; k <= last; ++k) {
    const auto g = Elements<T, Width>::from(grad + k * blocks.elements + at);
#pragma unroll
    for (int i = 0; i < Width; ++i) sum[i] += k > block_of[i] ? 0.f : static_cast<float>(g.v[i]);
  }
  Elements<T, Width> out;
#pragma unroll
  for (int i = 0; i < Width; ++i) out.v[i] = static_cast<T>(sum[i]);
  out.to(dz + at);
}

// cos and sin of kπ/2t, exact at both ends
struct Angles {
  float2 table[kMostAngles + 1];
  int t;

  explicit Angles(int t) : t(t) {
    for (int k = 0; k <= t && t <= kMostAngles; ++k) {
      const double angle = k * std::acos(-1.) / (2. * t);
      table[k] = make_float2(
          k == t ? 0.f : static_cast<float>(std::cos(angle)), k == t ? 1.f : static_cast<float>(std::sin(angle)));
    }
  }

  __device__ __forceinline__ float2 operator[](int k) const {
    if (t <= kMostAngles) return table[k];
    if (k == t) return make_float2(0.f, 1.f);
    const float half_turns = static_cast<float>(k) / (2.f * static_cast<float>(t));
    return make_float2(cospif(half_turns), sinpif(half_turns));
  }
};

template <int Width, class T>
__global__ void __launch_bounds__(kBridgeThreads) radial_kernel(
    const T* __restrict__ z, const T* __restrict__ draws, T* __restrict__ bridges, int64_t elements, Angles angles) {
  const int64_t at = own_place<Width>();
  if (at >= elements) return;
  const auto z_at = Elements<T, Width>::from(z + at), draws_at = Elements<T, Width>::from(draws + at);
  for (int k = 0; k <= angles.t; ++k) {
    const float2 angle = angles[k];
    Elements<T, Width> out;
#pragma unroll
    for (int i = 0; i < Width; ++i) {
      out.v[i] = static_cast<T>(angle.x * static_cast<float>(z_at.v[i]) + angle.y * static_cast<float>(draws_at.v[i]));
    }
    out.to(bridges + k * elements + at);
  }
}

// ∂z = Σ_k cos(kπ/2t) ∂T_k z
template <int Width, class T>
__global__ void __launch_bounds__(kBridgeThreads) radial_backward_kernel(
    const T* __restrict__ grad, T* __restrict__ dz, int64_t elements, Angles angles) {
  const int64_t at = own_place<Width>();
  if (at >= elements) return;
  float sum[Width] = {};
#pragma unroll 4
  for (int k = 0; k <= angles.t; ++k) {
    const auto g = Elements<T, Width>::from(grad + k * elements + at);
    const float c = angles[k].x;
#pragma unroll
    for (int i = 0; i < Width; ++i) sum[i] += c * static_cast<float>(g.v[i]);
  }
  Elements<T, Width> out;
#pragma unroll
  for (int i = 0; i < Width; ++i) out.v[i] = static_cast<T>(sum[i]);
  out.to(dz + at);
}

// draws, or 0 without any, in the chosen block of each row; elements that are not in the result are not read
template <int Width, class T, class Index>
__global__ void __launch_bounds__(kBridgeThreads) substitute_kernel(
    const T* __restrict__ z, const T* __restrict__ draws, const Index* __restrict__ index, T* __restrict__ out,
    Blocks blocks) {
  const int64_t at = own_place<Width>();
  if (at >= blocks.elements) return;
  bool chosen[Width], any = false, all = true;
  blocks.each<Width>(at, [&](int i, int64_t row, int block) {
    chosen[i] = index[row] == block;
    any = any || chosen[i], all = all && chosen[i];
  });
  Elements<T, Width> kept = {}, drawn = {};
  if (!all) kept = Elements<T, Width>::from(z + at);
  if (any && draws) drawn = Elements<T, Width>::from(draws + at);
#pragma unroll
  for (int i = 0; i < Width; ++i) kept.v[i] = chosen[i] ? drawn.v[i] : kept.v[i];
  kept.to(out + at);
}

// The size of z, and the blocks of its rows
Blocks blocks_of(const char* op, int64_t elements, int64_t d, int64_t count) {
  STD_TORCH_CHECK(count >= 1 && d % count == 0, op, " takes a number of blocks that divides d = ", d, ", got ", count);
  const int columns = elements ? as_int(op, "d", d) : 1;
  return {elements, columns, elements ? columns / static_cast<int>(count) : 1};
}

// The sizes of one of the bridges
std::vector<int64_t> one_of(const Tensor& bridges) {
  const auto sizes = bridges.sizes();
  return {sizes.begin() + 1, sizes.end()};
}

Tensor new_bridges(const Tensor& z, int64_t t) {
  std::vector<int64_t> sizes = sizes_of(z);
  sizes.insert(sizes.begin(), t + 1);
  return empty(z, sizes, z.scalar_type());
}

dim3 grid_of(int64_t elements, int width) { return dim3(ceil_div(elements, int64_t{kBridgeThreads} * width)); }

Tensor blockwise_bridge(Tensor z, Tensor draws, int64_t t) {
  const char* const op = "blockwise_bridge";
  const Blocks blocks = blocks_of(op, z.numel(), z.size(-1), t);
  z = as_contiguous(z), draws = as_contiguous(draws);
  Tensor bridges = new_bridges(z, t);
  by_width(op, z, blocks.elements, blocks.elements, {z.data_ptr(), draws.data_ptr()}, [&](auto zero, auto width) {
    using T = decltype(zero);
    launch(
        z, blockwise_kernel<width, T>, grid_of(blocks.elements, width), kBridgeThreads, 0, z.const_data_ptr<T>(),
        draws.const_data_ptr<T>(), bridges.mutable_data_ptr<T>(), blocks, t);
  });
  return bridges;
}

Tensor blockwise_bridge_backward(Tensor grad, int64_t t) {
  const char* const op = "blockwise_bridge_backward";
  const Blocks blocks = blocks_of(op, grad.numel() / (t + 1), grad.size(-1), t);
  grad = as_contiguous(grad);
  Tensor dz = empty(grad, one_of(grad), grad.scalar_type());
  by_width(op, grad, blocks.elements, blocks.elements, {grad.data_ptr()}, [&](auto zero, auto width) {
    using T = decltype(zero);
    launch(
        grad, blockwise_backward_kernel<width, T>, grid_of(blocks.elements, width), kBridgeThreads, 0,
        grad.const_data_ptr<T>(), dz.mutable_data_ptr<T>(), blocks);
  });
  return dz;
}

Tensor radial_bridge(Tensor z, Tensor draws, int64_t t) {
  const char* const op = "radial_bridge";
  const Angles angles(as_int(op, "t", t));
  const int64_t elements = z.numel();
  z = as_contiguous(z), draws = as_contiguous(draws);
  Tensor bridges = new_bridges(z, t);
  by_width(op, z, elements, elements, {z.data_ptr(), draws.data_ptr()}, [&](auto zero, auto width) {
    using T = decltype(zero);
    launch(
        z, radial_kernel<width, T>, grid_of(elements, width), kBridgeThreads, 0, z.const_data_ptr<T>(),
        draws.const_data_ptr<T>(), bridges.mutable_data_ptr<T>(), elements, angles);
  });
  return bridges;
}

Tensor radial_bridge_backward(Tensor grad, int64_t t) {
  const char* const op = "radial_bridge_backward";
  const Angles angles(as_int(op, "t", t));
  const int64_t elements = grad.numel() / (t + 1);
  grad = as_contiguous(grad);
  Tensor dz = empty(grad, one_of(grad), grad.scalar_type());
  by_width(op, grad, elements, elements, {grad.data_ptr()}, [&](auto zero, auto width) {
    using T = decltype(zero);
    launch(
        grad, radial_backward_kernel<width, T>, grid_of(elements, width), kBridgeThreads, 0, grad.const_data_ptr<T>(),
        dz.mutable_data_ptr<T>(), elements, angles);
  });
  return dz;
}

Tensor substituted(const char* op, Tensor z, const Tensor* draws, Tensor index, int64_t k) {
  const Blocks blocks = blocks_of(op, z.numel(), z.size(-1), k);
  z = as_contiguous(z), index = as_contiguous(index);
  Tensor out = empty(z, sizes_of(z), z.scalar_type());
  const void* const drawn = draws ? draws->data_ptr() : nullptr;
  by_width(op, z, blocks.elements, blocks.elements, {z.data_ptr(), drawn}, [&](auto zero, auto width) {
    using T = decltype(zero);
    const auto start = [&](auto kernel, const auto* of_rows) {
      launch(
          z, kernel, grid_of(blocks.elements, width), kBridgeThreads, 0, z.const_data_ptr<T>(),
          static_cast<const T*>(drawn), of_rows, out.mutable_data_ptr<T>(), blocks);
    };
    if (index.scalar_type() == ScalarType::Int) {
      start(substitute_kernel<width, T, int32_t>, index.const_data_ptr<int32_t>());
    } else {
      start(substitute_kernel<width, T, int64_t>, index.const_data_ptr<int64_t>());
    }
  });
  return out;
}

Tensor block_substitute(Tensor z, Tensor draws, Tensor index, int64_t k) {
  draws = as_contiguous(draws);
  return substituted("block_substitute", z, &draws, index, k);
}

Tensor block_substitute_backward(Tensor grad, Tensor index, int64_t k) {
  return substituted("block_substitute_backward", grad, nullptr, index, k);
}

STABLE_TORCH_LIBRARY_IMPL(ivfast, IVFAST_CUDA_KEY, m) {
  m.impl("blockwise_bridge.cuda", TORCH_BOX(&blockwise_bridge));
  m.impl("blockwise_bridge_backward.cuda", TORCH_BOX(&blockwise_bridge_backward));
  m.impl("radial_bridge.cuda", TORCH_BOX(&radial_bridge));
  m.impl("radial_bridge_backward.cuda", TORCH_BOX(&radial_bridge_backward));
  m.impl("block_substitute.cuda", TORCH_BOX(&block_substitute));
  m.impl("block_substitute_backward.cuda", TORCH_BOX(&block_substitute_backward));
}

}  // namespace ivfast
