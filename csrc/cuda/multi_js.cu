// Multi-class Jensen–Shannon loss. Depending on the number of classes, a thread, part of a warp, a warp or a block
// handles a row, or a thread several rows.
//
// loss = Σ_rows w (lse − Σ_c target_c x_c),  ∂loss/∂x = w (softmax(x) − target),  w = π_c/n of the row's own class c
#include "multi_js_few.h"

#include <optional>
#include <tuple>

namespace ivfast {

constexpr int kMostStaged = 32;  // classes up to which one thread handles a row, from shared memory
constexpr int kMostRows = 1024;  // rows of a set up to which one block of such threads handles them
constexpr int kMostBlocks = 512;  // of all sets together, if they add up a loss: the last of a set reads all reports
constexpr int64_t kMostInGrid = 65535;  // of a set, where no block waits for another
constexpr int kFewTiles = 4;  // up to this many, one block is faster than several that report to each other

// Each block: tiles with one row per thread. The gradient, if any, may overwrite x; it is that of Σ grad·loss, or of the
// loss without `grad`.
template <class T>
__global__ void __launch_bounds__(kMostRows, 1) staged_kernel(
    const T* x, T* gradient, const float* __restrict__ grad, const float* __restrict__ weights, float* __restrict__ lse,
    float* __restrict__ loss, double* reports, Rows rows) {
  const int64_t set = blockIdx.x;
  const Reports<1> blocks(reports, set, rows.signature);
  const int C = rows.classes, stride = C | 1;  // odd: the rows of a warp are on different banks
  x += set * rows.count * C, gradient += gradient ? set * rows.count * C : 0, lse += lse ? set * rows.count : 0;
  const float scale = grad ? grad[set] : 1.f;
  float* tile = reinterpret_cast<float*>(dynamic_shared);
  float* row = tile + static_cast<int>(threadIdx.x) * stride;
  double sum = 0;

  for (int64_t start = int64_t{blockIdx.y} * blockDim.x; start < rows.count; start += int64_t{gridDim.y} * blockDim.x) {
    const int here = static_cast<int>(min(int64_t{blockDim.x}, rows.count - start)), elements = here * C;
    const T* x_here = x + start * C;
    // f(pack, at, i, position in the tile) for the elements of this thread's packs
    const auto each = [&](auto load, auto f, auto store) {
      const int first = static_cast<int>(threadIdx.x) * kPack<T> - past_boundary(x_here);
      for (int at = first; at < elements; at += static_cast<int>(blockDim.x) * kPack<T>) {
        float v[kPack<T>];
        load(v, at);
        int r = max(at, 0) / C, c = max(at, 0) - r * C;
#pragma unroll
        for (int i = 0; i < kPack<T>; ++i) {
          if (at + i < 0 || at + i >= elements) continue;
          f(v[i], tile[r * stride + c]);
          if (++c == C) c = 0, ++r;
        }
        store(v, at);
      }
    };
    const auto nothing = [](const auto&, int) {};

    __syncthreads();  // the last tile is read
    each(
        [&](auto& v, int at) { load_pack(v, x_here, at, elements, 0.f); }, [](float v, float& to) { to = v; }, nothing);
    __syncthreads();

    if (static_cast<int>(threadIdx.x) < here) {
      const int own = rows.class_of(start + threadIdx.x);
      float most = -INFINITY;
      for (int c = 0; c < C; ++c) most = fmaxf(most, row[c]);
      const float x_own = row[own];
      Row r{finite(most), 0.f, 0.f};
      for (int c = 0; c < C; ++c) {
        const float e = expf(row[c] - r.shift);
        r.sum += e, r.total += row[c] - finite(x_own);
        if (gradient) row[c] = e;
      }
      const double weight = rows.weight(weights, own);
      sum += weight * static_cast<double>(r.loss(rows, x_own));
      if (lse) lse[start + threadIdx.x] = r.lse();
      if (gradient) {
        const float w = scale * static_cast<float>(weight), per_sum = r.per_sum();
        for (int c = 0; c < C; ++c) row[c] = w * (row[c] * per_sum - rows.share - (c == own ? rows.keep : 0.f));
      }
    }
    if (gradient) {
      __syncthreads();
      each(nothing, [](float& v, float from) { v = from; }, [&](const auto& v, int at) {
        store_pack(gradient + start * C, v, at, elements);
      });
    }
  }
  if (loss) sum_over_blocks(sum, loss + set, blocks);
}

// Each block: kThreads / Team rows at a time.
template <int Team, class T>
__global__ void __launch_bounds__(kThreads, 3) team_kernel(
    const T* x, T* gradient, const float* __restrict__ grad, const float* __restrict__ weights, float* __restrict__ lse,
    float* __restrict__ loss, double* reports, Rows rows) {
  constexpr int teams = kThreads / Team;
  __shared__ float scratch[kThreads / 32];
  const int64_t set = blockIdx.x;
  const Reports<1> blocks(reports, set, rows.signature);
  const int C = rows.classes, lane = threadIdx.x % Team;
  x += set * rows.count * C, gradient += gradient ? set * rows.count * C : 0, lse += lse ? set * rows.count : 0;
  const float scale = grad ? grad[set] : 1.f;
  double sum = 0;

  for (int64_t start = int64_t{blockIdx.y} * teams; start < rows.count; start += int64_t{gridDim.y} * teams) {
    const int64_t at_row = start + threadIdx.x / Team;
    const bool exists = at_row < rows.count;
    const T* x_row = x + (exists ? at_row : 0) * C;
    const int classes = exists ? C : 0, own = exists ? rows.class_of(at_row) : 0;
    const float x_own = static_cast<float>(x_row[own]);
    const Row row = row_of<Team>(x_row, classes, x_own, scratch);

    const double weight = rows.weight(weights, own);
    if (exists && lane == 0) {
      sum += weight * static_cast<double>(row.loss(rows, x_own));
      if (lse) lse[at_row] = row.lse();
    }
    if (gradient) {
      if constexpr (Team > 32) __syncthreads();  // all have read x_own
      else __syncwarp();
      const float w = scale * static_cast<float>(weight), per_sum = row.per_sum();
      T* to = gradient + (exists ? at_row : 0) * C;
      for (int at = lane * kPack<T> - past_boundary(x_row); at < classes; at += Team * kPack<T>) {
        float v[kPack<T>];
        load_pack(v, x_row, at, classes, 0.f);
#pragma unroll
        for (int i = 0; i < kPack<T>; ++i) {
          v[i] = w * (expf(v[i] - row.shift) * per_sum - rows.share - (at + i == own ? rows.keep : 0.f));
        }
        store_pack(to, v, at, classes);
      }
    }
  }
  if (loss) sum_over_blocks(sum, loss + set, blocks);
}

Rows rows_of(const char* op, int64_t first, int64_t count, int64_t n, int64_t classes, double smoothing) {
  STD_TORCH_CHECK(
      classes >= 2 && classes <= (1 << 30) && n >= 1, op, " takes n >= 1 rows of C logits with 2 <= C <= 2^30, got n = ",
      n, ", C = ", classes);
  return {
      first, count, n, static_cast<int>(classes), static_cast<float>(1 - smoothing),
      static_cast<float>(smoothing / static_cast<double>(classes)), 1 / (static_cast<double>(classes) * static_cast<double>(n)),
      new_signature()};
}

// Of x [sets, rows.count, C], those of loss [sets], lse and gradient that are not null
template <class T>
void launch_rows(
    const Tensor& x, const std::optional<Tensor>& weights, float* lse, float* loss, int64_t sets, const Rows& rows,
    T* gradient, const float* grad = nullptr) {
  const auto start = [&](auto kernel, int64_t rows_at_once, int threads, size_t shared) {
    const int64_t tiles = ceil_div(rows.count, rows_at_once);
    const int64_t most = loss ? std::max<int64_t>(1, kMostBlocks / sets) : kMostInGrid;
    const int64_t blocks = loss && tiles <= kFewTiles ? 1 : std::min(tiles, most);
    std::optional<Tensor> reports;
    if (loss && blocks > 1) reports = new_reports<1>(x, sets, blocks);
    launch(
        x, kernel, dim3(sets, blocks), threads, shared, x.const_data_ptr<T>(), gradient, grad,
        weights ? weights->const_data_ptr<float>() : nullptr, lse, loss, reports ? reports->mutable_data_ptr<double>() : nullptr,
        rows);
  };
  const auto starts_on_boundary = [&](const T* at) { return past_boundary(at) == 0; };
  const bool aligned = starts_on_boundary(x.const_data_ptr<T>()) && (!gradient || starts_on_boundary(gradient)) &&
                       (sets == 1 || rows.count * rows.classes % kPack<T> == 0);
  if (rows.classes <= kMostFew && rows.count > kMostRows && aligned) {
    return by_few(rows.classes, [&](auto C) {
      start(few_kernel<C, T>, kThreads / 32 * Few<C, T>::kTile, kThreads, 0);
    });
  }
  if (rows.classes <= kMostStaged) {
    const int stride = rows.classes | 1, fit = 48 * 1024 / static_cast<int>(sizeof(float)) / stride / 32 * 32;
    const int wanted = rows.count > kMostRows ? kThreads : round_up(std::max(1, static_cast<int>(rows.count)), 32);
    const int threads = std::min(wanted, fit);
    return start(staged_kernel<T>, threads, threads, sizeof(float) * threads * stride);
  }
  if (rows.classes <= 256) return start(team_kernel<8, T>, kThreads / 8, kThreads, 0);
  if (rows.classes <= 4096) return start(team_kernel<32, T>, kThreads / 32, kThreads, 0);
  start(team_kernel<kThreads, T>, 1, kThreads, 0);
}

// The layout of logits [..., C, n, C] or [C n, C]: the batch and the rows of a set
struct Logits {
  std::vector<int64_t> batch, rows;
  int64_t sets = 1, classes, n;

  explicit Logits(const Tensor& logits) {
    const auto sizes = logits.sizes();
    classes = sizes[sizes.size() - 1], n = sizes[sizes.size() - 2];
    rows.assign(sizes.begin(), sizes.end() - 1);
    if (sizes.size() == 2) n /= classes;
    else batch.assign(sizes.begin(), sizes.end() - 3);
    for (const int64_t size : batch) sets *= size;
  }
};

std::tuple<Tensor, Tensor> multi_js_loss(Tensor logits, std::optional<Tensor> weights, double label_smoothing) {
  const Logits shape(logits);
  const Rows rows = rows_of("multi_js_loss", 0, shape.classes * shape.n, shape.n, shape.classes, label_smoothing);
  logits = as_contiguous(logits);
  if (weights) weights = as_contiguous(*weights);
  Tensor loss = empty(logits, shape.batch, ScalarType::Float), lse = empty(logits, shape.rows, ScalarType::Float);
  by_dtype("multi_js_loss", logits, [&](auto zero) {
    if (shape.sets == 0) return;
    launch_rows<decltype(zero)>(
        logits, weights, lse.mutable_data_ptr<float>(), loss.mutable_data_ptr<float>(), shape.sets, rows, nullptr);
  });
  return {loss, lse};
}

// The shares need Σ e^{x − lse}, which a rounded lse does not make 1: each row's is summed again, and lse is not read.
Tensor multi_js_loss_backward(
    Tensor grad, Tensor logits, std::optional<Tensor> weights, Tensor, double label_smoothing) {
  const Logits shape(logits);
  const Rows rows = rows_of("multi_js_loss_backward", 0, shape.classes * shape.n, shape.n, shape.classes, label_smoothing);
  grad = as_contiguous(grad), logits = as_contiguous(logits);
  if (weights) weights = as_contiguous(*weights);
  const auto sizes = logits.sizes();
  Tensor dx = empty(logits, {sizes.begin(), sizes.end()}, logits.scalar_type());
  by_dtype("multi_js_loss_backward", logits, [&](auto zero) {
    using T = decltype(zero);
    if (shape.sets == 0) return;
    launch_rows<T>(
        logits, weights, nullptr, nullptr, shape.sets, rows, dx.mutable_data_ptr<T>(), grad.const_data_ptr<float>());
  });
  return dx;
}

Tensor multi_js_rows_(
    Tensor logits, std::optional<Tensor> weights, double label_smoothing, int64_t first, int64_t n, bool gradient) {
  const Rows rows = rows_of("multi_js_rows_", first, logits.size(0), n, logits.size(1), label_smoothing);
  if (weights) weights = as_contiguous(*weights);
  const Tensor x = as_contiguous(logits);
  Tensor loss = empty(logits, {}, ScalarType::Float);
  by_dtype("multi_js_rows_", logits, [&](auto zero) {
    using T = decltype(zero);
    T* to = gradient ? x.mutable_data_ptr<T>() : nullptr;
    launch_rows<T>(x, weights, nullptr, loss.mutable_data_ptr<float>(), 1, rows, to);
  });
  if (gradient && !logits.is_contiguous()) torch::stable::copy_(logits, x);
  return loss;
}

STABLE_TORCH_LIBRARY_IMPL(ivfast, IVFAST_CUDA_KEY, m) {
  m.impl("multi_js_loss.cuda", TORCH_BOX(&multi_js_loss));
  m.impl("multi_js_loss_backward.cuda", TORCH_BOX(&multi_js_loss_backward));
  m.impl("multi_js_rows_.cuda", TORCH_BOX(&multi_js_rows_));
}

}  // namespace ivfast
