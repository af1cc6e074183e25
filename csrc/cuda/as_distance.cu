// AS-Distance and its log-sums for small batches in one launch: a block owns 16 by 16 pairs.
//
// Blocks cover the tiles of (r, r') and (g, g') on and above the diagonal, where a pair counts twice, and all tiles of
// (r, g). A block reports max log k and Σ exp(log k − max) over its pairs.
#include "as_distance.h"

#include <tuple>

namespace ivfast {

constexpr int kSide = 16;  // rows and columns of a tile
constexpr int kMostTiles = (kMostParticles / kSide) * (kMostParticles / kSide);  // of one kind

struct AsPlan {
  int n, m, d;
  Panels panels;
  AsForm form;
  Ticket signature;
};

__host__ __device__ constexpr int sides_of(int n) { return (n + kSide - 1) / kSide; }
__host__ __device__ constexpr int triangle(int tiles) { return tiles * (tiles + 1) / 2; }

// Σ exp(log k − from) rebased from `from` to `to`
__device__ __forceinline__ float moved(float sum, float from, float to) { return from == to ? sum : sum * expf(from - to); }

// (max, Σ) over the lanes of a warp
__device__ __forceinline__ void log_sum_lanes(float& most, float& sum) {
  float top = most;
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) top = max(top, __shfl_xor_sync(~0u, top, lane));
  sum = warp_sum(moved(sum, most, top));
  most = top;
}

template <bool IsAdditive, bool Prior, class T>
__global__ void __launch_bounds__(kThreads, 1) as_distance_kernel(
    const T* __restrict__ mu_r, const T* __restrict__ logvar_r, const T* __restrict__ mu_g,
    const T* __restrict__ logvar_g, float* __restrict__ value, double* __restrict__ sums, double* reports,
    AsPlan plan) {
  // this block: a tile of (r, r'), (g, g') or (r, g)
  const int64_t set = blockIdx.x;
  const Reports<2> blocks(reports, set, plan.signature);
  const int64_t at_r = set * plan.n * plan.d, at_g = set * plan.m * plan.d;
  const int tiles_r = sides_of(plan.n), tiles_g = sides_of(plan.m);
  const int end_r = triangle(tiles_r), end_g = end_r + triangle(tiles_g);  // of the blocks of each kind; the third follow
  const int block = blockIdx.y, kind = (block >= end_r) + (block >= end_g);
  int tile_i = block - (kind == 0 ? 0 : kind == 1 ? end_r : end_g), tile_j = 0;
  if (kind == 2) {
    tile_j = tile_i % tiles_g, tile_i /= tiles_g;
  } else {
    while (triangle(tile_j + 1) <= tile_i) ++tile_j;
    tile_i -= triangle(tile_j);
  }
  const bool r_rows = kind != 1, r_columns = kind == 0;
  const int rows = min(kSide, (r_rows ? plan.n : plan.m) - kSide * tile_i);
  const int columns = min(kSide, (r_columns ? plan.n : plan.m) - kSide * tile_j);
  const int first_i = kSide * tile_i * plan.d, first_j = kSide * tile_j * plan.d;
  Pool<2, T> pool;
  pool.ours[0] = (r_rows ? mu_r + at_r : mu_g + at_g) + first_i;
  pool.ours[1] = (r_rows ? logvar_r + at_r : logvar_g + at_g) + first_i;
  pool.theirs[0] = (r_columns ? mu_r + at_r : mu_g + at_g) + first_j;
  pool.theirs[1] = (r_columns ? logvar_r + at_r : logvar_g + at_g) + first_j;
  pool.own = rows, pool.columns = rows + columns, pool.d = plan.d;
  pool.whole = whole_quads(pool.ours[0], plan.d) && whole_quads(pool.ours[1], plan.d) &&
               whole_quads(pool.theirs[0], plan.d) && whole_quads(pool.theirs[1], plan.d);

  __shared__ float warp_most[kThreads / 32], warp_sums[kThreads / 32];
  __shared__ double terms[3];
  __shared__ bool last;
  float* U = reinterpret_cast<float*>(dynamic_shared);
  float* L = U + plan.panels.floats;
  fill_panels(U, plan.panels, pool, 0, Variances());
  __syncthreads();

  // four lanes share two by two pairs; each takes every fourth group of four dimensions
  const int lane = threadIdx.x % 4, i = threadIdx.x / 32 * 2, j = threadIdx.x / 4 % 8;
  int at_i[2], at_j[2];
#pragma unroll
  for (int p = 0; p < 2; ++p) {
    at_i[p] = min(i + p, rows - 1) * plan.panels.stride;
    at_j[p] = (rows + min(j + 8 * p, columns - 1)) * plan.panels.stride;
  }
  LogKernel<IsAdditive, Prior> kernels[4];
  const auto add = [&](int k, auto some) {
    const Gaussian rows_i[2] = {{U + at_i[0] + k, L + at_i[0] + k}, {U + at_i[1] + k, L + at_i[1] + k}};
    const Gaussian rows_j[2] = {{U + at_j[0] + k, L + at_j[0] + k}, {U + at_j[1] + k, L + at_j[1] + k}};
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      kernels[pair].template add<some>(rows_i[pair / 2], rows_j[pair % 2], plan.d - k);
    }
  };
  int k = 4 * lane;
  for (; k + 4 <= plan.d; k += 16) add(k, std::false_type{});
  if (k < plan.d) add(k, std::true_type{});

  // lane p of the four has pair p
  float most = -INFINITY;
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
    kernels[pair].add_lane(1);
    kernels[pair].add_lane(2);
    if (pair == lane) most = kernels[pair].log();
  }
  const int row = i + lane / 2, column = j + 8 * (lane % 2);
  const bool diagonal = kind != 2 && tile_i == tile_j;
  const bool exists = row < rows && column < columns && !(plan.form.unbiased && diagonal && row == column);
  float sum = exists ? (kind == 2 || diagonal ? 1.f : 2.f) : 0.f;
  if (exists && most != most) sum = most;  // a maximum ignores NaN
  most = exists ? most : -INFINITY;
  log_sum_lanes(most, sum);
  if (threadIdx.x % 32 == 0) warp_most[threadIdx.x / 32] = most, warp_sums[threadIdx.x / 32] = sum;
  __syncthreads();
  const int of = threadIdx.x / 32, at = threadIdx.x % 32;
  if (of == 0) {
    const bool is_warp = at < kThreads / 32;
    most = is_warp ? warp_most[at] : -INFINITY, sum = is_warp ? warp_sums[at] : 0.f;
    log_sum_lanes(most, sum);
    if (at == 0) last = blocks.send({most, sum});
  }
  __syncthreads();
  if (!last) return;

  // the log-sums of all blocks, a warp for each of the three, and D
  if (of < 3) {
    const int begin = of == 0 ? 0 : of == 1 ? end_r : end_g, end = of == 0 ? end_r : of == 1 ? end_g : blocks.blocks;
    float each_most[kMostTiles / 32], each_sum[kMostTiles / 32];
#pragma unroll
    for (int i = 0; i < kMostTiles / 32; ++i) {
      const int from = begin + at + 32 * i;
      each_most[i] = from < end ? static_cast<float>(blocks.at(from, 0)) : -INFINITY;
      each_sum[i] = from < end ? static_cast<float>(blocks.at(from, 1)) : 0.f;
    }
    most = -INFINITY, sum = 0.f;
#pragma unroll
    for (int i = 0; i < kMostTiles / 32; ++i) most = max(most, each_most[i]);
#pragma unroll
    for (int i = 0; i < kMostTiles / 32; ++i) sum += moved(each_sum[i], each_most[i], most);
    log_sum_lanes(most, sum);
    if (at == 0) {
      const AsForm& form = plan.form;  // a kernel parameter, which only takes constant indices
      const double log_sum = most + log(static_cast<double>(sum)) - form.constant;
      const double log_mean = log_sum - (of == 0 ? form.log_pairs[0] : of == 1 ? form.log_pairs[1] : form.log_pairs[2]);
      terms[of] = (of == 2 ? -2 : 1) * (form.log ? log_mean : exp(log_mean));
      sums[3 * set + of] = log_sum;
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) value[set] = static_cast<float>(terms[0] + terms[1] + terms[2]);
}

std::tuple<Tensor, Tensor> as_distance(
    Tensor mu_r, Tensor logvar_r, Tensor mu_g, Tensor logvar_g, bool additive, bool prior, bool log, bool unbiased) {
  const TwoSamples sets("as_distance", "mu_r", mu_r, "mu_g", mu_g);
  mu_r = as_contiguous(mu_r), logvar_r = as_contiguous(logvar_r);
  mu_g = as_contiguous(mu_g), logvar_g = as_contiguous(logvar_g);
  Tensor value = empty(mu_r, sets.x.batch, ScalarType::Float);
  std::vector<int64_t> three = sets.x.batch;
  three.push_back(3);
  Tensor sums = empty(mu_r, three, ScalarType::Double);

  const int n = sets.x.n, m = sets.y.n, d = sets.x.d;
  AsPlan plan{n, m, d, Panels(2 * kSide, d), AsForm(n, m, d, additive, prior, log, unbiased), new_signature()};
  const int blocks = triangle(sides_of(n)) + triangle(sides_of(m)) + sides_of(n) * sides_of(m);
  Tensor reports = new_reports<2>(mu_r, sets.x.count, blocks);
  by_dtype("as_distance", mu_r, [&](auto zero) {
    using T = decltype(zero);
    if (sets.x.count == 0) return;
    by_form(additive, prior, [&](auto is_additive, auto has_prior) {
      launch(
          mu_r, as_distance_kernel<is_additive, has_prior, T>, dim3(sets.x.count, blocks), kThreads,
          2 * sizeof(float) * plan.panels.floats, mu_r.const_data_ptr<T>(), logvar_r.const_data_ptr<T>(),
          mu_g.const_data_ptr<T>(), logvar_g.const_data_ptr<T>(), value.mutable_data_ptr<float>(),
          sums.mutable_data_ptr<double>(), reports.mutable_data_ptr<double>(), plan);
    });
  });
  return {value, sums};
}

STABLE_TORCH_LIBRARY_IMPL(ivfast, IVFAST_CUDA_KEY, m) { m.impl("as_distance.cuda", TORCH_BOX(&as_distance)); }

}  // namespace ivfast
