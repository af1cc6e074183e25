// The SVGD direction on the CPU: the operators and the division of work among threads.
#include "svgd.h"

#include <algorithm>
#include <optional>
#include <tuple>

#include "isa.h"
#include "operator.h"
#include "run.h"
#include "tournament.h"

namespace ivfast {
namespace {

SvgdStages stages(ScalarType dtype, bool backward) { return IVFAST_BY_ISA(svgd_stages, storage(dtype), backward); }

// One particle set as blocks of rows.
struct ParticleBlocks {
  const SvgdSet& set;
  const SvgdStages& stages;
  int64_t size;

  void begin(int64_t a) const { stages.begin(set, first(a), last(a)); }
  void pair(int64_t a, int64_t b) const { stages.pair(set, first(a), last(a), first(b), last(b)); }
  void finish(int64_t a) const { stages.finish(set, first(a), last(a)); }
  int64_t first(int64_t block) const { return block * size; }
  int64_t last(int64_t block) const { return std::min(set.n, (block + 1) * size); }
};

// ∂h if the set asks for it, and whether rounding shows
std::pair<double, bool> svgd_once(SvgdSet set, const SvgdStages& stages, bool threaded) {
  static thread_local Workspace workspace;
  set.workspace = workspace.reserve(stages.bytes(set.n, set.d));
  stages.centre(set);
  const ParticleBlocks blocks{set, stages, block_rows(set.n, set.d, svgd_tile(set.n))};
  Tournament(blocks, (set.n + blocks.size - 1) / blocks.size).run(threaded);
  const double gradient = set.bandwidth_gradient ? stages.bandwidth_gradient(set) : 0;
  const bool lost = stages.lost(set);
  workspace.trim();
  return {gradient, lost};
}

}  // namespace

double svgd_run(const SvgdSet& set, ScalarType dtype, bool threaded) {
  const bool backward = set.grad;
  const int64_t size = set.n * set.d;
  if (!is_bandwidth(set.h)) {
    for (void* result : {set.phi, set.dx, set.dscore}) fill_nan(result, dtype, size);
    fill_nan(set.row_sum, arithmetic(dtype), set.n);
    return NAN;
  }
  const auto [gradient, lost] = svgd_once(set, stages(dtype, backward), threaded);
  if (!lost || dtype == ScalarType::Double) return gradient;
  std::vector<double> x, score, grad, first(size), second(backward ? set.dscore ? size : 0 : set.n);
  SvgdSet wide = set;
  wide.x = to_float64(x, set.x, dtype, size), wide.score = to_float64(score, set.score, dtype, size);
  wide.grad = to_float64(grad, set.grad, dtype, size);
  wide.phi = wide.dx = first.data(), wide.row_sum = wide.dscore = second.empty() ? nullptr : second.data();
  const double wide_gradient = svgd_once(wide, stages(ScalarType::Double, backward), threaded).first;
  from_float64(backward ? set.dx : set.phi, dtype, first);
  if (!second.empty()) backward ? from_float64(set.dscore, dtype, second) : from_float64(set.row_sum, arithmetic(dtype), second);
  return wide_gradient;
}

namespace {

// `svgd_run` for each particle set, then `done`: threads share a large set, or each takes small sets.
template <class SetOf, class Done>
void run_batch(int64_t batch, ScalarType dtype, const SetOf& set_of, const Done& done) {
  if (batch == 0) return;
  const SvgdSet set = set_of(0);
  const int64_t cost = set.n * set.n * (set.d + 8) * (set.grad ? 7 : 3);  // approximate flop
  const bool large = cost > worth_a_thread;
  if (batch == 1 || (large && batch < get_num_threads())) {
    for (int64_t i = 0; i < batch; ++i) done(i, svgd_run(set_of(i), dtype, large));
    return;
  }
  const auto range = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) done(i, svgd_run(set_of(i), dtype, false));
  };
  const int64_t grain = std::max<int64_t>(1, worth_a_thread / cost);
  if (batch <= grain)
    range(0, batch);
  else
    parallel_for(0, batch, grain, range);
}

std::tuple<Tensor, Tensor> svgd_direction(const Tensor& x_, const std::optional<Tensor>& score_, const Tensor& h_) {
  const Shape shape(x_);
  const ScalarType dtype = x_.scalar_type(), wide = arithmetic(dtype);
  STD_TORCH_CHECK(h_.scalar_type() == wide, "bandwidth must be in the dtype of the arithmetic");
  const int64_t size = shape.n * shape.d;
  const Tensor x = as_contiguous(x_), h = as_contiguous(h_), score = score_ ? as_contiguous(*score_) : x;
  Tensor phi = empty(x, shape.full, dtype), row_sum = empty(x, shape.rows, wide);

  const Data xs(x, size, dtype), scores = score_ ? Data(score, size, dtype) : Data(), hs(h, 1, wide);
  const Data phis(phi, size, dtype), row_sums(row_sum, shape.n, wide);
  const auto set_of = [&](int64_t i) {
    SvgdSet set{};
    set.n = shape.n, set.d = shape.d, set.h = value(hs, i);
    set.x = xs[i], set.score = scores[i], set.phi = phis[i], set.row_sum = row_sums[i];
    return set;
  };
  run_batch(shape.sets, dtype, set_of, [](int64_t, double) {});
  return {phi, row_sum};
}

// row_sum is not read: K' of a narrow kernel is lost in 1 + K', and its sums are recomputed with the tiles anyway.
std::tuple<Tensor, Tensor, Tensor> svgd_direction_backward(const Tensor& grad_, const Tensor& x_,
                                                           const std::optional<Tensor>& score_, const Tensor& h_,
                                                           const Tensor&, bool bandwidth_gradient) {
  const Shape shape(x_);
  const ScalarType dtype = x_.scalar_type(), wide = arithmetic(dtype);
  STD_TORCH_CHECK(h_.scalar_type() == wide, "bandwidth must be in the dtype of the arithmetic");
  const int64_t size = shape.n * shape.d;
  const Tensor grad = as_contiguous(grad_), x = as_contiguous(x_), h = as_contiguous(h_);
  const Tensor score = score_ ? as_contiguous(*score_) : x;
  Tensor dx = empty(x, shape.full, dtype);
  Tensor dh = bandwidth_gradient ? empty(x, shape.batch, wide) : empty(x, {0}, wide);
  Tensor dscore = score_ ? empty(x, shape.full, dtype) : empty(x, {0}, dtype);

  const Data grads(grad, size, dtype), xs(x, size, dtype), hs(h, 1, wide), dxs(dx, size, dtype);
  const Data dhs = bandwidth_gradient ? Data(dh, 1, wide) : Data();
  const Data scores = score_ ? Data(score, size, dtype) : Data(), dscores = score_ ? Data(dscore, size, dtype) : Data();
  const auto set_of = [&](int64_t i) {
    SvgdSet set{};
    set.n = shape.n, set.d = shape.d, set.h = value(hs, i);
    set.x = xs[i], set.score = scores[i], set.grad = grads[i], set.dx = dxs[i], set.dscore = dscores[i];
    set.bandwidth_gradient = bandwidth_gradient;
    return set;
  };
  run_batch(shape.sets, dtype, set_of, [&](int64_t i, double gradient) {
    if (bandwidth_gradient) set_value(dhs, i, gradient);
  });
  return {dx, dscore, dh};
}

STABLE_TORCH_LIBRARY_IMPL(ivfast, CPU, m) {
  m.impl("svgd_direction", TORCH_BOX(&svgd_direction));
  m.impl("svgd_direction_backward", TORCH_BOX(&svgd_direction_backward));
}

}  // namespace

}  // namespace ivfast
