// The multi-class Jensen–Shannon loss on the CPU: the operators and the division of work among threads.
#include "multi_js.h"

#include <algorithm>
#include <optional>
#include <tuple>

#include "isa.h"
#include "rows.h"

namespace ivfast {
namespace {

// Logits [..., C, n, C], or [C·n, C] for a single set.
struct LogitBlocks {
  std::vector<int64_t> full, rows_shape, batch;
  int64_t classes, n, rows, sets = 1;

  explicit LogitBlocks(const Tensor& logits) {
    const auto sizes = logits.sizes();
    full.assign(sizes.begin(), sizes.end()), rows_shape.assign(sizes.begin(), sizes.end() - 1);
    classes = full.back();
    if (full.size() > 2) batch.assign(sizes.begin(), sizes.end() - 3);
    n = full.size() > 2 ? full[full.size() - 2] : full[0] / classes;
    rows = classes * n;
    for (int64_t size : batch) sets *= size;
    STD_TORCH_CHECK(n >= 1 && classes >= 2, "logits must hold n >= 1 rows of each of C >= 2 classes");
  }
};

// f(set, first, last, scratch) for pieces of the rows of all sets. Pieces do not depend on the number of threads.
// Returns the sums of each set.
template <class F>
std::vector<double> each_piece(int64_t sets, int64_t rows, int64_t classes, const F& f) {
  const int64_t size = std::max<int64_t>(16, (1 << 15) / classes / 16 * 16), pieces = (rows + size - 1) / size;
  std::vector<double> sums(sets);
  if (sets == 1 && pieces == 1) {
    static thread_local Workspace workspace;
    sums[0] = f(0, 0, rows, workspace.reserve(classes * int64_t(sizeof(double))));
    return sums;
  }
  std::vector<double> parts(sets * pieces);
  const auto range = [&](int64_t begin, int64_t end) {
    static thread_local Workspace workspace;
    void* const scratch = workspace.reserve(classes * int64_t(sizeof(double)));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % pieces * size;
      parts[i] = f(i / pieces, first, std::min(rows, first + size), scratch);
    }
  };
  const int64_t cost = std::min(size, rows) * classes * 16;  // approximate flop
  if (sets * pieces * cost <= worth_a_thread)
    range(0, sets * pieces);
  else
    parallel_for(0, sets * pieces, worth_a_thread / cost / 4 + 1, range);
  for (int64_t i = 0; i < sets * pieces; ++i) sums[i / pieces] += parts[i];
  return sums;
}

const void* weights_of(const std::optional<Tensor>& weights, ScalarType wide) {
  if (!weights) return nullptr;
  STD_TORCH_CHECK(weights->scalar_type() == wide && weights->is_contiguous(),
                  "weights must be contiguous, in the dtype of the arithmetic");
  return weights->data_ptr();
}

std::optional<Tensor> contiguous(const std::optional<Tensor>& x) {
  return x ? std::optional<Tensor>(as_contiguous(*x)) : std::nullopt;
}

std::tuple<Tensor, Tensor> multi_js_loss(const Tensor& logits_, const std::optional<Tensor>& weights_,
                                         double smoothing) {
  const LogitBlocks blocks(logits_);
  const ScalarType dtype = logits_.scalar_type(), wide = arithmetic(dtype);
  const Tensor logits = as_contiguous(logits_);
  const std::optional<Tensor> weights = contiguous(weights_);
  Tensor loss = empty(logits, blocks.batch, wide), lse = empty(logits, blocks.rows_shape, wide);

  const Data x(logits, blocks.classes, dtype), lses(lse, 1, wide), losses(loss, 1, wide);
  const MultiJsStages stages = IVFAST_BY_ISA(multi_js_stages, storage(dtype));
  MultiJsRows all{blocks.classes, blocks.n, 0, 0, smoothing, 1, weights_of(weights, wide), nullptr, nullptr, nullptr, nullptr};
  const auto sums = each_piece(blocks.sets, blocks.rows, blocks.classes, [&](int64_t set, int64_t first, int64_t last, void* scratch) {
    MultiJsRows rows = all;
    const int64_t row = set * blocks.rows + first;
    rows.scratch = scratch, rows.first = first, rows.last = last, rows.logits = x[row], rows.lse = lses[row];
    return stages.forward(rows);
  });
  for (int64_t set = 0; set < blocks.sets; ++set) set_value(losses, set, sums[set]);
  return {loss, lse};
}

Tensor multi_js_loss_backward(const Tensor& grad_, const Tensor& logits_, const std::optional<Tensor>& weights_,
                              const Tensor& lse_, double smoothing) {
  const LogitBlocks blocks(logits_);
  const ScalarType dtype = logits_.scalar_type(), wide = arithmetic(dtype);
  const Tensor grad = as_contiguous(grad_), logits = as_contiguous(logits_), lse = as_contiguous(lse_);
  const std::optional<Tensor> weights = contiguous(weights_);
  Tensor gradient = empty_large(logits, blocks.full, dtype);

  const Data x(logits, blocks.classes, dtype), lses(lse, 1, wide), grads(grad, 1, wide);
  const Data gradients(gradient, blocks.classes, dtype);
  const MultiJsStages stages = IVFAST_BY_ISA(multi_js_stages, storage(dtype));
  MultiJsRows all{blocks.classes, blocks.n, 0, 0, smoothing, 1, weights_of(weights, wide), nullptr, nullptr, nullptr, nullptr};
  each_piece(blocks.sets, blocks.rows, blocks.classes, [&](int64_t set, int64_t first, int64_t last, void* scratch) {
    MultiJsRows rows = all;
    const int64_t row = set * blocks.rows + first;
    rows.scratch = scratch, rows.first = first, rows.last = last, rows.scale = value(grads, set);
    rows.logits = x[row], rows.lse = lses[row], rows.gradient = gradients[row];
    stages.backward(rows);
    return 0.;
  });
  return gradient;
}

Tensor multi_js_rows(Tensor logits, const std::optional<Tensor>& weights_, double smoothing, int64_t first, int64_t n,
                     bool gradient) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous(), "logits must be contiguous rows [r, C]");
  const ScalarType dtype = logits.scalar_type(), wide = arithmetic(dtype);
  const int64_t classes = logits.sizes()[1];
  const std::optional<Tensor> weights = contiguous(weights_);
  Tensor loss = empty(logits, {}, wide);

  const Data x(logits, classes, dtype), losses(loss, 1, wide);
  const MultiJsStages stages = IVFAST_BY_ISA(multi_js_stages, storage(dtype));
  MultiJsRows all{classes, n, 0, 0, smoothing, 1, weights_of(weights, wide), nullptr, nullptr, nullptr, nullptr};
  const auto sums = each_piece(1, logits.sizes()[0], classes, [&](int64_t, int64_t begin, int64_t end, void* scratch) {
    MultiJsRows rows = all;
    rows.scratch = scratch, rows.first = first + begin, rows.last = first + end, rows.logits = x[begin], rows.gradient = x[begin];
    return gradient ? stages.both(rows) : stages.forward(rows);
  });
  set_value(losses, 0, sums[0]);
  return loss;
}

STABLE_TORCH_LIBRARY_IMPL(ivfast, CPU, m) {
  m.impl("multi_js_loss", TORCH_BOX(&multi_js_loss));
  m.impl("multi_js_loss_backward", TORCH_BOX(&multi_js_loss_backward));
  m.impl("multi_js_rows_", TORCH_BOX(&multi_js_rows));
}

}  // namespace
}  // namespace ivfast
