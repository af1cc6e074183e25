// Exact order statistics of non-negative floats that the threads of a block hold in registers.
//
// The bits of such floats sort like the floats. A histogram of 1024 buckets from the smallest to the largest value
// finds the bucket of the requested rank. A bucket of more than 32 values is the range of the next histogram: at most
// four histograms for 31 bits, one for the distances of a small particle set. A warp ranks the remaining values.
#pragma once

#include "particles.h"

namespace ivfast {

constexpr unsigned kNone = 0xFFFFFFFFu;  // no value: above the bits of every float from 0 to infinity
constexpr unsigned kInfinity = 0x7F800000u;
constexpr int kWarps = kThreads / 32, kBuckets = 4 * kThreads;
constexpr unsigned kFew = 32;

// Shared memory; call clear() and a barrier before the first use.
struct alignas(16) Selection {
  unsigned histogram[kBuckets + 4];  // one more for values outside, which is never read
  unsigned few[kFew];
  unsigned low[kWarps];
  int high[kWarps];
  unsigned sums[kWarps];
  unsigned bucket, before, count, listed;

  __device__ void clear() {
    for (int at = threadIdx.x; at < kBuckets; at += kThreads) histogram[at] = 0;
  }
};

// The value of the lane whose place is `wanted`
__device__ __forceinline__ unsigned at_place(unsigned value, unsigned place, unsigned wanted) {
  return __shfl_sync(~0u, value, __ffs(static_cast<int>(__ballot_sync(~0u, place == wanted))) - 1);
}

// The values of ranks `first` and `second`, which is `first` or the next, among those that are not kNone; NaN if one of
// them is.
template <int Count>
__device__ __forceinline__ float2 select(
    const unsigned (&values)[Count], unsigned first, unsigned second, Selection& s) {
  static_assert(Count % 16 == 0);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;

  unsigned low = kNone;
  int high = -1;  // the bits of kNone
#pragma unroll
  for (int at = 0; at < Count; ++at) low = min(low, values[at]), high = max(high, static_cast<int>(values[at]));
  low = __reduce_min_sync(~0u, low), high = __reduce_max_sync(~0u, high);
  if (lane == 0) s.low[warp] = low, s.high[warp] = high;
  if (thread == 0) s.listed = 0;
  __syncthreads();
  low = __reduce_min_sync(~0u, lane < kWarps ? s.low[lane] : kNone);
  unsigned top = __reduce_max_sync(~0u, lane < kWarps ? s.high[lane] : -1);
  if (top > kInfinity) return make_float2(__uint_as_float(top), __uint_as_float(top));

  int shift;
  unsigned count;
  do {
    shift = max(0, 22 - __clz(static_cast<int>(top - low)));  // 1024 buckets of 2^shift cover low..top
#pragma unroll
    for (int at = 0; at < Count; ++at) {
      const unsigned bucket = (values[at] - low) >> shift;  // values below wrap around, and kNone is far above
      atomicAdd(s.histogram + min(bucket, static_cast<unsigned>(kBuckets)), 1u);
    }
    __syncthreads();
    uint4* const four_at = reinterpret_cast<uint4*>(s.histogram) + thread;
    const uint4 four = *four_at;
    *four_at = uint4{};
    const unsigned sizes[4] = {four.x, four.y, four.z, four.w}, own = four.x + four.y + four.z + four.w;
    unsigned through = own;  // how many are in this thread's buckets and below; at first within the warp
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const unsigned other = __shfl_up_sync(~0u, through, step);
      through += lane >= step ? other : 0;
    }
    if (lane == 31) s.sums[warp] = through;
    __syncthreads();
#pragma unroll
    for (int other = 0; other < kWarps; ++other) through += other < warp ? s.sums[other] : 0;
    unsigned before = through - own;
    if (before <= first && first < through) {
      int bucket = 0;
#pragma unroll
      for (int at = 0; at < 3; ++at) {
        if (bucket == at && first >= before + sizes[at]) before += sizes[at], ++bucket;
      }
      s.bucket = 4 * thread + bucket, s.before = before;
      s.count = bucket == 0 ? four.x : bucket == 1 ? four.y : bucket == 2 ? four.z : four.w;
    }
    __syncthreads();
    low += s.bucket << shift, top = low + (1u << shift) - 1;
    first -= s.before, second -= s.before, count = s.count;
  } while (shift > 0 && count > kFew);

  unsigned lower = low, upper = low;  // there may be any number of equal values
  if (shift > 0) {
#pragma unroll
    for (int first_at = 0; first_at < Count; first_at += 16) {
      unsigned inside = 0;
#pragma unroll
      for (int at = 0; at < 16; ++at) inside |= (values[first_at + at] - low <= top - low) << at;
      if (inside == 0) continue;
      unsigned to = atomicAdd(&s.listed, static_cast<unsigned>(__popc(inside)));
#pragma unroll
      for (int at = 0; at < 16; ++at) {
        if (inside >> at & 1) s.few[to++] = values[first_at + at];
      }
    }
    __syncthreads();
    const unsigned mine = static_cast<unsigned>(lane) < count ? s.few[lane] : kNone;
    unsigned place = static_cast<unsigned>(lane) < count ? 0 : kNone - kFew;
    for (unsigned other = 0; other < count; ++other) {
      const unsigned value = s.few[other];
      place += value < mine || (value == mine && other < static_cast<unsigned>(lane));
    }
    lower = at_place(mine, place, first);
    upper = at_place(mine, place, min(second, count - 1));
  }
  if (second >= count) {  // the smallest value above
    unsigned next = kNone;
#pragma unroll
    for (int at = 0; at < Count; ++at) next = min(next, values[at] > top ? values[at] : kNone);
    next = __reduce_min_sync(~0u, next);
    if (lane == 0) s.low[warp] = next;
    __syncthreads();
    upper = __reduce_min_sync(~0u, lane < kWarps ? s.low[lane] : kNone);
  }
  return make_float2(__uint_as_float(lower), __uint_as_float(upper));
}

}  // namespace ivfast
