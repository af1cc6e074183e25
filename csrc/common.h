// Shared by the operators of csrc/: allocation and contiguous views on PyTorch's stable ABI.
//
// cpu/operator.h and cuda/launch.h include this file after what it needs in the namespace ivfast: Tensor, ScalarType,
// dtype_code and contiguous.
#pragma once

#include <vector>

namespace ivfast {

// `x` itself if it is contiguous, because a dispatcher call costs more than a small kernel.
inline Tensor as_contiguous(const Tensor& x) { return x.is_contiguous() ? x : contiguous(x); }

// Uninitialised, contiguous, on the device of `like`.
inline Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= sizes[i] > 1 ? sizes[i] : 1) strides[i] = stride;
  int32_t device_type = 0, device_index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      int64_t(sizes.size()), sizes.data(), strides.data(), dtype_code(dtype), device_type, device_index, &handle));
  return Tensor(handle);
}

// The dtype that an operator computes in: float for half precision, otherwise the tensor's own.
inline ScalarType arithmetic(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace ivfast
