// The SVGD bridge on the CPU: every iterate of every particle set in one call, forward and backward.
#include <cmath>
#include <tuple>

#include "isa.h"
#include "median.h"
#include "operator.h"
#include "svgd.h"

namespace ivfast {
namespace {

// Steps of one particle set [n, d] among `sets`: blocks of a step lie `sets` blocks apart.
struct Trajectory {
  int64_t n, d, sets, length, iterations;
  double step_size, scale, noise;
};

template <class S, class T>
void forward(const Trajectory& t, const S* draws, S* bridges, T* states, T* bandwidths, T* row_sums, bool threaded) {
  static thread_local Workspace workspace;
  const int64_t size = t.n * t.d, stride = t.sets * size;
  T* const phi = static_cast<T*>(workspace.reserve(2 * size * int64_t(sizeof(T))));
  constexpr Storage storage = sizeof(T) == 8 ? Storage::float64 : Storage::float32;
  const MedianStages median = IVFAST_BY_ISA(median_stages, storage);
  const SvgdStages svgd = IVFAST_BY_ISA(svgd_stages, storage, false);
  const Heuristic paper{false, false, std::log(t.n == 1 ? 2. : double(t.n))};
  const T step_size = T(t.step_size), noise = T(t.noise);
  for (int64_t e = 0; e < size; ++e) states[e] = load(bridges[e]);
  for (int64_t step = 0; step < t.length; ++step) {
    const T* const x = states + step * stride;
    T& h = bandwidths[step * t.sets];
    h = T(t.scale * median_run({t.n, t.d, x, nullptr}, median, paper, threaded).h);
    SvgdSet set{};
    set.n = t.n, set.d = t.d, set.h = h, set.x = x, set.phi = phi, set.row_sum = row_sums + step * t.sets * t.n;
    svgd_run(set, svgd, threaded);
    // x ← x + step_size φ + noise ε
    T* const next = step + 1 < t.length ? states + (step + 1) * stride : phi + size;
    const S* const draw = draws + step * stride;
    for (int64_t e = 0; e < size; ++e) next[e] = x[e] + step_size * phi[e] + noise * load(draw[e]);
    if ((step + 1) % t.iterations) continue;
    S* const bridge = bridges + (step + 1) / t.iterations * stride;
    for (int64_t e = 0; e < size; ++e) store(bridge + e, next[e]);
  }
  workspace.trim();
}

template <class S, class T>
void backward(const Trajectory& t, const S* grad, const T* states, const T* bandwidths, S* dz, bool threaded) {
  static thread_local Workspace workspace;
  const int64_t size = t.n * t.d, stride = t.sets * size;
  T* const g = static_cast<T*>(workspace.reserve(3 * size * int64_t(sizeof(T))));
  T *const pushed = g + size, *const dx = pushed + size;
  constexpr Storage storage = sizeof(T) == 8 ? Storage::float64 : Storage::float32;
  const SvgdStages svgd = IVFAST_BY_ISA(svgd_stages, storage, true);
  const T step_size = T(t.step_size);
  for (int64_t e = 0; e < size; ++e) g[e] = 0;
  for (int64_t step = t.length; step-- > 0;) {
    const S* const from = grad + (step + 1) / t.iterations * stride;
    if ((step + 1) % t.iterations == 0)
      for (int64_t e = 0; e < size; ++e) g[e] += load(from[e]);
    for (int64_t e = 0; e < size; ++e) pushed[e] = step_size * g[e];
    SvgdSet set{};
    set.n = t.n, set.d = t.d, set.h = bandwidths[step * t.sets], set.x = states + step * stride;
    set.grad = pushed, set.dx = dx;
    svgd_run(set, svgd, threaded);
    for (int64_t e = 0; e < size; ++e) g[e] += dx[e];
  }
  for (int64_t e = 0; e < size; ++e) store(dz + e, g[e] + load(grad[e]));
  workspace.trim();
}

// f(S*, T*) with the dtypes of storage and arithmetic
template <class F>
void by_dtype(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Double: return f((double*)nullptr, (double*)nullptr);
    case ScalarType::BFloat16: return f((BFloat16*)nullptr, (float*)nullptr);
    case ScalarType::Half: return f((Float16*)nullptr, (float*)nullptr);
    default: return f((float*)nullptr, (float*)nullptr);
  }
}

std::vector<int64_t> stacked(int64_t first, const std::vector<int64_t>& sizes) {
  std::vector<int64_t> result{first};
  result.insert(result.end(), sizes.begin(), sizes.end());
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> svgd_bridge(const Tensor& z_, const Tensor& draws_, int64_t t,
                                                       int64_t iterations, double step_size, double scale,
                                                       double noise) {
  const Shape shape(z_);
  const ScalarType dtype = z_.scalar_type(), wide = arithmetic(dtype);
  STD_TORCH_CHECK(t >= 1 && iterations >= 1, "t and iterations must be at least 1, got ", t, " and ", iterations);
  const int64_t n = shape.n, size = n * shape.d, length = (t - 1) * iterations, sets = shape.sets;
  const Tensor z = as_contiguous(z_), draws = as_contiguous(draws_);
  STD_TORCH_CHECK(draws.numel() == (length + 1) * sets * size && draws.scalar_type() == dtype,
                  "draws must hold ", length + 1, " blocks of z's shape and dtype");
  Tensor bridges = empty(z, stacked(t + 1, shape.full), dtype), states = empty(z, stacked(length, shape.full), wide);
  Tensor bandwidths = empty(z, stacked(length, shape.batch), wide);
  Tensor row_sums = empty(z, stacked(length, shape.rows), wide);
  const Trajectory trajectory{n, shape.d, sets, length, iterations, step_size, scale, noise};
  by_dtype(dtype, [&](auto* s, auto* a) {
    using S = std::remove_pointer_t<decltype(s)>;
    using T = std::remove_pointer_t<decltype(a)>;
    S* const out = static_cast<S*>(bridges.data_ptr());
    const S* const noises = static_cast<const S*>(draws.data_ptr());
    std::copy_n(static_cast<const S*>(z.data_ptr()), sets * size, out);
    std::copy_n(noises + length * sets * size, sets * size, out + t * sets * size);
    if (length == 0) return;
    T *const x = static_cast<T*>(states.data_ptr()), *const h = static_cast<T*>(bandwidths.data_ptr());
    T* const r = static_cast<T*>(row_sums.data_ptr());
    each_set(sets, length * n * n * (5 * shape.d + 20), [&](int64_t set, bool threaded) {
      forward<S, T>(trajectory, noises + set * size, out + set * size, x + set * size, h + set, r + set * n, threaded);
    });
  });
  return {bridges, states, bandwidths, row_sums};
}

Tensor svgd_bridge_backward(const Tensor& grad_, const Tensor& states_, const Tensor& bandwidths_, const Tensor&,
                            int64_t iterations, double step_size) {
  const Tensor grad = as_contiguous(grad_), states = as_contiguous(states_), bandwidths = as_contiguous(bandwidths_);
  const ScalarType dtype = grad.scalar_type(), wide = arithmetic(dtype);
  STD_TORCH_CHECK(states.scalar_type() == wide && bandwidths.scalar_type() == wide,
                  "states and bandwidths must be in the dtype of the arithmetic");
  const auto sizes = grad.sizes();
  const std::vector<int64_t> full(sizes.begin() + 1, sizes.end());
  Tensor dz = empty(grad, full, dtype);
  const Shape shape(dz);
  const int64_t n = shape.n, size = n * shape.d, length = states.sizes()[0], sets = shape.sets;
  const Trajectory trajectory{n, shape.d, sets, length, iterations, step_size, 1, 0};
  by_dtype(dtype, [&](auto* s, auto* a) {
    using S = std::remove_pointer_t<decltype(s)>;
    using T = std::remove_pointer_t<decltype(a)>;
    const S* const g = static_cast<const S*>(grad.data_ptr());
    const T *const x = static_cast<const T*>(states.data_ptr()), *const h = static_cast<const T*>(bandwidths.data_ptr());
    S* const out = static_cast<S*>(dz.data_ptr());
    each_set(sets, length * n * n * (10 * shape.d + 20), [&](int64_t set, bool threaded) {
      backward<S, T>(trajectory, g + set * size, x + set * size, h + set, out + set * size, threaded);
    });
  });
  return dz;
}

STABLE_TORCH_LIBRARY_IMPL(ivfast, CPU, m) {
  m.impl("svgd_bridge", TORCH_BOX(&svgd_bridge));
  m.impl("svgd_bridge_backward", TORCH_BOX(&svgd_bridge_backward));
}

}  // namespace
}  // namespace ivfast
