// Tensors, checks, threads and the registration of operators, on PyTorch's stable C interface (shim.h).
//
// The names are those of PyTorch's own C++ layer on that interface, which csrc/cuda uses.
#pragma once

#include <cstring>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "shim.h"

// Throws std::runtime_error, which PyTorch turns into a RuntimeError. The message is that of the arguments.
#define STD_TORCH_CHECK(condition, ...) \
  if (__builtin_expect(!(condition), 0)) throw std::runtime_error(::ivfast::message(__VA_ARGS__))

#define STABLE_TORCH_ERROR_CODE_CHECK(call) STD_TORCH_CHECK((call) == 0, "PyTorch refused ", #call)

namespace ivfast {

template <class... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

constexpr uint64_t torch_version = uint64_t(2) << 56 | uint64_t(10) << 48;  // whose interface shim.h declares

enum class ScalarType { Half, BFloat16, Float, Double, Int, Long, Other };

inline int32_t dtype_code(ScalarType dtype) {
  static const int32_t codes[] = {aoti_torch_dtype_float16(), aoti_torch_dtype_bfloat16(), aoti_torch_dtype_float32(),
                                  aoti_torch_dtype_float64(), aoti_torch_dtype_int32(),    aoti_torch_dtype_int64()};
  return codes[int(dtype)];
}

struct Sizes {
  const int64_t* first;
  size_t count;

  const int64_t* begin() const { return first; }
  const int64_t* end() const { return first + count; }
  size_t size() const { return count; }
  int64_t operator[](size_t i) const { return first[i]; }
};

// A reference to a tensor, counted.
class Tensor {
 public:
  Tensor() = default;  // none, until one is assigned
  explicit Tensor(AtenTensorHandle owned) : handle_(owned, aoti_torch_delete_tensor_object) {}

  AtenTensorHandle get() const { return handle_.get(); }
  void* data_ptr() const { return ask<void*>(aoti_torch_get_data_ptr); }
  int64_t dim() const { return ask<int64_t>(aoti_torch_get_dim); }
  int64_t numel() const { return ask<int64_t>(aoti_torch_get_numel); }
  bool is_contiguous() const { return ask<bool>(aoti_torch_is_contiguous); }
  Sizes sizes() const { return {ask<int64_t*>(aoti_torch_get_sizes), size_t(dim())}; }
  ScalarType scalar_type() const {
    const int32_t code = ask<int32_t>(aoti_torch_get_dtype);
    for (int dtype = 0; dtype < int(ScalarType::Other); ++dtype)
      if (code == dtype_code(ScalarType(dtype))) return ScalarType(dtype);
    return ScalarType::Other;
  }

 private:
  template <class T>
  T ask(AOTITorchError (*question)(AtenTensorHandle, T*)) const {
    T answer{};
    STABLE_TORCH_ERROR_CODE_CHECK(question(get(), &answer));
    return answer;
  }

  std::shared_ptr<AtenTensorOpaque> handle_;
};

// Numbers, tensors, lists and what is optional as the 64 bits of a stack, and back.
template <class T>
struct Slot {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) <= sizeof(StableIValue));
  static StableIValue from(T value) {
    StableIValue bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    return bits;
  }
  static T to(StableIValue bits) {
    T value;
    std::memcpy(&value, &bits, sizeof(T));
    return value;
  }
};
template <>
struct Slot<Tensor> {
  static StableIValue from(const Tensor& x) {
    AtenTensorHandle owned = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(x.get(), &owned));
    return reinterpret_cast<StableIValue>(owned);
  }
  static Tensor to(StableIValue bits) { return Tensor(reinterpret_cast<AtenTensorHandle>(bits)); }
};
template <class T>
struct Slot<std::optional<T>> {
  static std::optional<T> to(StableIValue bits) {
    const std::unique_ptr<StableIValue> inner(reinterpret_cast<StableIValue*>(bits));
    return inner ? std::optional<T>(Slot<T>::to(*inner)) : std::nullopt;
  }
};
template <class T>
struct Slot<std::vector<T>> {
  static std::vector<T> to(StableIValue bits) {
    const std::unique_ptr<StableListOpaque, decltype(&torch_delete_list)> list(
        reinterpret_cast<StableListHandle>(bits), torch_delete_list);
    size_t size = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_list_size(list.get(), &size));
    std::vector<T> items;
    for (size_t i = 0; i < size; ++i) {
      StableIValue item = 0;
      STABLE_TORCH_ERROR_CODE_CHECK(torch_list_get_item(list.get(), i, &item));
      items.push_back(Slot<T>::to(item));
    }
    return items;
  }
};

inline Tensor contiguous(const Tensor& x) {
  StableIValue stack[] = {Slot<Tensor>::from(x), Slot<int32_t>::from(aoti_torch_memory_format_contiguous_format())};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::contiguous", "", stack, torch_version));
  return Slot<Tensor>::to(stack[0]);
}

inline int64_t get_num_threads() {
  uint32_t threads = 1;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&threads));
  return threads;
}

// f(first, last) on ranges of at least `grain` from [begin, end), by PyTorch's threads
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  const auto work = [](int64_t first, int64_t last, void* context) { (*static_cast<const F*>(context))(first, last); };
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, work, const_cast<F*>(&f)));
}

// f() on each of PyTorch's threads, or only here
template <class F>
void each_thread(bool threaded, const F& f) {
  if (threaded)
    parallel_for(0, get_num_threads(), 1, [&](int64_t, int64_t) { f(); });
  else
    f();
}

template <class Result>
constexpr size_t outputs = 1;
template <>
inline constexpr size_t outputs<void> = 0;
template <class... Results>
constexpr size_t outputs<std::tuple<Results...>> = sizeof...(Results);

// `function` as a kernel that takes its arguments from a stack and leaves its results there
template <auto function>
struct Boxed;
template <class Result, class... Parameters, Result (*function)(Parameters...)>
struct Boxed<function> {
  static void kernel(StableIValue* stack, uint64_t arguments, uint64_t results) {
    STD_TORCH_CHECK(arguments == sizeof...(Parameters) && results == outputs<Result>,
                    "the kernel takes ", sizeof...(Parameters), " arguments and has ", outputs<Result>,
                    " results, but its schema has ", arguments, " and ", results);
    call(stack, std::index_sequence_for<Parameters...>());
  }

 private:
  template <size_t... I>
  static void call(StableIValue* stack, std::index_sequence<I...>) {
    // braces: arguments leave the stack in order, so that the earlier ones are owned when one throws
    std::tuple<std::decay_t<Parameters>...> given{Slot<std::decay_t<Parameters>>::to(stack[I])...};
    if constexpr (std::is_void_v<Result>)
      std::apply(function, given);
    else
      put(stack, std::apply(function, given));
  }
  static void put(StableIValue* stack, const Tensor& result) { stack[0] = Slot<Tensor>::from(result); }
  template <class... Tensors>
  static void put(StableIValue* stack, const std::tuple<Tensors...>& results) {
    std::apply([&](const Tensors&... result) { ((*stack++ = Slot<Tensors>::from(result)), ...); }, results);
  }
};

class Library {
 public:
  Library(const char* name, const char* key, const char* file, uint32_t line, void (*fill)(Library&)) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_library_init_impl(name, key, file, line, &handle_));
    fill(*this);
  }
  Library(const Library&) = delete;
  ~Library() { aoti_torch_delete_library_object(handle_); }
  void impl(const char* op, void (*kernel)(StableIValue*, uint64_t, uint64_t)) {
    STABLE_TORCH_ERROR_CODE_CHECK(torch_library_impl(handle_, op, kernel, torch_version));
  }

 private:
  TorchLibraryHandle handle_ = nullptr;
};

}  // namespace ivfast

#define TORCH_BOX(function) ::ivfast::Boxed<function>::kernel

// Registers operators when the library is loaded: STABLE_TORCH_LIBRARY_IMPL(name, key, m) { m.impl(…); }
#define STABLE_TORCH_LIBRARY_IMPL(name, key, m) IVFAST_LIBRARY(name, key, m, __COUNTER__)
#define IVFAST_LIBRARY(name, key, m, id) IVFAST_LIBRARY_NAMED(name, key, m, id)
#define IVFAST_LIBRARY_NAMED(name, key, m, id)                                                                \
  static void fill_library_##id(::ivfast::Library& m);                                                        \
  static const ::ivfast::Library library_##id(#name, #key, __FILE__, __LINE__, fill_library_##id);            \
  void fill_library_##id(::ivfast::Library& m)
