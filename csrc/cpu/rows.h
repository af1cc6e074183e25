// Tensors as rows, and threads over them, for the operators that take each row on its own.
#pragma once

#include <algorithm>

#include "operator.h"

namespace ivfast {

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

// Elements of a tensor one at a time as doubles: for the operators on a number per sample.
struct Elements {
  void* data;
  Storage storage;

  explicit Elements(const Tensor& x) : data(x.data_ptr()), storage(ivfast::storage(x.scalar_type())) {}
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
    torch::stable::parallel_for(0, rows, worth_a_thread / (4 * cost + 1) + 1, f);
}

}  // namespace ivfast
