// Tensors as rows, and threads over them, for operators that process each row independently.
#pragma once

#include <algorithm>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "operator.h"

namespace ivfast {

// `empty`, on 2 MB pages if it is large: the system clears a page at its first touch, and with 4 KB pages that takes
// longer than writing a result of tens of megabytes.
inline Tensor empty_large(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  Tensor x = empty(like, sizes, dtype);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(x.data_ptr());
  const uintptr_t end = begin + uintptr_t(x.numel() * Data::element_size(dtype));
  const uintptr_t first = (begin + page - 1) / page * page, last = end / page * page;
  if (first + page < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: may fail
#endif
  return x;
}

// [..., d] as rows [count, d]; the leading dimensions are `shape`.
struct Rows {
  std::vector<int64_t> full, shape;
  int64_t count = 1, d;

  explicit Rows(const Tensor& x) {
    const auto sizes = x.sizes();
    full.assign(sizes.begin(), sizes.end()), shape.assign(sizes.begin(), sizes.end() - 1);
    d = full.back();
    for (int64_t size : shape) count *= size;
  }
};

// Elements of a tensor one at a time as doubles, for operators on one number per sample.
struct Elements {
  void* data;
  Storage storage;

  explicit Elements(const Tensor& x) : Elements(x.data_ptr(), x.scalar_type()) {}
  Elements(const void* data, ScalarType dtype) : data(const_cast<void*>(data)), storage(ivfast::storage(dtype)) {}
  double operator[](int64_t i) const {
    switch (storage) {
      case Storage::float64: return static_cast<const double*>(data)[i];
      case Storage::bfloat16: return load(static_cast<const BFloat16*>(data)[i]);
      case Storage::float16: return load(static_cast<const Float16*>(data)[i]);
      default: return static_cast<const float*>(data)[i];
    }
  }
  void set(int64_t i, double value) const {
    switch (storage) {
      case Storage::float64: return store(static_cast<double*>(data) + i, value);
      case Storage::bfloat16: return store(static_cast<BFloat16*>(data) + i, float(value));
      case Storage::float16: return store(static_cast<Float16*>(data) + i, float(value));
      default: return store(static_cast<float*>(data) + i, float(value));
    }
  }
};

// f(first, last) for ranges of rows of `cost` flop each.
template <class F>
void each_range(int64_t rows, int64_t cost, const F& f) {
  if (rows * cost <= worth_a_thread)
    f(0, rows);
  else
    parallel_for(0, rows, worth_a_thread / (4 * cost + 1) + 1, f);
}

}  // namespace ivfast
