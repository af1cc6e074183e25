// Sums over the blocks of a set, computed by the last block to report, in an order that does not depend on which.
//
// A ticket counts the reports, in memory that need not be cleared first: a signature, new at every launch, marks the
// ticket as opened by a block of this launch. The last block closes it, for a graph that repeats the launch.
#pragma once

#include <atomic>
#include <random>

#include "launch.h"

namespace ivfast {

// The sum over the lanes of a warp
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) value += __shfl_xor_sync(~0u, value, lane);
  return value;
}

// The sum over the threads of a block, in every thread; `of_warps` has room for each warp. Nobody may be using it.
__device__ __forceinline__ double block_sum(double value, double* of_warps) {
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = value;
  __syncthreads();
  return warp_sum(threadIdx.x % 32 < blockDim.x / 32 ? of_warps[threadIdx.x % 32] : 0.);
}

using Ticket = unsigned long long;
constexpr Ticket kReported = 0xFFFF;  // the bits that count; the others are the signature

__device__ __forceinline__ Ticket look_at(const Ticket* ticket) {
#ifdef IVFAST_SIMT
  return *ticket;
#else
  Ticket seen;
  asm volatile("ld.relaxed.gpu.u64 %0, [%1];" : "=l"(seen) : "l"(ticket) : "memory");
  return seen;
#endif
}

// Adds 1. What this thread wrote before is seen by whoever draws a later number, and by the threads that meet it then.
__device__ __forceinline__ Ticket draw_from(Ticket* ticket) {
#ifdef IVFAST_SIMT
  return (*ticket)++;
#else
  Ticket drawn;
  asm volatile("atom.acq_rel.gpu.add.u64 %0, [%1], 1;" : "=l"(drawn) : "l"(ticket) : "memory");
  return drawn;
#endif
}

// The reports of the blocks of one set, a row of the grid: `Width` numbers each, after a ticket that takes as much room.
template <int Width>
struct Reports {
  Ticket* ticket;
  double* values;
  Ticket signature;
  int blocks;

  // At the start of a kernel, so that nothing waits for it. Without memory, there is one block.
  __device__ Reports(double* memory, int64_t set, Ticket signature)
      : ticket(nullptr), values(nullptr), signature(signature), blocks(static_cast<int>(gridDim.y)) {
    if (!memory) return;
    values = memory + set * Width * (blocks + 1) + Width;
    ticket = reinterpret_cast<Ticket*>(values - Width);
    if (threadIdx.x > 0) return;
    const Ticket seen = look_at(ticket);
    if ((seen & ~kReported) != signature) atomicCAS(ticket, seen, signature);  // or another block has opened it since
  }

  // By thread 0: whether this block is the last. After a barrier, all its threads see the reports of all blocks.
  __device__ __forceinline__ bool send(const double (&report)[Width]) const {
#pragma unroll
    for (int at = 0; at < Width; ++at) values[Width * static_cast<int>(blockIdx.y) + at] = report[at];
    const bool last = (draw_from(ticket) & kReported) == static_cast<Ticket>(blocks - 1);
    if (last) *ticket = 0;
    return last;
  }
  __device__ __forceinline__ double at(int block, int number) const { return __ldcg(values + Width * block + number); }

  // The sum of the first numbers, in every thread
  __device__ __forceinline__ double total(double* of_warps) const {
    double sum = 0;
#pragma unroll 4
    for (int block = threadIdx.x; block < blocks; block += blockDim.x) sum += at(block, 0);
    return block_sum(sum, of_warps);
  }
};

// Never repeated, and not a value that other data contain
inline Ticket new_signature() {
  static const Ticket seed = [] {
    std::random_device random;
    return static_cast<Ticket>(random()) << 32 | random();
  }();
  static std::atomic<Ticket> launches{0};
  Ticket z = 0;
  while ((z & ~kReported) == 0) {
    z = seed + 0x9E3779B97F4A7C15ull * ++launches;  // splitmix64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    z ^= z >> 31;
  }
  return z & ~kReported;
}

template <int Width>
Tensor new_reports(const Tensor& like, int64_t sets, int64_t blocks) {
  return empty(like, {sets, blocks + 1, Width}, ScalarType::Double);
}

}  // namespace ivfast
