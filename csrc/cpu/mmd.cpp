// The maximum mean discrepancy on the CPU: the operator and the division of work among threads.
#include "mmd.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>

#include "isa.h"
#include "operator.h"
#include "tournament.h"

namespace ivfast {
namespace {

// The pooled sample as blocks of rows, each from x or from y.
struct SampleBlocks {
  const TwoSamples& samples;
  const MmdStages& stages;

  void begin(int64_t a) const { stages.begin(samples, a); }
  void pair(int64_t a, int64_t b) const { stages.pair(samples, std::min(a, b), std::max(a, b)); }
  void finish(int64_t a) const { stages.finish(samples, a); }
};

// MMD², and the largest ‖x_i‖²/2
std::pair<double, double> mmd_once(TwoSamples samples, const MmdStages& stages, bool threaded) {
  static thread_local Workspace workspace;
  samples.workspace = workspace.reserve(stages.bytes(samples));
  stages.prepare(samples);
  const SampleBlocks blocks{samples, stages};
  Tournament(blocks, samples.blocks()).run(threaded);
  const std::pair<double, double> result{stages.value(samples), stages.norm(samples)};
  workspace.trim();
  return result;
}

double mmd_run(const TwoSamples& samples, ScalarType dtype, bool threaded) {
  const auto stages = [](ScalarType in) { return IVFAST_BY_ISA(mmd_stages, storage(in)); };
  if (!is_bandwidth(samples.bandwidth)) {
    for (int k = 0; k < 2; ++k) fill_nan(samples.dx[k], arithmetic(dtype), samples.n[k] * samples.d);
    return NAN;
  }
  double least = INFINITY, most = 0;
  for (int64_t i = 0; i < samples.count; ++i) {
    const double c = samples.scales[i] * samples.bandwidth / 2;
    least = std::min(least, c), most = std::max(most, c);
  }
  const bool extreme = least < 0x1p-60 || most > 0x1p60;  // float32 holds neither products of such scales nor their squares
  if (dtype == ScalarType::Double || !extreme) {
    const auto [value, norm] = mmd_once(samples, stages(dtype), threaded);
    // a distance u loses a few eps ‖x‖², which shows if it is not small beside the narrowest kernel
    if (dtype == ScalarType::Double || !(norm > 0x1p6 * least)) return value;
  }
  std::vector<double> x[2], gradients[2];
  TwoSamples wide = samples;
  for (int k = 0; k < 2; ++k) {
    const int64_t size = samples.n[k] * samples.d;
    wide.x[k] = to_float64(x[k], samples.x[k], dtype, size);
    if (samples.dx[k]) gradients[k].resize(size), wide.dx[k] = gradients[k].data();
  }
  const double value = mmd_once(wide, stages(ScalarType::Double), threaded).first;
  for (int k = 0; k < 2; ++k) from_float64(samples.dx[k], arithmetic(dtype), gradients[k]);
  return value;
}

std::tuple<Tensor, Tensor, Tensor> mmd(const Tensor& x_, const Tensor& y_, const std::optional<Tensor>& bandwidth_,
                                       bool imq, std::vector<double> scales, bool unbiased, bool x_gradient,
                                       bool y_gradient) {
  const Shape x_shape(x_), y_shape(y_);
  const ScalarType dtype = x_.scalar_type(), wide = arithmetic(dtype);
  const int64_t n = x_shape.n, m = y_shape.n, d = x_shape.d, pooled = n + m, sets = x_shape.sets;
  STD_TORCH_CHECK(y_shape.d == d && y_shape.sets == sets && y_.scalar_type() == dtype,
                  "y must match x except for n");
  STD_TORCH_CHECK(!unbiased || (n >= 2 && m >= 2),
                  "x and y must hold n, m >= 2 samples for unbiased, got n = ", n, ", m = ", m);
  const Tensor x = as_contiguous(x_), y = as_contiguous(y_), bandwidth = bandwidth_ ? as_contiguous(*bandwidth_) : x;
  STD_TORCH_CHECK(!bandwidth_ || (bandwidth.scalar_type() == wide && int64_t(bandwidth.numel()) == sets),
                  "bandwidth must hold one value per set, in the dtype of the arithmetic");
  Tensor value = empty(x, x_shape.batch, wide);
  Tensor dx = x_gradient ? empty(x, x_shape.full, wide) : empty(x, {0}, wide);
  Tensor dy = y_gradient ? empty(y, y_shape.full, wide) : empty(y, {0}, wide);

  const Data xs(x, n * d, dtype), ys(y, m * d, dtype), values(value, 1, wide);
  const Data bandwidths = bandwidth_ ? Data(bandwidth, 1, wide) : Data();
  const Data dxs = x_gradient ? Data(dx, n * d, wide) : Data(), dys = y_gradient ? Data(dy, m * d, wide) : Data();
  const int64_t products = (n * int64_t(x_gradient) + m * int64_t(y_gradient)) * 2 * d;  // approximate flop
  const int64_t cost = pooled * (pooled * (d + 6 * int64_t(scales.size())) + products);
  each_set(sets, cost, [&](int64_t set, bool threaded) {
    TwoSamples samples{};
    samples.n[0] = n, samples.n[1] = m, samples.d = d, samples.size = block_rows(pooled, d, mmd_tile(pooled));
    samples.imq = imq, samples.unbiased = unbiased, samples.scales = scales.data(), samples.count = scales.size();
    samples.bandwidth = bandwidth_ ? ivfast::value(bandwidths, set) : 1;
    samples.x[0] = xs[set], samples.x[1] = ys[set], samples.dx[0] = dxs[set], samples.dx[1] = dys[set];
    set_value(values, set, mmd_run(samples, dtype, threaded));
  });
  return {value, dx, dy};
}

STABLE_TORCH_LIBRARY_IMPL(ivfast, CPU, m) { m.impl("mmd", TORCH_BOX(&mmd)); }

}  // namespace
}  // namespace ivfast
