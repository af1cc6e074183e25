// The gradient of the AS-Distance and its log-sums in one launch: a block owns two rows of r or g.
//
// With W_ij = ∂L/∂(log-sum) exp(log k_ij − log-sum), twice that within a batch, where each pair occurs twice:
// ∂L/∂u_i = −Σ_j W t and ∂L/∂log l_i = ½ l_i Σ_j W (t² − c/P), t = A/P. Over dz: A = δ, c = 1; under the prior
// A = δ + u_i l_j, c = 1 + l_j. In the additive form a dimension has the share exp(ℓ_d)/Σ exp(ℓ) of W.
#include "as_distance.h"

#include <optional>
#include <tuple>

namespace ivfast {

constexpr int kRows = 2;

struct AsBackwardPlan {
  int n, m, d;
  Panels panels;
  AsForm form;
};

template <class T>
struct AsGradients {
  T *mu_r, *logvar_r, *mu_g, *logvar_g;
};

// W, or W/Σ_d P^-½ 2^(least − …) with `least`, for a column and the two rows
struct alignas(16) PairWeights {
  float w[kRows], least[kRows];
};

// Adds W t and W (t² − c/P) of four dimensions.
template <bool IsAdditive, bool Prior>
__device__ __forceinline__ void add_gradients(
    float (&t_sums)[4], float (&l_sums)[4], const Gaussian& i, const Gaussian& j, float weight, float least) {
  const Fractions f = fractions<Prior>(i, j);
  float inverse[4], w[4];
  if constexpr (IsAdditive) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const float root = rsqrtf(f.P[c]);
      inverse[c] = root * root;
      w[c] = weight * root * exp2f(min(least - kHalfLog2e * (f.N[c] * root * root), 0.f));
    }
  } else {
#pragma unroll
    for (int c = 0; c < 4; c += 2) {
      const float both = reciprocal(f.P[c] * f.P[c + 1]);
      inverse[c] = both * f.P[c + 1], inverse[c + 1] = both * f.P[c];
      w[c] = w[c + 1] = weight;
    }
  }
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const float u_i = part(i.u, c), u_j = part(j.u, c), l_j = part(j.l, c);
    const float t = (Prior ? u_i - u_j + u_i * l_j : u_i - u_j) * inverse[c];
    t_sums[c] += w[c] * t;
    l_sums[c] += w[c] * (t * t - (Prior ? inverse[c] + l_j * inverse[c] : inverse[c]));
  }
}

template <bool IsAdditive, bool Prior, class T>
__global__ void __launch_bounds__(kMostColumns, 1) as_distance_backward_kernel(
    const T* __restrict__ mu_r, const T* __restrict__ logvar_r, const T* __restrict__ mu_g,
    const T* __restrict__ logvar_g, const double* __restrict__ sums, const float* __restrict__ dvalue,
    const double* __restrict__ dsums, AsGradients<T> gradients, AsBackwardPlan plan) {
  // this block: two rows of r against r and g, or of g against g and r
  const int64_t set = blockIdx.x, at_r = set * plan.n * plan.d, at_g = set * plan.m * plan.d;
  const int tile = blockIdx.y, r_tiles = (plan.n + kRows - 1) / kRows;
  const bool in_r = tile < r_tiles;
  mu_r += at_r, logvar_r += at_r, mu_g += at_g, logvar_g += at_g;
  T* const dmu = in_r ? gradients.mu_r + at_r : gradients.mu_g + at_g;
  T* const dlogvar = in_r ? gradients.logvar_r + at_r : gradients.logvar_g + at_g;
  Pool<2, T> pool;
  pool.ours[0] = in_r ? mu_r : mu_g, pool.theirs[0] = in_r ? mu_g : mu_r;
  pool.ours[1] = in_r ? logvar_r : logvar_g, pool.theirs[1] = in_r ? logvar_g : logvar_r;
  pool.own = in_r ? plan.n : plan.m, pool.columns = plan.n + plan.m, pool.d = plan.d;
  pool.whole = whole_quads(mu_r, plan.d) && whole_quads(logvar_r, plan.d) && whole_quads(mu_g, plan.d) &&
               whole_quads(logvar_g, plan.d);
  const int first_row = kRows * (in_r ? tile : tile - r_tiles);

  PairWeights* weights = reinterpret_cast<PairWeights*>(dynamic_shared);
  float* U = reinterpret_cast<float*>(weights + kMostColumns);
  float* L = U + plan.panels.floats;
  const int column = threadIdx.x, stride = plan.panels.stride, quads = plan.panels.quads;
  const bool is_own = column < pool.own;
  const int at_row[kRows] = {first_row * stride, min(first_row + 1, pool.own - 1) * stride};

  LogKernel<IsAdditive, Prior> kernels[kRows];
  int first = 0;
  for (;; first += 4 * quads) {
    fill_panels(U, plan.panels, pool, first, Variances());
    __syncthreads();
    if (column < pool.columns) {
      const int end = min(4 * quads, plan.d - first);
      const auto add = [&](int k, auto some) {
        const Gaussian j(U + column * stride + k, L + column * stride + k);
#pragma unroll
        for (int p = 0; p < kRows; ++p) {
          kernels[p].template add<some>(Gaussian(U + at_row[p] + k, L + at_row[p] + k), j, end - k);
        }
      };
      int k = 0;
#pragma unroll 2
      for (; k + 4 <= end; k += 4) add(k, std::false_type{});
      if (k < end) add(k, std::true_type{});
    }
    if (first + 4 * quads >= plan.d) break;
    __syncthreads();
  }

  if (column < pool.columns) {
    const int of = is_own ? (in_r ? 0 : 1) : 2;
    const double log_sum = sums[3 * set + of], exact = log_sum + plan.form.constant;
    const float shift = static_cast<float>(exact);
    double factor = dsums ? dsums[3 * set + of] : 0.0;
    if (dvalue) {
      const double* log_pairs = plan.form.log_pairs;  // a kernel parameter, which only takes constant indices
      const double pairs = of == 0 ? log_pairs[0] : of == 1 ? log_pairs[1] : log_pairs[2];
      factor += (of == 2 ? -2 : 1) * (plan.form.log ? 1.0 : exp(log_sum - pairs)) * dvalue[set];
    }
    // what `shift` rounds off is in the factor: shares add up to 1
    const float weight = static_cast<float>((is_own ? 2 : 1) * factor * exp(shift - exact));
    PairWeights mine;
#pragma unroll
    for (int p = 0; p < kRows; ++p) {
      const bool left_out = is_own && plan.form.unbiased && first_row + p == column;
      mine.w[p] = left_out ? 0.f : weight * expf(kernels[p].log() - shift);
      mine.least[p] = 0.f;
      if constexpr (IsAdditive) mine.w[p] /= kernels[p].sum, mine.least[p] = kernels[p].least;
    }
    weights[column] = mine;
  }

  const Slices slices(quads);
  const int at = 4 * slices.quad;
  for (bool there = true; first >= 0; first -= 4 * quads, there = false) {  // the last panel is there
    if (!there) fill_panels(U, plan.panels, pool, first, Variances());
    __syncthreads();
    float totals[2 * kRows][4] = {};
    if (slices.quad < quads) {
#pragma unroll 1
      for (int j = slices.slice; j < pool.columns; j += slices.count) {
        const Gaussian other(U + j * stride + at, L + j * stride + at);
        const float4 weight = *reinterpret_cast<const float4*>(weights + j);
#pragma unroll
        for (int p = 0; p < kRows; ++p) {
          add_gradients<IsAdditive, Prior>(
              totals[p], totals[kRows + p], Gaussian(U + at_row[p] + at, L + at_row[p] + at), other, part(weight, p),
              part(weight, kRows + p));
        }
      }
      // ∂L/∂u_i = −Σ W t,  ∂L/∂log l_i = ½ l_i Σ W (t² − c/P)
#pragma unroll
      for (int p = 0; p < kRows; ++p) {
        const float4 l = vec4(L + at_row[p] + at);
#pragma unroll
        for (int c = 0; c < 4; ++c) totals[p][c] *= -1.f, totals[kRows + p][c] *= 0.5f * part(l, c);
      }
    }
    __syncthreads();
    sum_slices(U, totals, slices, [&](int row, int c, float total) {
      const int out = first_row + row % kRows;
      if (out >= pool.own || c >= 4 * quads || first + c >= plan.d) return;
      (row < kRows ? dmu : dlogvar)[out * plan.d + first + c] = static_cast<T>(total);
    });
    __syncthreads();
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> as_distance_backward(
    Tensor mu_r, Tensor logvar_r, Tensor mu_g, Tensor logvar_g, Tensor sums, std::optional<Tensor> dvalue,
    std::optional<Tensor> dsums, bool additive, bool prior, bool log, bool unbiased) {
  const TwoSamples sets("as_distance_backward", "mu_r", mu_r, "mu_g", mu_g);
  mu_r = as_contiguous(mu_r), logvar_r = as_contiguous(logvar_r);
  mu_g = as_contiguous(mu_g), logvar_g = as_contiguous(logvar_g);
  sums = as_contiguous(sums);
  if (dvalue) dvalue = as_contiguous(*dvalue);
  if (dsums) dsums = as_contiguous(*dsums);
  const ScalarType dtype = mu_r.scalar_type();
  Tensor dmu_r = empty(mu_r, sets.x.full, dtype), dlogvar_r = empty(mu_r, sets.x.full, dtype);
  Tensor dmu_g = empty(mu_r, sets.y.full, dtype), dlogvar_g = empty(mu_r, sets.y.full, dtype);

  const int n = sets.x.n, m = sets.y.n, d = sets.x.d, threads = std::max(128, round_up(n + m, 32));
  const size_t fixed = kMostColumns * sizeof(PairWeights);
  const AsBackwardPlan plan{
      n, m, d, Panels(n + m, d, 2, shared_limit(mu_r) - fixed), AsForm(n, m, d, additive, prior, log, unbiased)};
  const int floats = std::max(2 * plan.panels.floats, 8 * kRows * threads);
  const int tiles = (n + kRows - 1) / kRows + (m + kRows - 1) / kRows;
  by_dtype("as_distance_backward", mu_r, [&](auto zero) {
    using T = decltype(zero);
    if (sets.x.count == 0) return;
    const AsGradients<T> gradients{
        dmu_r.mutable_data_ptr<T>(), dlogvar_r.mutable_data_ptr<T>(), dmu_g.mutable_data_ptr<T>(),
        dlogvar_g.mutable_data_ptr<T>()};
    by_form(additive, prior, [&](auto is_additive, auto has_prior) {
      launch(
          mu_r, as_distance_backward_kernel<is_additive, has_prior, T>, dim3(sets.x.count, tiles), threads,
          fixed + sizeof(float) * floats, mu_r.const_data_ptr<T>(), logvar_r.const_data_ptr<T>(),
          mu_g.const_data_ptr<T>(), logvar_g.const_data_ptr<T>(), sums.const_data_ptr<double>(),
          dvalue ? dvalue->const_data_ptr<float>() : nullptr, dsums ? dsums->const_data_ptr<double>() : nullptr,
          gradients, plan);
    });
  });
  return {dmu_r, dlogvar_r, dmu_g, dlogvar_g};
}

STABLE_TORCH_LIBRARY_IMPL(ivfast, IVFAST_CUDA_KEY, m) {
  m.impl("as_distance_backward.cuda", TORCH_BOX(&as_distance_backward));
}

}  // namespace ivfast
