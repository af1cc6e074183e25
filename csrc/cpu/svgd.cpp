// The SVGD direction on the CPU: the operators, and which thread does what.
#include "svgd.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <optional>
#include <thread>
#include <tuple>

#include "isa.h"
#include "operator.h"

namespace ivfast {
namespace {

SvgdStages stages(ScalarType dtype, bool backward) { return IVFAST_BY_ISA(svgd_stages, storage(dtype), backward); }

// Rows of a block: few enough blocks that handing them out is cheap, enough of them for many threads, and two tiles of
// wide rows so that a tile's rows are used twice from the second-level cache. Never a function of the number of
// threads: the blocks decide the order of every sum.
int64_t block_rows(int64_t n, int64_t d) {
  const int64_t edge = svgd_tile(n), least = n >= 1024 && d >= 256 ? 2 * edge : edge;
  return std::clamp<int64_t>((n / 32 + edge - 1) / edge * edge, least, 512);
}

// The stages of one particle set as a list of tasks that any number of threads may work off: each block is begun, meets
// every other block in a round-robin tournament, and is finished. A task waits until its blocks have played the rounds
// before it; these stand earlier in the list, so that some thread is already at work on them. There is no barrier.
class Tournament {
 public:
  Tournament(const SvgdSet& set, const SvgdStages& stages)
      : set_(set), stages_(stages), size_(block_rows(set.n, set.d)), blocks_((set.n + size_ - 1) / size_) {
    seats_ = (blocks_ + 1) / 2 * 2, rounds_ = seats_ - 1;  // with an odd number of blocks one rests in each round
    if (blocks_ > few) more_.reset(new std::atomic<int64_t>[size_t(blocks_)]);
    played_ = blocks_ > few ? more_.get() : few_;
    for (int64_t block = 0; block < blocks_; ++block) played_[block].store(0, std::memory_order_relaxed);
  }

  void work() {
    const int64_t games = rounds_ * (seats_ / 2), tasks = blocks_ + games + blocks_;
    for (int64_t task; (task = next_.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      if (task < blocks_) {
        stages_.begin(set_, first(task), last(task));
        played_[task].store(1, std::memory_order_release);
      } else if (task < blocks_ + games) {
        play((task - blocks_) / (seats_ / 2), (task - blocks_) % (seats_ / 2));
      } else {
        const int64_t block = task - blocks_ - games;
        wait(block, rounds_ + 1);
        stages_.finish(set_, first(block), last(block));
      }
    }
  }

 private:
  static constexpr int64_t few = 32;

  void play(int64_t round, int64_t seat) {
    const int64_t a = seat == 0 ? rounds_ : (round + seat) % rounds_, b = (round + rounds_ - seat) % rounds_;
    for (const int64_t block : {a, b})
      if (block < blocks_) wait(block, round + 1);
    if (std::max(a, b) < blocks_) stages_.pair(set_, first(a), last(a), first(b), last(b));
    for (const int64_t block : {a, b})
      if (block < blocks_) played_[block].store(round + 2, std::memory_order_release);
  }

  void wait(int64_t block, int64_t stages) const {
    for (int tries = 0; played_[block].load(std::memory_order_acquire) < stages; ++tries)
      if (tries > 1000) std::this_thread::yield();
  }

  int64_t first(int64_t block) const { return block * size_; }
  int64_t last(int64_t block) const { return std::min(set_.n, (block + 1) * size_); }

  const SvgdSet& set_;
  const SvgdStages& stages_;
  int64_t size_, blocks_, seats_, rounds_;
  std::atomic<int64_t> next_{0}, few_[few], *played_;  // stages that each block has behind it
  std::unique_ptr<std::atomic<int64_t>[]> more_;
};

}  // namespace

double svgd_run(SvgdSet set, const SvgdStages& stages, bool threaded) {
  static thread_local Workspace workspace;
  set.workspace = workspace.reserve(stages.bytes(set.n, set.d));
  stages.centre(set);
  Tournament tournament(set, stages);
  if (threaded)
    torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1,
                                [&](int64_t, int64_t) { tournament.work(); });
  else
    tournament.work();
  const double gradient = stages.bandwidth_gradient ? stages.bandwidth_gradient(set) : 0;
  workspace.trim();
  return gradient;
}

namespace {

// `svgd_run` for each particle set, then `done`: threads share a large set, or take small sets each.
template <class SetOf, class Done>
void run_batch(int64_t batch, const SvgdStages& stages, const SetOf& set_of, const Done& done) {
  if (batch == 0) return;
  const SvgdSet set = set_of(0);
  const int64_t cost = set.n * set.n * (set.d + 8) * (set.grad ? 7 : 3);  // flop, about
  const bool large = cost > worth_a_thread;
  if (batch == 1 || (large && batch < int64_t(torch::stable::get_num_threads()))) {
    for (int64_t i = 0; i < batch; ++i) done(i, svgd_run(set_of(i), stages, large));
    return;
  }
  const auto range = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) done(i, svgd_run(set_of(i), stages, false));
  };
  const int64_t grain = std::max<int64_t>(1, worth_a_thread / cost);
  if (batch <= grain)
    range(0, batch);
  else
    torch::stable::parallel_for(0, batch, grain, range);
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
  run_batch(shape.sets, stages(dtype, false), set_of, [](int64_t, double) {});
  return {phi, row_sum};
}

// row_sum is not read: K' of a narrow kernel is lost in 1 + K', and its sums come with its tiles.
std::tuple<Tensor, Tensor, Tensor> svgd_direction_backward(const Tensor& grad_, const Tensor& x_,
                                                           const std::optional<Tensor>& score_, const Tensor& h_,
                                                           const Tensor&) {
  const Shape shape(x_);
  const ScalarType dtype = x_.scalar_type(), wide = arithmetic(dtype);
  STD_TORCH_CHECK(h_.scalar_type() == wide, "bandwidth must be in the dtype of the arithmetic");
  const int64_t size = shape.n * shape.d;
  const Tensor grad = as_contiguous(grad_), x = as_contiguous(x_), h = as_contiguous(h_);
  const Tensor score = score_ ? as_contiguous(*score_) : x;
  Tensor dx = empty(x, shape.full, dtype), dh = empty(x, shape.batch, wide);
  Tensor dscore = score_ ? empty(x, shape.full, dtype) : empty(x, {0}, dtype);

  const Data grads(grad, size, dtype), xs(x, size, dtype), hs(h, 1, wide), dxs(dx, size, dtype), dhs(dh, 1, wide);
  const Data scores = score_ ? Data(score, size, dtype) : Data(), dscores = score_ ? Data(dscore, size, dtype) : Data();
  const auto set_of = [&](int64_t i) {
    SvgdSet set{};
    set.n = shape.n, set.d = shape.d, set.h = value(hs, i);
    set.x = xs[i], set.score = scores[i], set.grad = grads[i], set.dx = dxs[i], set.dscore = dscores[i];
    return set;
  };
  run_batch(shape.sets, stages(dtype, true), set_of, [&](int64_t i, double gradient) {
    if (wide == ScalarType::Double)
      *static_cast<double*>(dhs[i]) = gradient;
    else
      *static_cast<float*>(dhs[i]) = float(gradient);
  });
  return {dx, dscore, dh};
}

STABLE_TORCH_LIBRARY_IMPL(ivfast, CPU, m) {
  m.impl("svgd_direction", TORCH_BOX(&svgd_direction));
  m.impl("svgd_direction_backward", TORCH_BOX(&svgd_direction_backward));
}

}  // namespace

}  // namespace ivfast
