// Inverse roots of small matrices on the CPU: the operator.
#include "inverse_root.h"

#include <tuple>

#include "isa.h"
#include "operator.h"

namespace ivfast {
namespace {

std::tuple<Tensor, Tensor, Tensor> inverse_root(const Tensor& a_) {
  const Shape shape(a_);
  const ScalarType dtype = a_.scalar_type();
  const int64_t d = shape.d;
  STD_TORCH_CHECK(shape.n == d && d <= most_rows, "a must be [..., d, d] with d <= ", most_rows);
  STD_TORCH_CHECK(dtype == arithmetic(dtype), "a must be float32 or float64");
  const Tensor a = as_contiguous(a_);
  Tensor inverse = empty(a, shape.full, dtype), trace = empty(a, shape.batch, dtype);
  Tensor error = empty(a, shape.batch, ScalarType::Float);
  const Data as(a, d * d, dtype), inverses(inverse, d * d, dtype), traces(trace, 1, dtype);
  const Data errors(error, 1, ScalarType::Float);
  const MatrixStages stages = IVFAST_BY_ISA(matrix_stages, storage(dtype));
  each_set(shape.sets, 40 * d * d * d, [&](int64_t set, bool) {
    static thread_local Workspace workspace;
    SymmetricMatrix matrix{as[set], d, inverses[set]};
    matrix.workspace = workspace.reserve(stages.bytes(matrix));
    stages.run(matrix);
    set_value(traces, set, matrix.trace), set_value(errors, set, matrix.error);
  });
  return {inverse, trace, error};
}

STABLE_TORCH_LIBRARY_IMPL(ivfast, CPU, m) { m.impl("inverse_root", TORCH_BOX(&inverse_root)); }

}  // namespace
}  // namespace ivfast
