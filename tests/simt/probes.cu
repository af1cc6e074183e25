// Small correct and faulty kernels that show what the shim catches. Each entry point returns an error or nullptr.
#include <cuda_runtime.h>

#include <string>

namespace ivfast {
extern __shared__ float4 dynamic_shared[];
}

namespace {

// y = x reversed, through shared memory; without the barrier a thread may read a value before it is written
__global__ void reverse(const float* x, float* y, bool barrier) {
  __shared__ float tile[64];
  const unsigned at = blockIdx.x * 64 + threadIdx.x;
  tile[threadIdx.x] = x[at];
  if (barrier) __syncthreads();
  y[at] = tile[63 - threadIdx.x];
}

// The same in rounds over one tile; without the second barrier a fast thread overwrites values that a slow one still
// reads
__global__ void reverse_rounds(const float* x, float* y, bool barrier) {
  float* tile = reinterpret_cast<float*>(ivfast::dynamic_shared);
  for (int round = 0; round < 4; ++round) {
    tile[threadIdx.x] = x[round * 64 + threadIdx.x];
    __syncthreads();
    y[round * 64 + threadIdx.x] = tile[63 - threadIdx.x];
    if (barrier) __syncthreads();
  }
}

__global__ void divergent_barrier(float* y) {
  if (threadIdx.x < 40) __syncthreads();
  y[threadIdx.x] = 0.f;
}

__global__ void two_barriers(float* y) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  y[threadIdx.x] = 0.f;
}

__global__ void missing_lane(float* y) {
  if (threadIdx.x % 32 != 7) y[threadIdx.x] = __shfl_xor_sync(~0u, y[threadIdx.x], 1);
}

__global__ void past_the_end(float* y) {
  reinterpret_cast<float*>(ivfast::dynamic_shared)[threadIdx.x + 1] = y[threadIdx.x];
}

__global__ void unwritten_shared(float* y) {
  __shared__ float tile[64];
  if (y[threadIdx.x] > 0.f) tile[threadIdx.x] = 0.f;  // never true, but without it tile may be assumed 0
  y[threadIdx.x] = threadIdx.x % 2 ? tile[threadIdx.x] : reinterpret_cast<float*>(ivfast::dynamic_shared)[threadIdx.x];
}

// row k of y [11, 64] is one warp operation on x [64]
__global__ void warp_operations(const float* x, float* y) {
  const int t = threadIdx.x, half = 0xFFFFu << (t & 16);
  const float v = x[t];
  y[t] = __shfl_xor_sync(~0u, v, 5);
  y[64 + t] = __shfl_down_sync(~0u, v, 3);
  y[128 + t] = __shfl_up_sync(~0u, v, 3, 16);
  y[192 + t] = __shfl_sync(~0u, v, 9, 8);
  y[256 + t] = static_cast<float>(__ballot_sync(~0u, v > 0.f) >> 16);
  y[320 + t] = static_cast<float>(__any_sync(half, v > 1.5f));
  y[384 + t] = static_cast<float>(__all_sync(half, v > -1.5f));
  __syncwarp();
  y[448 + t] = static_cast<float>(__shfl_down_sync(half, v, 1, 16));
  const int whole = static_cast<int>(v * 1024);
  y[512 + t] = static_cast<float>(__reduce_min_sync(~0u, whole));
  y[576 + t] = static_cast<float>(__reduce_max_sync(half, whole));
  y[640 + t] = __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(v * v)));
}

// Each thread of a 3-D grid of 3-D blocks counts itself in its own entry and in a common total
__global__ void indices(float* y, int* total) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  atomicAdd(y + block * blockDim.x * blockDim.y * blockDim.z + thread, 1.f);
  atomicAdd(total, 1);
  atomicMax(total + 1, static_cast<int>(block));
}

template <class... Parameters, class... Arguments>
const char* run(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, Arguments... arguments) {
  static std::string error;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  try {
    const cudaError_t code = cudaLaunchKernelEx(&config, kernel, arguments...);
    if (code == cudaSuccess) return nullptr;
    error = cudaGetErrorString(code);
  } catch (const std::exception& exception) {
    error = exception.what();
  }
  return error.c_str();
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {
const char* probe_reverse(const float* x, float* y, bool barrier) { return run(reverse, 4, 64, 0, x, y, barrier); }
const char* probe_reverse_rounds(const float* x, float* y, bool barrier) {
  return run(reverse_rounds, 1, 64, 256, x, y, barrier);
}
const char* probe_divergent_barrier(float* y) { return run(divergent_barrier, 1, 64, 0, y); }
const char* probe_two_barriers(float* y) { return run(two_barriers, 1, 64, 0, y); }
const char* probe_missing_lane(float* y) { return run(missing_lane, 1, 64, 0, y); }
const char* probe_past_the_end(float* y) { return run(past_the_end, 1, 64, 256, y); }
const char* probe_unwritten_shared(float* y) { return run(unwritten_shared, 1, 64, 256, y); }
const char* probe_warp_operations(const float* x, float* y) { return run(warp_operations, 1, 64, 0, x, y); }
const char* probe_indices(float* y, int* total) { return run(indices, dim3(3, 2, 2), dim3(4, 3, 5), 0, y, total); }
const char* probe_shared_memory(float* y, size_t bytes, bool opt_in) {
  if (opt_in && cudaFuncSetAttribute(reinterpret_cast<const void*>(unwritten_shared),
                                     cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes))) {
    return "refused";
  }
  return run(unwritten_shared, 1, 64, bytes, y);
}
}
#pragma GCC visibility pop
