// Many rows of up to 8 logits. A warp moves a tile of rows by 16-byte accesses to neighbouring addresses, and each of its
// threads computes several whole rows in registers; between the two, the packs change hands in shared memory.
#pragma once

#include <numeric>

#include "multi_js.h"

namespace ivfast {

constexpr int kMostFew = 8;

// The rows of a thread are whole packs, at least three: three packs are in flight, and an odd number of them puts the
// threads of a warp on different banks.
template <int C, class T>
struct Few {
  static constexpr int kWhole = std::lcm(C, kPack<T>) / C, kPacksOfWhole = std::lcm(C, kPack<T>) / kPack<T>;
  static constexpr int kRows = kPacksOfWhole < 3 ? 3 * kWhole : kWhole, kPacks = kRows * C / kPack<T>;
  static constexpr int kTile = 32 * kRows;  // rows of a warp
  static constexpr int kBlocks = kRows * C > 48 ? 1 : 2;  // at least, on an SM: what its registers must leave room for
};

// Each warp: tiles of its rows. x and gradient are as in staged_kernel, and start on 16-byte boundaries in every set.
template <int C, class T>
__global__ void __launch_bounds__(kThreads, Few<C, T>::kBlocks) few_kernel(
    const T* x, T* gradient, const float* __restrict__ grad, const float* __restrict__ weights, float* __restrict__ lse,
    float* __restrict__ loss, double* reports, Rows rows) {
  using Size = Few<C, T>;
  constexpr int pack = kPack<T>, packs = Size::kPacks;
  __shared__ Pack<T> staged[kThreads / 32][32 * packs];
  const int64_t set = blockIdx.x;
  const Reports<1> blocks(reports, set, rows.signature);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  x += set * rows.count * C, gradient += gradient ? set * rows.count * C : 0, lse += lse ? set * rows.count : 0;
  const float scale = grad ? grad[set] : 1.f;
  Pack<T>* const own_packs = staged[warp] + lane * packs;
  double sum = 0;

  const int64_t step = int64_t{gridDim.y} * warps * Size::kTile;
  for (int64_t start = (int64_t{blockIdx.y} * warps + warp) * Size::kTile; start < rows.count; start += step) {
    const int elements = C * static_cast<int>(min(int64_t{Size::kTile}, rows.count - start));
    Pack<T> mine[packs] = {};
#pragma unroll
    for (int k = 0; k < packs; ++k) {
      const int at = (lane + 32 * k) * pack;
      const T* const from = x + start * C + at;
      if (at + pack <= elements) {
        mine[k] = Pack<T>::from(from);
      } else {
#pragma unroll
        for (int i = 0; i < pack; ++i) mine[k].v[i] = at + i < elements ? from[i] : static_cast<T>(0.f);
      }
    }
    __syncwarp();  // the last tile is read
#pragma unroll
    for (int k = 0; k < packs; ++k) staged[warp][lane + 32 * k] = mine[k];
    __syncwarp();
#pragma unroll
    for (int k = 0; k < packs; ++k) mine[k] = own_packs[k];

    const int64_t first = start + lane * Size::kRows;
    int own = rows.class_of(first);
    int64_t in_block = rows.first + first - own * rows.n;
#pragma unroll
    for (int row = 0; row < Size::kRows; ++row) {
      if (first + row < rows.count) {
        float v[C], most = -INFINITY, x_own = 0.f;
#pragma unroll
        for (int c = 0; c < C; ++c) {
          v[c] = static_cast<float>(mine[(row * C + c) / pack].v[(row * C + c) % pack]);
          most = fmaxf(most, v[c]), x_own = c == own ? v[c] : x_own;
        }
        Row r{finite(most), 0.f, 0.f};
#pragma unroll
        for (int c = 0; c < C; ++c) {
          r.total += v[c] - finite(x_own);
          v[c] = expf(v[c] - r.shift), r.sum += v[c];
        }
        const double weight = rows.weight(weights, own);
        sum += weight * static_cast<double>(r.loss(rows, x_own));
        if (lse) lse[first + row] = r.lse();
        const float w = scale * static_cast<float>(weight), per_sum = r.per_sum();
#pragma unroll
        for (int c = 0; c < C; ++c) {
          const float slope = w * (v[c] * per_sum - rows.share - (c == own ? rows.keep : 0.f));
          mine[(row * C + c) / pack].v[(row * C + c) % pack] = static_cast<T>(slope);
        }
      }
      if (++in_block == rows.n) in_block = 0, ++own;
    }

    if (!gradient) continue;
#pragma unroll
    for (int k = 0; k < packs; ++k) own_packs[k] = mine[k];
    __syncwarp();
#pragma unroll
    for (int k = 0; k < packs; ++k) {
      const int at = (lane + 32 * k) * pack;
      T* const to = gradient + start * C + at;
      const Pack<T> out = staged[warp][lane + 32 * k];
      if (at + pack <= elements) {
        out.to(to);
      } else {
#pragma unroll
        for (int i = 0; i < pack; ++i) {
          if (at + i < elements) to[i] = out.v[i];
        }
      }
    }
  }
  if (loss) sum_over_blocks(sum, loss + set, blocks);
}

// f(C) for 2 <= classes <= kMostFew; C is a compile-time constant
template <int C = 2, class F>
void by_few(int classes, F f) {
  if constexpr (C < kMostFew) {
    if (classes > C) return by_few<C + 1>(classes, f);
  }
  f(std::integral_constant<int, C>{});
}

}  // namespace ivfast
