// The SVGD bridge on the CPU: all iterates of all particle sets in one call, forward and backward.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>

#include "isa.h"
#include "median.h"
#include "operator.h"
#include "run.h"
#include "svgd.h"
#include "svgd_bridge.h"

namespace ivfast {
namespace {

// One particle set [n, d] among `sets`: its blocks for successive steps are `sets` blocks apart.
struct Trajectory {
  int64_t n, d, sets, length, iterations;
  double step_size, scale, noise;
  ScalarType dtype;
  Data draws, bridges, states, bandwidths, row_sums;  // one block per set and step; in backward `bridges` holds ∂L

  int64_t block(int64_t step, int64_t set) const { return step * sets + set; }
  BridgeStep step() const {
    BridgeStep s{};
    s.n = n, s.d = d, s.step_size = step_size, s.scale = scale, s.noise = noise;
    return s;
  }
};

// A thread's scratch memory: `count` matrices in the dtype of the arithmetic, then the workspace of the small sets.
struct Scratch {
  char* matrices;
  int64_t bytes;

  Scratch(Workspace& workspace, const Trajectory& t, int count, int64_t more) {
    bytes = (t.n * t.d * Data::element_size(arithmetic(t.dtype)) + 63) / 64 * 64;
    matrices = static_cast<char*>(workspace.reserve(count * bytes + more));
  }
  void* operator[](int i) const { return matrices + i * bytes; }
};

void forward(const Trajectory& t, int64_t set, bool threaded) {
  static thread_local Workspace workspace;
  const ScalarType wide = arithmetic(t.dtype);
  const bool small = t.n <= bridge_small;
  const BridgeStages stages = IVFAST_BY_ISA(bridge_stages, storage(t.dtype));
  const Heuristic paper{false, false, std::log(double(t.n))};
  const Scratch scratch(workspace, t, 2, small ? stages.bytes(t.n, t.d, false) : 0);
  for (int64_t step = 0; step < t.length; ++step) {
    BridgeStep s = t.step();
    s.x = t.states[t.block(step, set)], s.row_sum = t.row_sums[t.block(step, set)];
    s.phi = scratch[0], s.workspace = scratch[2];
    double h = small ? stages.direction(s) : 0;
    if (!small || !is_bandwidth(h) || stages.lost(s, h, false)) {
      h = t.scale * median_run({t.n, t.d, s.x, nullptr}, wide, paper, threaded).h;
      if (wide == ScalarType::Float) h = float(h);
      SvgdSet direction{};
      direction.n = t.n, direction.d = t.d, direction.h = h;
      direction.x = s.x, direction.phi = s.phi, direction.row_sum = s.row_sum;
      svgd_run(direction, wide, threaded);
    }
    set_value(t.bandwidths, t.block(step, set), h);
    s.draw = t.draws[t.block(step, set)];
    s.next = step + 1 < t.length ? t.states[t.block(step + 1, set)] : scratch[1];
    if ((step + 1) % t.iterations == 0) s.bridge = t.bridges[t.block((step + 1) / t.iterations, set)];
    stages.advance(s);
  }
  workspace.trim();
}

// Writes ∂L/∂x of the first step to `out`
void backward(const Trajectory& t, int64_t set, bool threaded, const Data& out) {
  static thread_local Workspace workspace;
  const bool small = t.n <= bridge_small;
  const BridgeStages stages = IVFAST_BY_ISA(bridge_stages, storage(t.dtype));
  const Scratch scratch(workspace, t, 3, small ? stages.bytes(t.n, t.d, true) : 0);
  BridgeStep s = t.step();
  s.grad = scratch[0], s.pushed = scratch[1], s.dx = scratch[2], s.workspace = scratch[3];
  std::fill_n(static_cast<char*>(s.grad), scratch.bytes, 0);
  for (int64_t step = t.length; step-- > 0;) {
    const bool kept = (step + 1) % t.iterations == 0;
    s.x = t.states[t.block(step, set)];
    s.bridge_grad = kept ? t.bridges[t.block((step + 1) / t.iterations, set)] : nullptr;
    stages.push(s);
    const double h = value(t.bandwidths, t.block(step, set));
    if (small) stages.pull(s, h);
    if (!small || !is_bandwidth(h) || stages.lost(s, h, true)) {
      SvgdSet direction{};
      direction.n = t.n, direction.d = t.d, direction.h = h;
      direction.x = s.x, direction.grad = s.pushed, direction.dx = s.dx;
      svgd_run(direction, arithmetic(t.dtype), threaded);
    }
    stages.collect(s);
  }
  s.bridge_grad = t.bridges[t.block(0, set)], s.bridge = out[set];
  stages.finish(s);
  workspace.trim();
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
  const Trajectory trajectory{n, shape.d, sets, length, iterations, step_size, scale, noise, dtype,
                              Data(draws, size, dtype), Data(bridges, size, dtype), Data(states, size, wide),
                              Data(bandwidths, 1, wide), Data(row_sums, n, wide)};
  const Data zs(z, size, dtype);
  std::memcpy(trajectory.bridges[0], zs[0], size_t(sets * zs.bytes));
  std::memcpy(trajectory.bridges[t * sets], trajectory.draws[length * sets], size_t(sets * zs.bytes));
  if (length > 0)
    each_set(sets, length * n * n * (5 * shape.d + 20), [&](int64_t set, bool threaded) {
      IVFAST_BY_ISA(bridge_stages, storage(dtype)).widen(zs[set], trajectory.states[set], size);
      forward(trajectory, set, threaded);
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
  const Trajectory trajectory{n, shape.d, sets, length, iterations, step_size, 1, 0, dtype, Data(),
                              Data(grad, size, dtype), Data(states, size, wide), Data(bandwidths, 1, wide), Data()};
  const Data out(dz, size, dtype);
  each_set(sets, length * n * n * (10 * shape.d + 20),
           [&](int64_t set, bool threaded) { backward(trajectory, set, threaded, out); });
  return dz;
}

STABLE_TORCH_LIBRARY_IMPL(ivfast, CPU, m) {
  m.impl("svgd_bridge", TORCH_BOX(&svgd_bridge));
  m.impl("svgd_bridge_backward", TORCH_BOX(&svgd_bridge_backward));
}

}  // namespace
}  // namespace ivfast
