// AS-Distance on the CPU: the operators, and the distance from its three log-sums.
#include "as_distance.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>

#include "isa.h"
#include "operator.h"
#include "tournament.h"

namespace ivfast {
namespace {

AsDistanceStages stages(ScalarType dtype, bool additive, bool prior, bool backward) {
  return IVFAST_BY_ISA(as_distance_stages, storage(dtype), AsDistanceForm{additive, prior, backward});
}

struct PosteriorBlocks {
  const Posteriors& q;
  const AsDistanceStages& stages;

  void begin(int64_t a) const { stages.begin(q, a); }
  void pair(int64_t a, int64_t b) const { stages.pair(q, a, b); }
  void finish(int64_t a) const {
    if (stages.finish) stages.finish(q, a);
  }
};

// The log-sums or the gradients; whether a variance was clamped
bool as_distance_once(Posteriors& q, const AsDistanceStages& stages, bool threaded) {
  static thread_local Workspace workspace;
  q.workspace = workspace.reserve(stages.bytes(q));
  Tournament(PosteriorBlocks{q, stages}, q.blocks()).run(threaded);
  if (stages.collect) stages.collect(q);
  const bool clamped = stages.clamped(q);
  workspace.trim();
  return clamped;
}

// Whether all gradients are finite
bool finite(const Posteriors& q, ScalarType dtype) {
  for (int k = 0; k < 2; ++k) {
    for (const void* gradient : {q.dmu[k], q.dlogvar[k]}) {
      std::vector<double> numbers;
      const double* x = to_float64(numbers, gradient, dtype, q.n[k] * q.d);
      if (!std::all_of(x, x + q.n[k] * q.d, [](double g) { return std::isfinite(g); })) return false;
    }
  }
  return true;
}

// Whether products with the gradient of a log-sum leave float32's range although the gradient does not
bool underflows(const Posteriors& q) {
  return std::any_of(q.grad, q.grad + 3, [](double g) { return std::abs(g) > 0x1p-190 && std::abs(g) < 0x1p-60; });
}

// Forward or, with dmu, backward; in float64 where float32 would clamp a variance, or overflow or underflow on the way to
// a gradient
void as_distance_run(Posteriors& q, ScalarType dtype, bool additive, bool prior, bool threaded) {
  const bool backward = q.dmu[0];
  const bool clamped = as_distance_once(q, stages(dtype, additive, prior, backward), threaded);
  if (dtype == ScalarType::Double || (!clamped && (!backward || (!underflows(q) && finite(q, dtype))))) return;
  std::vector<double> inputs[4], results[4];
  Posteriors wide = q;
  for (int k = 0; k < 2; ++k) {
    const int64_t size = q.n[k] * q.d;
    wide.mu[k] = to_float64(inputs[2 * k], q.mu[k], dtype, size);
    wide.logvar[k] = to_float64(inputs[2 * k + 1], q.logvar[k], dtype, size);
    if (!backward) continue;
    for (int i = 0; i < 2; ++i) results[2 * k + i].resize(size);
    wide.dmu[k] = results[2 * k].data(), wide.dlogvar[k] = results[2 * k + 1].data();
  }
  as_distance_once(wide, stages(ScalarType::Double, additive, prior, backward), threaded);
  for (int k = 0; k < 3; ++k) q.log_sum[k] = wide.log_sum[k];
  for (int k = 0; backward && k < 2; ++k)
    from_float64(q.dmu[k], dtype, results[2 * k]), from_float64(q.dlogvar[k], dtype, results[2 * k + 1]);
}

// log of the mean kernels of rr, gg and rg
struct LogMeans {
  double log_mean[3];

  LogMeans(const Posteriors& q) {
    for (int k = 0; k < 3; ++k) {
      const double n = double(q.n[k == 1]), others = k == 2 ? double(q.n[1]) : q.unbiased ? n - 1 : n;
      log_mean[k] = q.log_sum[k] - std::log(n * others);
    }
  }
  double distance(bool log) const {
    const auto term = [&](int k) { return log ? log_mean[k] : std::exp(log_mean[k]); };
    return term(0) + term(1) - 2 * term(2);
  }
  // ∂distance/∂ log-sum
  double slope(int k, bool log) const { return (k == 2 ? -2 : 1) * (log ? 1 : std::exp(log_mean[k])); }
};

// The four inputs, contiguous, and the position of each pair of batches in them.
struct Inputs {
  Tensor tensors[4];
  Shape r, g;
  ScalarType dtype, wide;
  bool unbiased;
  Data data[4];

  Inputs(const Tensor& mu_r, const Tensor& logvar_r, const Tensor& mu_g, const Tensor& logvar_g, bool unbiased)
      : tensors{as_contiguous(mu_r), as_contiguous(logvar_r), as_contiguous(mu_g), as_contiguous(logvar_g)},
        r(mu_r), g(mu_g), dtype(mu_r.scalar_type()), wide(arithmetic(dtype)), unbiased(unbiased) {
    STD_TORCH_CHECK(r.d == g.d && r.sets == g.sets, "mu_g must match mu_r except for n");
    for (int i = 0; i < 4; ++i) {
      const Shape& shape = i < 2 ? r : g;
      STD_TORCH_CHECK(tensors[i].numel() == shape.sets * shape.n * shape.d && tensors[i].scalar_type() == dtype,
                      "logvar_r must match mu_r, and logvar_g mu_g");
      data[i] = Data(tensors[i], shape.n * shape.d, dtype);
    }
  }
  // flop of a forward pass as `worth_a_thread` counts them
  int64_t cost(bool additive) const {
    const int64_t pairs = (r.n * (r.n + 1) + g.n * (g.n + 1)) / 2 + r.n * g.n;
    return pairs * (r.d + 8) * (additive ? 30 : 10);
  }
  Posteriors operator[](int64_t set) const {
    Posteriors q{};
    q.n[0] = r.n, q.n[1] = g.n, q.d = r.d, q.unbiased = unbiased;
    q.size = block_rows(std::max(r.n, g.n), r.d, 64);
    for (int k = 0; k < 2; ++k) q.mu[k] = data[2 * k][set], q.logvar[k] = data[2 * k + 1][set];
    return q;
  }
};

std::tuple<Tensor, Tensor> as_distance(const Tensor& mu_r, const Tensor& logvar_r, const Tensor& mu_g,
                                       const Tensor& logvar_g, bool additive, bool prior, bool log, bool unbiased) {
  const Inputs inputs(mu_r, logvar_r, mu_g, logvar_g, unbiased);
  const ScalarType wide = inputs.wide;
  std::vector<int64_t> batch = inputs.r.batch;
  Tensor distance = empty(mu_r, batch, wide);
  batch.push_back(3);
  // rounded log-sums would leave shares that do not add up to 1, by eps |log k|
  Tensor sums = empty(mu_r, batch, ScalarType::Double);

  const Data distances(distance, 1, wide), all_sums(sums, 1, ScalarType::Double);
  each_set(inputs.r.sets, inputs.cost(additive), [&](int64_t set, bool threaded) {
    Posteriors q = inputs[set];
    as_distance_run(q, inputs.dtype, additive, prior, threaded);
    set_value(distances, set, LogMeans(q).distance(log));
    for (int k = 0; k < 3; ++k) set_value(all_sums, 3 * set + k, q.log_sum[k]);
  });
  return {distance, sums};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> as_distance_backward(
    const Tensor& mu_r, const Tensor& logvar_r, const Tensor& mu_g, const Tensor& logvar_g, const Tensor& sums_,
    const std::optional<Tensor>& dvalue_, const std::optional<Tensor>& dsums_, bool additive, bool prior, bool log,
    bool unbiased) {
  const Inputs inputs(mu_r, logvar_r, mu_g, logvar_g, unbiased);
  const ScalarType dtype = inputs.dtype, wide = inputs.wide;
  const Tensor sums = as_contiguous(sums_), dvalue = dvalue_ ? as_contiguous(*dvalue_) : sums;
  const Tensor dsums = dsums_ ? as_contiguous(*dsums_) : sums;
  STD_TORCH_CHECK(sums.scalar_type() == ScalarType::Double && dsums.scalar_type() == ScalarType::Double &&
                      (!dvalue_ || dvalue.scalar_type() == wide),
                  "sums and dsums must be float64, and dvalue of the dtype of the arithmetic");
  Tensor results[4];
  Data data[4];
  for (int i = 0; i < 4; ++i) {
    const Shape& shape = i < 2 ? inputs.r : inputs.g;
    results[i] = empty(mu_r, shape.full, dtype);
    data[i] = Data(results[i], shape.n * shape.d, dtype);
  }

  const Data all_sums(sums, 1, ScalarType::Double), all_dsums(dsums, 1, ScalarType::Double), dvalues(dvalue, 1, wide);
  each_set(inputs.r.sets, 4 * inputs.cost(additive), [&](int64_t set, bool threaded) {
    Posteriors q = inputs[set];
    for (int k = 0; k < 3; ++k) q.log_sum[k] = value(all_sums, 3 * set + k);
    const LogMeans means(q);
    for (int k = 0; k < 3; ++k) {
      if (dsums_) q.grad[k] += value(all_dsums, 3 * set + k);
      if (dvalue_) q.grad[k] += value(dvalues, set) * means.slope(k, log);
    }
    for (int k = 0; k < 2; ++k) q.dmu[k] = data[2 * k][set], q.dlogvar[k] = data[2 * k + 1][set];
    as_distance_run(q, dtype, additive, prior, threaded);
  });
  return {results[0], results[1], results[2], results[3]};
}

STABLE_TORCH_LIBRARY_IMPL(ivfast, CPU, m) {
  m.impl("as_distance", TORCH_BOX(&as_distance));
  m.impl("as_distance_backward", TORCH_BOX(&as_distance_backward));
}

}  // namespace
}  // namespace ivfast
