// Per-sample reconstruction losses on the CPU: the operators.
#include "reconstruction.h"

#include <tuple>

#include "isa.h"
#include "rows.h"

namespace ivfast {
namespace {

constexpr int64_t reconstruction_flop = 20;

ReconstructionRows rows_of(const Tensor& output, const Tensor& target) {
  const auto sizes = output.sizes();
  ReconstructionRows rows{1, 0, sizes[0], output.data_ptr(), target.data_ptr()};
  for (size_t i = 1; i < sizes.size(); ++i) rows.size *= sizes[i];
  STD_TORCH_CHECK(target.numel() == output.numel() && target.scalar_type() == output.scalar_type(),
                  "target must match output");
  return rows;
}

template <class Stage>
void run(const ReconstructionRows& all, Stage stage) {
  each_range(all.last, all.size * reconstruction_flop, [&](int64_t first, int64_t last) {
    ReconstructionRows part = all;
    part.first = first, part.last = last;
    stage(part);
  });
}

Tensor reconstruction_loss(const Tensor& output_, const Tensor& target_, int64_t kind) {
  const Tensor output = as_contiguous(output_), target = as_contiguous(target_);
  const ScalarType dtype = output.scalar_type();
  ReconstructionRows rows = rows_of(output, target);
  Tensor loss = empty(output, {rows.last}, arithmetic(dtype));
  rows.loss = loss.data_ptr();
  run(rows, IVFAST_BY_ISA(reconstruction_stages, storage(dtype), Reconstruction(kind)).forward);
  return loss;
}

std::tuple<Tensor, Tensor> reconstruction_loss_backward(const Tensor& grad_, const Tensor& output_, const Tensor& target_,
                                                        int64_t kind, bool target_gradient) {
  const Tensor grad = as_contiguous(grad_), output = as_contiguous(output_), target = as_contiguous(target_);
  const ScalarType dtype = output.scalar_type();
  ReconstructionRows rows = rows_of(output, target);
  const auto sizes = output.sizes();
  const std::vector<int64_t> full(sizes.begin(), sizes.end());
  Tensor doutput = empty_large(output, full, dtype);
  Tensor dtarget = empty_large(output, target_gradient ? full : std::vector<int64_t>{0}, dtype);
  rows.grad = grad.data_ptr(), rows.doutput = doutput.data_ptr();
  rows.dtarget = target_gradient ? dtarget.data_ptr() : nullptr;
  run(rows, IVFAST_BY_ISA(reconstruction_stages, storage(dtype), Reconstruction(kind)).backward);
  return {doutput, dtarget};
}

STABLE_TORCH_LIBRARY_IMPL(ivfast, CPU, m) {
  m.impl("reconstruction_loss", TORCH_BOX(&reconstruction_loss));
  m.impl("reconstruction_loss_backward", TORCH_BOX(&reconstruction_loss_backward));
}

}  // namespace
}  // namespace ivfast
