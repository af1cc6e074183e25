// The part of PyTorch's stable C interface that the CPU operators use, as of PyTorch 2.10.
//
// PyTorch keeps these functions, with their meaning, in later versions. With the declarations here, `ivfast._C` compiles
// where PyTorch is not installed: the environment in which pip builds a package stays small. `tests/test_stable.py`
// compiles this file together with the installed PyTorch's own headers, which must agree.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

// An argument or result of an operator in 64 bits: a number, or an owned handle of a tensor or of a list. An optional
// value is null or a pointer to such 64 bits, made by `new`.
using StableIValue = uint64_t;
using AOTITorchError = int32_t;  // 0: none

struct AtenTensorOpaque;
using AtenTensorHandle = AtenTensorOpaque*;
struct StableListOpaque;
using StableListHandle = StableListOpaque*;
struct TorchLibraryOpaque;
using TorchLibraryHandle = TorchLibraryOpaque*;

int32_t aoti_torch_dtype_float16();
int32_t aoti_torch_dtype_bfloat16();
int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_dtype_float64();
int32_t aoti_torch_dtype_int32();
int32_t aoti_torch_dtype_int64();
int32_t aoti_torch_memory_format_contiguous_format();

// Pointers that these return belong to the tensor.
AOTITorchError aoti_torch_get_data_ptr(AtenTensorHandle tensor, void** data);
AOTITorchError aoti_torch_get_dim(AtenTensorHandle tensor, int64_t* dim);
AOTITorchError aoti_torch_get_numel(AtenTensorHandle tensor, int64_t* numel);
AOTITorchError aoti_torch_get_sizes(AtenTensorHandle tensor, int64_t** sizes);
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle tensor, int32_t* dtype);
AOTITorchError aoti_torch_get_device_type(AtenTensorHandle tensor, int32_t* type);
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle tensor, int32_t* index);
AOTITorchError aoti_torch_is_contiguous(AtenTensorHandle tensor, bool* contiguous);

// Handles that these make belong to the caller.
AOTITorchError aoti_torch_new_tensor_handle(AtenTensorHandle tensor, AtenTensorHandle* same);
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle tensor);
AOTITorchError aoti_torch_empty_strided(
    int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t device_type, int32_t device_index,
    AtenTensorHandle* tensor);

AOTITorchError torch_list_size(StableListHandle list, size_t* size);
AOTITorchError torch_list_get_item(StableListHandle list, size_t index, StableIValue* item);
AOTITorchError torch_delete_list(StableListHandle list);

// Arguments and results share `stack`. `version`: of the interface that the caller knows.
AOTITorchError torch_call_dispatcher(const char* op, const char* overload, StableIValue* stack, uint64_t version);

AOTITorchError aoti_torch_library_init_impl(
    const char* name, const char* key, const char* file, uint32_t line, TorchLibraryHandle* library);
AOTITorchError aoti_torch_delete_library_object(TorchLibraryHandle library);
AOTITorchError torch_library_impl(
    TorchLibraryHandle library, const char* op, void (*kernel)(StableIValue* stack, uint64_t arguments, uint64_t results),
    uint64_t version);

AOTITorchError torch_parallel_for(
    int64_t begin, int64_t end, int64_t grain, void (*work)(int64_t begin, int64_t end, void* context), void* context);
AOTITorchError torch_get_num_threads(uint32_t* threads);

}  // extern "C"
