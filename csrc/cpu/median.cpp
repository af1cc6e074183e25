// The median heuristic on the CPU: the middle distances, in float64 where float32 loses them, and their gradient.
#include "median.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <mutex>
#include <tuple>

#include "isa.h"
#include "median_stream.h"
#include "operator.h"
#include "run.h"

namespace ivfast {
namespace {

MedianStages stages_of(ScalarType dtype) { return IVFAST_BY_ISA(median_stages, storage(dtype)); }

// d² = 2u in the dtype of the arithmetic
double squared_distance(Key key, const MedianStages& stages) {
  return stages.element == 4 ? double(2 * bit_cast<float>(int32_t(key))) : 2 * bit_cast<double>(key);
}

Key key_of(double squared_distance, const MedianStages& stages) {
  return stages.element == 4 ? bit_cast<int32_t>(float(squared_distance / 2)) : bit_cast<Key>(squared_distance / 2);
}

// med² from the two middle squared distances
double combine(const double (&middles)[2], bool squared) {
  if (squared) return (middles[0] + middles[1]) / 2;
  const double mean = (std::sqrt(middles[0]) + std::sqrt(middles[1])) / 2;
  return mean * mean;
}

// The bandwidth, and the largest ‖x_i‖²/2
std::pair<Bandwidth, double> median_once(MedianSet set, const MedianStages& stages, const Heuristic& heuristic,
                                         bool threaded) {
  static thread_local Workspace workspace, memory;
  set.workspace = workspace.reserve(stages.bytes(set.n, set.d));
  const int64_t n = set.n, pairs = n * (n - 1) / 2, count = heuristic.full ? n * n : pairs;
  // entry k of the sorted matrix is 0 for k < n; after that each pair occurs twice
  const auto rank_of = [&](int64_t k) { return !heuristic.full ? k : k < n ? -1 : (k - n) / 2; };
  const int64_t ranks[2] = {pairs ? rank_of((count - 1) / 2) : -1, pairs ? rank_of(count / 2) : -1};
  Key keys[2] = {};
  bool finite = true;
  if (ranks[1] >= 0 && pairs <= median_kept_pairs) {
    finite = stages.pack(set, false);
    const auto [key, next] = stages.middle_of_all(set, std::max<int64_t>(ranks[0], 0));
    keys[0] = ranks[0] < 0 ? 0 : key, keys[1] = ranks[1] > ranks[0] && ranks[0] >= 0 ? next : key;
  } else if (ranks[1] >= 0) {
    finite = stages.pack(set, true);
    Stream stream(set, stages, threaded, memory);
    for (int a = 0; a < 2; ++a) keys[a] = stream.find(ranks[a]);
  }
  Bandwidth result{1, {squared_distance(keys[0], stages), squared_distance(keys[1], stages)}};
  double med2 = combine(result.middles, heuristic.squared);
  if (!(med2 > 0)) med2 = stages.spread(set);
  if (!finite) med2 = std::nan("");
  if (med2 != 0) result.h = med2 / heuristic.divisor;
  if (med2 != med2) result.middles[0] = result.middles[1] = med2;
  const double norm = ranks[1] >= 0 ? stages.norm(set) : 0;
  workspace.trim(), memory.trim();
  return {result, norm};
}

// A distance u loses a few eps ‖x‖². That shows if it is not small beside the middle. Squares of tiny numbers vanish,
// and those of huge ones are infinite.
bool median_lost(double middle, double norm) { return norm > 0x1p5 * middle || norm < 0x1p-80 || norm > 0x1p120; }

}  // namespace

Bandwidth median_run(const MedianSet& set, ScalarType dtype, const Heuristic& heuristic, bool threaded) {
  const auto [result, norm] = median_once(set, stages_of(dtype), heuristic, threaded);
  if (dtype == ScalarType::Double || result.h != result.h || !median_lost(result.middles[0], norm)) return result;
  std::vector<double> x;
  return median_once({set.n, set.d, to_float64(x, set.x, dtype, set.n * set.d), nullptr}, stages_of(ScalarType::Double),
                     heuristic, threaded).first;
}

namespace {

// The pairs at the middles, which are `rounded` by at most that share, in both orders: sorted if they are few, otherwise
// row by row of the whole matrix. False if there are none.
bool gradient(MedianSet set, const MedianStages& stages, const double (&middles)[2], double rounded, double grad,
              bool squared, double divisor, bool threaded, void* out) {
  static thread_local Workspace workspace, memory;
  const int64_t size = set.n * set.d;
  char* const dx = static_cast<char*>(memory.reserve(size * stages.element));
  const double med2 = combine(middles, squared);
  const bool lost = !std::isfinite(med2);  // NaN, or beyond the range of the dtype that holds the middles
  std::fill_n(dx, size * stages.element, lost ? -1 : 0);  // a number whose bits are all set is NaN
  if (med2 > 0 && !lost) {
    set.workspace = workspace.reserve(stages.bytes(set.n, set.d));
    stages.pack(set, false);
    // of lost distances, another pair's may happen to have the middle's bits
    if (rounded == 0 && stages.element == 4 && median_lost(1.001 * middles[0], stages.norm(set))) return false;
    const bool equal = middles[0] == middles[1];
    Key keys[2][2];  // at distance 0 the difference is 0
    for (int a = 0; a < 2; ++a)
      for (int end = 0; end < 2; ++end)
        keys[a][end] = middles[a] > 0 ? key_of(middles[a] * (1 + (2 * end - 1) * rounded), stages) : -1;
    if (rounded > 0 && !equal && middles[0] > 0) {  // a pair belongs to the nearer middle
      const Key between = key_of((middles[0] + middles[1]) / 2, stages);
      keys[0][1] = std::min(keys[0][1], between), keys[1][0] = std::max(keys[1][0], between + 1);
    }

    const size_t room = size_t(std::max<int64_t>(size / 8, 4096));
    constexpr int64_t most = median_tile * median_tile;
    std::vector<MedianPair> pairs;
    int64_t counts[2] = {};
    std::atomic<int64_t> next{0};
    std::mutex mutex;
    each_thread(threaded, [&] {
      std::vector<MedianPair> found(most);
      take_tiles(next, set.n, false, [&](int64_t i, int64_t j) {
        const int64_t matches = stages.match(set, i, j, keys, found.data());
        if (!matches) return;
        const std::lock_guard<std::mutex> lock(mutex);
        for (int64_t m = 0; m < matches; ++m) {
          const MedianPair pair = found[m];
          counts[pair.middle] += i == j ? 1 : 2;
          if (pairs.size() > room) continue;
          pairs.push_back(pair);
          if (i != j) pairs.push_back({pair.j, pair.i, pair.middle});
        }
      });
    });
    // ∂h/∂m_a: ½ for (m₁ + m₂)/2, (√m₁ + √m₂)/(4 √m_a) for ((√m₁ + √m₂)/2)²;  ∂d²_ij/∂x_i = 2 (x_i − x_j)
    double weights[2] = {};
    for (int a = 0; a < 2; ++a) {
      if (!(middles[a] > 0)) continue;
      const int found = equal ? 0 : a;
      if (counts[found] == 0) return false;
      const double roots = std::sqrt(middles[0]) + std::sqrt(middles[1]);
      const double slope = squared ? 0.5 : roots / (4 * std::sqrt(middles[a]));
      weights[found] += 2 * 2 * slope * grad / divisor / double(counts[found]);
    }
    if (pairs.size() <= room) {
      std::sort(pairs.begin(), pairs.end(),
                [](const MedianPair& a, const MedianPair& b) { return std::tie(a.i, a.j) < std::tie(b.i, b.j); });
      stages.add(set, pairs.data(), int64_t(pairs.size()), weights, dx);
    } else {
      next = 0;
      each_thread(threaded, [&] {
        std::vector<MedianPair> found(most);
        take_tiles(next, set.n, true, [&](int64_t i, int64_t j) {
          stages.add(set, found.data(), stages.match(set, i, j, keys, found.data()), weights, dx);
        });
      });
    }
  }
  stages.store(set, dx, out);
  workspace.trim(), memory.trim();
  return true;
}

std::tuple<Tensor, Tensor> median_bandwidth(const Tensor& x_, bool full, bool squared, double divisor) {
  const Shape shape(x_);
  const ScalarType dtype = x_.scalar_type(), wide = arithmetic(dtype);
  const Tensor x = as_contiguous(x_);
  std::vector<int64_t> two = shape.batch;
  two.push_back(2);
  Tensor h = empty(x, shape.batch, wide), middles = empty(x, two, wide);
  const Data xs(x, shape.n * shape.d, dtype), hs(h, 1, wide), all_middles(middles, 1, wide);
  each_set(shape.sets, shape.n * shape.n * (shape.d + 8), [&](int64_t set, bool threaded) {
    const Bandwidth result = median_run({shape.n, shape.d, xs[set], nullptr}, dtype, {full, squared, divisor}, threaded);
    set_value(hs, set, result.h);
    for (int a = 0; a < 2; ++a) set_value(all_middles, 2 * set + a, result.middles[a]);
  });
  return {h, middles};
}

Tensor median_bandwidth_backward(const Tensor& grad_, const Tensor& x_, const Tensor& middles_, bool squared,
                                 double divisor) {
  const Shape shape(x_);
  const ScalarType dtype = x_.scalar_type(), wide = arithmetic(dtype);
  STD_TORCH_CHECK(grad_.scalar_type() == wide && middles_.scalar_type() == wide,
                  "grad and middles must be in the dtype of the arithmetic");
  const Tensor grad = as_contiguous(grad_), x = as_contiguous(x_), middles = as_contiguous(middles_);
  Tensor dx = empty(x, shape.full, dtype);
  const int64_t size = shape.n * shape.d;
  const Data grads(grad, 1, wide), xs(x, size, dtype), all_middles(middles, 1, wide), dxs(dx, size, dtype);
  each_set(shape.sets, shape.n * shape.n * (shape.d + 8), [&](int64_t set, bool threaded) {
    const double two[2] = {value(all_middles, 2 * set), value(all_middles, 2 * set + 1)};
    const auto found = [&](const void* from, ScalarType in, double rounded, void* to) {
      return gradient({shape.n, shape.d, from, nullptr}, stages_of(in), two, rounded, value(grads, set), squared, divisor, threaded, to);
    };
    if (found(xs[set], dtype, 0, dxs[set])) return;
    // the forward pass found the middles in float64 and rounded them
    std::vector<double> from, to(size);
    STD_TORCH_CHECK(dtype != ScalarType::Double && found(to_float64(from, xs[set], dtype, size), ScalarType::Double, 0x1p-23, to.data()),
                    "middles must be squared distances of x as the forward pass computed them");
    from_float64(dxs[set], dtype, to);
  });
  return dx;
}

STABLE_TORCH_LIBRARY_IMPL(ivfast, CPU, m) {
  m.impl("median_bandwidth", TORCH_BOX(&median_bandwidth));
  m.impl("median_bandwidth_backward", TORCH_BOX(&median_bandwidth_backward));
}

}  // namespace

// For tests: the number of histogram passes (the slow path) so far.
extern "C" __attribute__((visibility("default"))) int64_t ivfast_median_histograms() { return histograms; }

// For tests: half the bracket's width around the requested rank, in units of √sampled ranks; 2 is the default.
extern "C" __attribute__((visibility("default"))) void ivfast_median_reach(double reach) { bracket_reach = reach; }

}  // namespace ivfast
