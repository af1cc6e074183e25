// Shared by the CPU operators: views of particle sets, scratch memory, and how much work is worth a thread.
#pragma once

#include <cmath>
#include <cstdlib>
#include <new>

#include "stable.h"

#include "../common.h"
#include "../math.h"

namespace ivfast {

inline Storage storage(ScalarType dtype) {
  return dtype == ScalarType::Double     ? Storage::float64
         : dtype == ScalarType::BFloat16 ? Storage::bfloat16
         : dtype == ScalarType::Half     ? Storage::float16
                                         : Storage::float32;
}

// A thread's scratch memory, kept between calls if it is small.
class Workspace {
 public:
  ~Workspace() { std::free(memory_); }
  void* reserve(int64_t bytes) {
    if (bytes > size_) {
      std::free(memory_);
      size_ = 0;
      memory_ = std::aligned_alloc(64, size_t(bytes + 63) / 64 * 64);
      if (!memory_) throw std::bad_alloc();
      size_ = bytes;
    }
    return memory_;
  }
  void trim() {
    if (size_ <= 4 << 20) return;
    std::free(memory_);
    memory_ = nullptr, size_ = 0;
  }

 private:
  void* memory_ = nullptr;
  int64_t size_ = 0;
};

// Work that is worth a second thread, in flop: about 150 µs of one core. A busy machine delays each join by
// milliseconds.
inline constexpr int64_t worth_a_thread = 16'000'000;

struct Shape {
  std::vector<int64_t> full, rows, batch;  // [..., n, d], [..., n], [...]
  int64_t n, d, sets = 1;

  explicit Shape(const Tensor& x) {
    const auto sizes = x.sizes();
    full.assign(sizes.begin(), sizes.end()), rows.assign(sizes.begin(), sizes.end() - 1);
    batch.assign(sizes.begin(), sizes.end() - 2);
    n = full[full.size() - 2], d = full.back();
    for (int64_t size : batch) sets *= size;
    STD_TORCH_CHECK(n >= 1 && d >= 1, "x must hold n >= 1 samples of d >= 1 dimensions, got n = ", n, ", d = ", d);
  }
};

// The data of one tensor, a block of `count` elements per particle set.
struct Data {
  char* data = nullptr;
  int64_t bytes = 0;

  Data() = default;
  Data(const Tensor& x, int64_t count, ScalarType dtype)
      : data(static_cast<char*>(x.data_ptr())), bytes(count * element_size(dtype)) {}
  void* operator[](int64_t set) const { return data ? data + set * bytes : nullptr; }
  static int64_t element_size(ScalarType dtype) {
    return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
  }
};

// f(set, threaded) for each particle set of `cost` flop: threads share a large set, or each takes small sets.
template <class F>
void each_set(int64_t sets, int64_t cost, const F& f) {
  const bool large = cost > worth_a_thread;
  if (sets == 1 || (large && sets < get_num_threads())) {
    for (int64_t set = 0; set < sets; ++set) f(set, large);
    return;
  }
  const auto range = [&](int64_t begin, int64_t end) {
    for (int64_t set = begin; set < end; ++set) f(set, false);
  };
  const int64_t grain = worth_a_thread / (cost + 1) + 1;
  if (sets <= grain)
    range(0, sets);
  else
    parallel_for(0, sets, grain, range);
}

inline double value(const Data& scalars, int64_t set) {
  const void* at = scalars[set];
  return scalars.bytes == 8 ? *static_cast<const double*>(at) : double(*static_cast<const float*>(at));
}

inline void set_value(const Data& scalars, int64_t set, double value) {
  if (scalars.bytes == 8)
    *static_cast<double*>(scalars[set]) = value;
  else
    *static_cast<float*>(scalars[set]) = float(value);
}

// The double route: where float32 loses what matters, an operator repeats its work on float64 copies of its data.
// `count` numbers of `dtype` as float64 in `to`, null for null; and back.
inline const double* to_float64(std::vector<double>& to, const void* from, ScalarType dtype, int64_t count) {
  if (!from) return nullptr;
  to.resize(size_t(count));
  const auto copy = [&](auto zero) {
    for (int64_t i = 0; i < count; ++i) to[i] = double(load(static_cast<const decltype(zero)*>(from)[i]));
  };
  dtype == ScalarType::Double     ? copy(double())
  : dtype == ScalarType::BFloat16 ? copy(BFloat16())
  : dtype == ScalarType::Half     ? copy(Float16())
                                  : copy(float());
  return to.data();
}

inline void from_float64(void* to, ScalarType dtype, const std::vector<double>& from) {
  const auto copy = [&](auto zero) {
    auto* const out = static_cast<decltype(zero)*>(to);
    for (size_t i = 0; i < from.size(); ++i) store(out + i, decltype(load(zero))(from[i]));
  };
  dtype == ScalarType::Double     ? copy(double())
  : dtype == ScalarType::BFloat16 ? copy(BFloat16())
  : dtype == ScalarType::Half     ? copy(Float16())
                                  : copy(float());
}

// Whether h is positive and finite; otherwise results are NaN. A median that float32 does not hold is 0 or infinite, and
// all kernel values would be 0 or 1.
inline bool is_bandwidth(double h) { return h > 0 && h < INFINITY; }
inline void fill_nan(void* to, ScalarType dtype, int64_t count) {
  if (to) from_float64(to, dtype, std::vector<double>(size_t(count), NAN));
}

}  // namespace ivfast
