// The blockwise and radial bridges and the block substitution on the CPU: the operators.
#include "bridge.h"

#include <cmath>
#include <cstring>

#include "isa.h"
#include "rows.h"

namespace ivfast {
namespace {

// cos and sin of kπ/2t, exact at both ends
struct Angles {
  std::vector<double> cos, sin;
  explicit Angles(int64_t t) : cos(t + 1), sin(t + 1) {
    for (int64_t k = 0; k <= t; ++k) cos[k] = std::cos(k * M_PI / double(2 * t)), sin[k] = std::sin(k * M_PI / double(2 * t));
    cos[t] = 0, sin[t] = 1;
  }
};

constexpr int64_t flop_per_move = 4;  // approximate cost of moving an element

Tensor forward(const Tensor& z_, const Tensor& draws_, int64_t t, bool radial) {
  const Rows rows(z_);
  const ScalarType dtype = z_.scalar_type();
  STD_TORCH_CHECK(t >= 1 && (radial || rows.d % t == 0),
                  "t must divide the dimension d = ", rows.d, " of z, got t = ", t);
  const Tensor z = as_contiguous(z_), draws = as_contiguous(draws_);
  STD_TORCH_CHECK(draws.numel() == z.numel() && draws.scalar_type() == dtype, "draws must match z");
  std::vector<int64_t> sizes{t + 1};
  sizes.insert(sizes.end(), rows.full.begin(), rows.full.end());
  Tensor out = empty_large(z, sizes, dtype);
  const SubstitutionStages stages = IVFAST_BY_ISA(substitution_stages, storage(dtype));
  const Angles angles(radial ? t : 0);
  SubstitutionRows all{rows.d, t, 0, 0, rows.count * rows.d, angles.cos.data(), angles.sin.data()};
  all.z = z.data_ptr(), all.draws = draws.data_ptr(), all.out = out.data_ptr();
  each_range(rows.count, rows.d * (t + 1) * flop_per_move, [&](int64_t first, int64_t last) {
    SubstitutionRows part = all;
    part.first = first, part.last = last;
    radial ? stages.radial(part) : stages.blockwise(part);
  });
  return out;
}

Tensor backward(const Tensor& grad_, int64_t t, bool radial) {
  const Tensor grad = as_contiguous(grad_);
  const auto sizes = grad.sizes();
  const std::vector<int64_t> full(sizes.begin() + 1, sizes.end());
  const ScalarType dtype = grad.scalar_type();
  STD_TORCH_CHECK(t >= 1 && sizes[0] == t + 1, "grad must hold t+1 = ", t + 1, " gradients, got ", sizes[0]);
  Tensor dz = empty_large(grad, full, dtype);
  const Rows rows(dz);
  const SubstitutionStages stages = IVFAST_BY_ISA(substitution_stages, storage(dtype));
  const Angles angles(radial ? t : 0);
  SubstitutionRows all{rows.d, t, 0, 0, rows.count * rows.d, angles.cos.data(), angles.sin.data()};
  all.grad = grad.data_ptr(), all.dz = dz.data_ptr();
  each_range(rows.count, rows.d * (t + 1) * flop_per_move, [&](int64_t first, int64_t last) {
    SubstitutionRows part = all;
    part.first = first, part.last = last;
    radial ? stages.radial_backward(part) : stages.blockwise_backward(part);
  });
  return dz;
}

// Copies of rows in which block index[row] comes from `block` (null: zeros); an index outside [0, k) leaves its row
// unchanged.
Tensor substituted(const Tensor& x_, const Tensor* block_, const Tensor& index_, int64_t k) {
  const Rows rows(x_);
  const ScalarType dtype = x_.scalar_type();
  STD_TORCH_CHECK(k >= 1 && rows.d % k == 0, "k must divide the dimension d = ", rows.d, " of z, got k = ", k);
  const Tensor x = as_contiguous(x_), block = block_ ? as_contiguous(*block_) : x, index = as_contiguous(index_);
  const bool wide = index.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(int64_t(index.numel()) == rows.count && (wide || index.scalar_type() == ScalarType::Int),
                  "index must hold one int64 or int32 per row");
  Tensor out = empty_large(x, rows.full, dtype);
  const int64_t size = rows.d * Data::element_size(dtype), width = size / k;
  const char* const from = static_cast<const char*>(x.data_ptr());
  const char* const draws = block_ ? static_cast<const char*>(block.data_ptr()) : nullptr;
  const void* const indices = index.data_ptr();
  char* const to = static_cast<char*>(out.data_ptr());
  each_range(rows.count, rows.d * flop_per_move, [&](int64_t first, int64_t last) {
    std::memcpy(to + first * size, from + first * size, (last - first) * size);
    for (int64_t row = first; row < last; ++row) {
      const int64_t chosen = wide ? static_cast<const int64_t*>(indices)[row] : static_cast<const int32_t*>(indices)[row];
      if (chosen < 0 || chosen >= k) continue;
      const int64_t at = row * size + chosen * width;
      draws ? std::memcpy(to + at, draws + at, width) : std::memset(to + at, 0, width);
    }
  });
  return out;
}

Tensor blockwise_bridge(const Tensor& z, const Tensor& draws, int64_t t) { return forward(z, draws, t, false); }
Tensor radial_bridge(const Tensor& z, const Tensor& draws, int64_t t) { return forward(z, draws, t, true); }
Tensor blockwise_bridge_backward(const Tensor& grad, int64_t t) { return backward(grad, t, false); }
Tensor radial_bridge_backward(const Tensor& grad, int64_t t) { return backward(grad, t, true); }
Tensor block_substitute(const Tensor& z, const Tensor& draws, const Tensor& index, int64_t k) {
  STD_TORCH_CHECK(draws.numel() == z.numel() && draws.scalar_type() == z.scalar_type(), "draws must match z");
  return substituted(z, &draws, index, k);
}
Tensor block_substitute_backward(const Tensor& grad, const Tensor& index, int64_t k) {
  return substituted(grad, nullptr, index, k);
}

STABLE_TORCH_LIBRARY_IMPL(ivfast, CPU, m) {
  m.impl("blockwise_bridge", TORCH_BOX(&blockwise_bridge));
  m.impl("blockwise_bridge_backward", TORCH_BOX(&blockwise_bridge_backward));
  m.impl("radial_bridge", TORCH_BOX(&radial_bridge));
  m.impl("radial_bridge_backward", TORCH_BOX(&radial_bridge_backward));
  m.impl("block_substitute", TORCH_BOX(&block_substitute));
  m.impl("block_substitute_backward", TORCH_BOX(&block_substitute_backward));
}

}  // namespace
}  // namespace ivfast
