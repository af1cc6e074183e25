// An Adam step on a linear layer's weights on the CPU: the operator.
#include "linear_adam.h"

#include "isa.h"
#include "rows.h"

namespace ivfast {
namespace {

constexpr int64_t flop_per_weight = 40;  // for Adam, plus 2 for each sample

thread_local Workspace scratch;

int64_t panels(int64_t width, int64_t panel) { return (width + panel - 1) / panel; }

void linear_adam(Tensor weight, Tensor mean, Tensor square, const Tensor& grad_, const Tensor& x_, double rate,
                 double root_correction, double beta1, double beta2, double eps) {
  const Tensor grad = as_contiguous(grad_), x = as_contiguous(x_);
  const auto shape = weight.sizes();
  LinearAdam a{grad.sizes()[0], shape[0], shape[1]};
  STD_TORCH_CHECK(grad.numel() == a.count * a.outputs && x.numel() == a.count * a.inputs,
                  "grad must be [n, outputs] and x [n, inputs] for weight [outputs, inputs]");
  STD_TORCH_CHECK(mean.numel() == weight.numel() && square.numel() == weight.numel(), "mean and square must match weight");
  for (const Tensor& t : {weight, mean, square, grad, x})
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous(),
                    "weight, mean, square, grad and x must be contiguous float32");
  const LinearAdamStages stages = IVFAST_BY_ISA(linear_adam_stages);
  const int64_t of_grad = panels(a.outputs, stages.outputs), of_x = panels(a.inputs, stages.inputs);
  float* const packed_grad = static_cast<float*>(
      scratch.reserve(4 * a.count * (of_grad * stages.outputs + of_x * stages.inputs) + 64));
  float* const packed_x = packed_grad + (a.count * of_grad * stages.outputs + 15) / 16 * 16;
  const auto pack = [&](const Tensor& from, float* to, int64_t width, int64_t panel) {
    const Panels p{static_cast<const float*>(from.data_ptr()), to, a.count, width, panel};
    each_range(panels(width, panel), 8 * a.count * panel, [&](int64_t first, int64_t last) { stages.pack(p, first, last); });
  };
  pack(grad, packed_grad, a.outputs, stages.outputs);
  pack(x, packed_x, a.inputs, stages.inputs);
  a.grad = packed_grad, a.x = packed_x;
  a.weight = static_cast<float*>(weight.data_ptr());
  a.mean = static_cast<float*>(mean.data_ptr()), a.square = static_cast<float*>(square.data_ptr());
  a.rate = float(rate), a.root_correction = float(root_correction);
  a.rest1 = float(1 - beta1), a.beta2 = float(beta2), a.rest2 = float(1 - beta2), a.eps = float(eps);
  each_range(of_grad, stages.outputs * a.inputs * (2 * a.count + flop_per_weight),
             [&](int64_t first, int64_t last) { stages.step(a, first, last); });
  scratch.trim();
}

STABLE_TORCH_LIBRARY_IMPL(ivfast, CPU, m) { m.impl("linear_adam_", TORCH_BOX(&linear_adam)); }

}  // namespace
}  // namespace ivfast
