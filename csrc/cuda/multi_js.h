// Rows of block-ordered logits: their log-sum-exp, their contribution to the loss, and its sum over a set.
//
// −Σ_c target_c log softmax(x)_c = lse − Σ_c target_c x_c,  target = keep onehot + share,  lse = shift + log Σ e^{x − shift}
#pragma once

#include "particles.h"
#include "reports.h"
#include "vectors.h"

namespace ivfast {

// Rows first, first + 1, … of C blocks of n rows
struct Rows {
  int64_t first, count, n;
  int classes;
  float keep, share;
  double uniform;  // 1/(C n): the weight of a row's cross-entropy without block weights
  Ticket signature;

  __device__ __forceinline__ int class_of(int64_t row) const { return static_cast<int>(quotient(first + row, n)); }

  __device__ __forceinline__ double weight(const float* weights, int c) const {
    return weights ? uniform * classes * weights[c] : uniform;
  }
};

__device__ __forceinline__ float finite(float most) { return fabsf(most) == INFINITY ? 0.f : most; }

// The largest logit, or 0 if it is infinite; Σ e^{x − shift}; Σ (x − own). NaN logits make `sum` NaN.
struct Row {
  float shift, sum, total;

  // Σ target (x − own) keeps what a large offset of all logits loses; a target without an own class leaves out 0·(−inf)
  __device__ __forceinline__ float loss(const Rows& rows, float own) const {
    float target = rows.keep > 0 ? rows.keep * (own - finite(own)) : 0.f;
    if (rows.share > 0) target += rows.share * total;
    return logf(sum) + (shift - finite(own) - target);
  }
  __device__ __forceinline__ float lse() const { return shift + logf(sum); }
  // softmax = e^{x − shift} per_sum; NaN where a logit is infinite
  __device__ __forceinline__ float per_sum() const { return sum < INFINITY ? 1 / sum : NAN; }
};

// The factor that makes a sum relative to `most` relative to `more`; an empty sum stays 0
__device__ __forceinline__ float rescale(float most, float more) {
  return most == -INFINITY ? 0.f : expf(finite(most) - finite(more));
}

// f over the Team neighbours that share a row: part of a warp, or the whole block through scratch
template <int Team, class F>
__device__ __forceinline__ float team_reduce(float value, [[maybe_unused]] float* scratch, F f) {
#pragma unroll
  for (int lane = (Team < 32 ? Team : 32) / 2; lane > 0; lane /= 2) value = f(value, __shfl_xor_sync(~0u, value, lane));
  if constexpr (Team > 32) {
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    value = scratch[0];
#pragma unroll
    for (int warp = 1; warp < Team / 32; ++warp) value = f(value, scratch[warp]);
  }
  return value;
}

// x [classes] in one pass; each thread of the team works relative to the largest logit that it has seen
template <int Team, class T>
__device__ __forceinline__ Row row_of(const T* x, int classes, float own, float* scratch) {
  constexpr int pack = kPack<T>, at_once = 16 / pack;
  const int lane = threadIdx.x % Team;
  float most = -INFINITY, sum = 0.f, total = 0.f;
  for (int first = lane * pack - past_boundary(x); first < classes; first += at_once * Team * pack) {
    float v[at_once][pack], here = most;
#pragma unroll
    for (int load = 0; load < at_once; ++load) load_pack(v[load], x, first + load * Team * pack, classes, -INFINITY);
#pragma unroll
    for (int i = 0; i < 16; ++i) here = fmaxf(here, v[i / pack][i % pack]);
    sum *= rescale(most, here);
    most = here;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int at = first + i / pack * Team * pack + i % pack;
      sum += expf(v[i / pack][i % pack] - finite(most));
      total += at >= 0 && at < classes ? v[i / pack][i % pack] - finite(own) : 0.f;
    }
  }
  const auto plus = [](float a, float b) { return a + b; };
  const float all = team_reduce<Team>(most, scratch, [](float a, float b) { return fmaxf(a, b); });
  sum = team_reduce<Team>(sum * rescale(most, all), scratch, plus);
  return {finite(all), sum, team_reduce<Team>(total, scratch, plus)};
}

// loss = Σ over all threads of the set's blocks
__device__ __forceinline__ void sum_over_blocks(double sum, float* loss, const Reports<1>& reports) {
  __shared__ double of_warps[32];
  __shared__ bool last;
  sum = block_sum(sum, of_warps);
  if (reports.blocks > 1) {
    if (threadIdx.x == 0) last = reports.send({sum});
    __syncthreads();
    if (!last) return;
    sum = reports.total(of_warps);
  }
  if (threadIdx.x == 0) *loss = static_cast<float>(sum);
}

}  // namespace ivfast
