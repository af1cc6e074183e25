// Host code for every CUDA C++ operator: the dtype switch, the shared-memory opt-in and the launch.
//
// Kernels are started with cudaLaunchKernelEx, never with <<<>>>, and take their dynamic shared memory from
// `dynamic_shared`, so that a plain C++ compiler can build the same files against tests/simt (IVFAST_SIMT is defined).
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstddef>
#include <cstdint>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // PyTorch 2.10 has it under this name
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace ivfast {

using torch::headeronly::ScalarType;
using torch::stable::contiguous;
using torch::stable::Tensor;

inline int32_t dtype_code(ScalarType dtype) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
}

}  // namespace ivfast

#include "../common.h"

#ifdef IVFAST_SIMT
#define IVFAST_CUDA_KEY CPU
#else
#define IVFAST_CUDA_KEY CUDA
#endif

namespace ivfast {

extern __shared__ float4 dynamic_shared[];

inline void check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA error: ", cudaGetErrorString(error));
}

inline cudaStream_t current_stream([[maybe_unused]] const torch::stable::Tensor& x) {
  void* stream = nullptr;
#ifndef IVFAST_SIMT
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
#endif
  return static_cast<cudaStream_t>(stream);
}

// Bytes of shared memory that a block on the device of `x` may request.
inline int shared_limit([[maybe_unused]] const torch::stable::Tensor& x) {
  const auto ask = [](int device) {
    int bytes = 0;
    check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    return bytes;
  };
#ifdef IVFAST_SIMT
  return ask(0);  // tests change it
#else
  static std::atomic<int> known[64];
  const int device = x.get_device_index();
  if (device >= 64) return ask(device);
  int bytes = known[device].load(std::memory_order_relaxed);
  if (bytes == 0) known[device].store(bytes = ask(device), std::memory_order_relaxed);
  return bytes;
#endif
}

// Starts `kernel` on the device and current stream of `x`, with `shared` bytes of dynamic shared memory.
template <class... Parameters, class... Arguments>
void launch(
    const torch::stable::Tensor& x, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared,
    Arguments... arguments) {
#ifndef IVFAST_SIMT
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
#endif
  constexpr size_t without_opt_in = 48 * 1024;
  if (shared > without_opt_in) {
    const size_t limit = shared_limit(x);
    STD_TORCH_CHECK(
        shared <= limit, "this CUDA C++ kernel needs ", shared, " bytes of shared memory per block for these shapes, and "
        "the device has ", limit);
    check(cudaFuncSetAttribute(
        reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = current_stream(x);
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

// f(T{}) for the dtype T of x, which the kernels read and write; they compute in float32.
template <class F>
void by_dtype(const char* op, const torch::stable::Tensor& x, F f) {
  using torch::headeronly::ScalarType;
  switch (x.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Half: return f(torch::headeronly::Half{});
    case ScalarType::BFloat16: return f(torch::headeronly::BFloat16{});
    default:
      STD_TORCH_CHECK(
          false, op, " in CUDA C++ computes in float32 and takes float32, bfloat16 or float16, got ",
          torch::headeronly::toString(x.scalar_type()), "; its reference takes float64");
  }
}

}  // namespace ivfast
