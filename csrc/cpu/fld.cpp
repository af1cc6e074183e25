// The latent distance through its Gram matrix on the CPU: the operator and the division of work among threads.
#include "fld.h"

#include <cmath>
#include <tuple>

#include "isa.h"
#include "rows.h"

namespace ivfast {
namespace {

template <class F>
void each_part(int64_t parts, bool threaded, const F& f) {
  const auto range = [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) f(part);
  };
  if (threaded)
    parallel_for(0, parts, 1, range);
  else
    range(0, parts);
}

bool run(Codes& codes, const CodesStages& stages, bool threaded) {
  static thread_local Workspace workspace;
  codes.workspace = workspace.reserve(stages.bytes(codes));
  each_part(codes.parts, threaded, [&](int64_t part) { stages.means(codes, part); });
  stages.center(codes);
  each_part(codes.parts, threaded, [&](int64_t part) { stages.scatter(codes, part); });
  const bool served = stages.root(codes);
  if (served && codes.gradient)
    each_part(codes.parts, threaded, [&](int64_t part) { stages.gradients(codes, part); });
  workspace.trim();
  return served;
}

// For codes in another dtype whose condition number or range is too large for float
bool run_in_float64(Codes& codes, ScalarType dtype, bool threaded) {
  const int64_t count = codes.n * codes.d;
  std::vector<double> z(count), gradient(codes.gradient ? count : 0);
  const Elements from(codes.z, dtype), to(codes.gradient, dtype);
  for (int64_t i = 0; i < count; ++i) z[i] = from[i];
  Codes exact{z.data(), codes.n, codes.d, codes.gradient ? gradient.data() : nullptr};
  const bool served = run(exact, IVFAST_BY_ISA(codes_stages, Storage::float64), threaded);
  codes.distance = exact.distance, codes.error = exact.error;
  for (size_t i = 0; i < gradient.size(); ++i) to.set(int64_t(i), gradient[i]);
  return served;
}

std::tuple<Tensor, Tensor, Tensor> fld_gram(const Tensor& z_, bool gradient_) {
  const Shape shape(z_);
  const ScalarType dtype = z_.scalar_type(), wide = arithmetic(dtype);
  const int64_t n = shape.n, d = shape.d, m = n < d ? n : d;
  STD_TORCH_CHECK(n >= 2 && m <= most_rows, "z must be [..., n, d] with n >= 2 and min(n, d) <= ", most_rows);
  const Tensor z = as_contiguous(z_);
  Tensor distance = empty(z, shape.batch, wide), error = empty(z, shape.batch, ScalarType::Float);
  Tensor gradient = gradient_ ? empty(z, shape.full, dtype) : empty(z, {0}, dtype);
  const Data zs(z, n * d, dtype), distances(distance, 1, wide), errors(error, 1, ScalarType::Float);
  const Data gradients = gradient_ ? Data(gradient, n * d, dtype) : Data();
  const CodesStages stages = IVFAST_BY_ISA(codes_stages, storage(dtype));
  const int64_t cost = n * d * m * (gradient_ ? 3 : 1) + 15 * m * m * m;  // approximate flop
  each_set(shape.sets, cost, [&](int64_t set, bool threaded) {
    Codes codes{zs[set], n, d, gradients[set]};
    bool served = run(codes, stages, threaded);
    if (!served && wide != ScalarType::Double) served = run_in_float64(codes, dtype, threaded);
    if (!served) {  // the error shows it
      codes.distance = NAN;
      const Elements to(codes.gradient, dtype);
      for (int64_t i = 0; gradient_ && i < n * d; ++i) to.set(i, NAN);
    }
    set_value(distances, set, codes.distance), set_value(errors, set, codes.error);
  });
  return {distance, gradient, error};
}

STABLE_TORCH_LIBRARY_IMPL(ivfast, CPU, m) { m.impl("fld_gram", TORCH_BOX(&fld_gram)); }

}  // namespace
}  // namespace ivfast
