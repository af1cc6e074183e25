// The parts of CUDA's runtime header that csrc/cuda uses, for a plain C++ compiler; tests/simt/simt.cpp runs them on
// the CPU.
//
// Each CUDA thread is a fiber. Fibers switch only where threads wait for each other, in an order drawn from a seed.
// __shared__ becomes thread_local, which C++ allows in a function with or without extern. All blocks run one after
// another on one system thread. Dynamic shared memory has one name, ivfast::dynamic_shared.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define IVFAST_SIMT 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ thread_local

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using std::max;
using std::min;
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float cospif(float x) { return static_cast<float>(std::cos(M_PI * x)); }
inline float sinpif(float x) { return static_cast<float>(std::sin(M_PI * x)); }
inline float __fdividef(float x, float y) { return x / y; }
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
void __stcg(T* p, T value) {
  std::memcpy(static_cast<void*>(p), &value, sizeof(T));
}

namespace simt {

struct Site {  // where a wait is in the source
  const char* file;
  int line;
};

enum class Op { sync, shuffle, ballot, least };

void block_barrier(Site site);
// Waits for every lane of `mask`; returns the bits of `source` (shuffle), of the votes (ballot) or of the minimum.
uint64_t warp_op(Op op, unsigned mask, uint64_t bits, int source, Site site);
int lane();

template <class T>
T shuffle(unsigned mask, T value, int source, Site site) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = warp_op(Op::shuffle, mask, bits, source, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace simt

extern uint3 threadIdx, blockIdx;  // of the running fiber
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

#define SIMT_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(SIMT_SITE) { simt::block_barrier({file, line}); }
inline void __syncwarp(unsigned mask = ~0u, SIMT_SITE) { simt::warp_op(simt::Op::sync, mask, 0, 0, {file, line}); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, SIMT_SITE) {
  const int segment = simt::lane() & -width;
  return simt::shuffle(mask, value, segment | (source & (width - 1)), {file, line});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, SIMT_SITE) {
  const int lane = simt::lane(), source = lane ^ lanes;
  return simt::shuffle(mask, value, source < (lane & -width) + width ? source : lane, {file, line});
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_SITE) {
  const int lane = simt::lane(), source = lane + static_cast<int>(delta);
  return simt::shuffle(mask, value, source < (lane & -width) + width ? source : lane, {file, line});
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_SITE) {
  const int lane = simt::lane(), source = lane - static_cast<int>(delta);
  return simt::shuffle(mask, value, source >= (lane & -width) ? source : lane, {file, line});
}
inline unsigned __ballot_sync(unsigned mask, int vote, SIMT_SITE) {
  return static_cast<unsigned>(simt::warp_op(simt::Op::ballot, mask, vote != 0, 0, {file, line}));
}
inline int __any_sync(unsigned mask, int vote, SIMT_SITE) { return __ballot_sync(mask, vote, file, line) != 0; }
inline int __all_sync(unsigned mask, int vote, SIMT_SITE) { return __ballot_sync(mask, vote, file, line) == mask; }
inline unsigned __reduce_min_sync(unsigned mask, unsigned value, SIMT_SITE) {
  return static_cast<unsigned>(simt::warp_op(simt::Op::least, mask, value, 0, {file, line}));
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value, SIMT_SITE) {
  return ~__reduce_min_sync(mask, ~value, file, line);
}
inline int __reduce_min_sync(unsigned mask, int value, SIMT_SITE) {
  return static_cast<int>(__reduce_min_sync(mask, static_cast<unsigned>(value) ^ 1u << 31, file, line) ^ 1u << 31);
}
inline int __reduce_max_sync(unsigned mask, int value, SIMT_SITE) {
  return static_cast<int>(__reduce_max_sync(mask, static_cast<unsigned>(value) ^ 1u << 31, file, line) ^ 1u << 31);
}
#undef SIMT_SITE

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof(x));
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// Fibers share one system thread: plain reads and writes are atomic, and writes are visible at once.
inline void __threadfence() {}
template <class T>
T atomicAdd(T* p, T value) {
  const T old = *p;
  *p = old + value;
  return old;
}
template <class T>
T atomicMax(T* p, T value) {
  const T old = *p;
  *p = std::max(old, value);
  return old;
}
template <class T>
T atomicMin(T* p, T value) {
  const T old = *p;
  *p = std::min(old, value);
  return old;
}
template <class T>
T atomicExch(T* p, T value) {
  const T old = *p;
  *p = value;
  return old;
}
template <class T>
T atomicOr(T* p, T value) {
  const T old = *p;
  *p = old | value;
  return old;
}
template <class T>
T atomicCAS(T* p, T expected, T value) {
  const T old = *p;
  if (old == expected) *p = value;
  return old;
}

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);

namespace simt {
// Throws std::runtime_error if the threads of a block or warp disagree at a wait or write past their shared memory.
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& body);
}  // namespace simt

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  return simt::launch(*config, reinterpret_cast<const void*>(kernel), [&] { kernel(arguments...); });
}
