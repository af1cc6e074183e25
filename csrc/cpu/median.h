// What the driver (median.cpp) and the kernels (median_kernel.h, once per instruction set) agree on.
//
// Distances are handled as keys: the bits of u_ij = ‖x_i − x_j‖²/2 in the dtype of the arithmetic, which are in order as
// the distances are.
#pragma once

#include <utility>

#include "../math.h"
#include "isa.h"

namespace ivfast {

using Key = int64_t;

struct MedianSet {
  int64_t n, d;
  const void* x;    // contiguous [n, d]
  void* workspace;  // stages.bytes(n, d), aligned to 64
};

// How many keys are below, or at most, either end of a bracket.
struct BracketCounts {
  int64_t below_low = 0, upto_low = 0, below_high = 0, upto_high = 0;
};

struct MedianPair {
  int64_t i, j;
  int middle;
};

constexpr int64_t median_tile = 64, median_bins = 2048;
// Up to this many pairs all keys are kept: they stay in the second-level cache while the middle is looked for.
constexpr int64_t median_kept_pairs = 1 << 16;

// `values` are u_ij. Tiles are those of rows [i, i + median_tile) and columns [j, j + median_tile), pairs with i < j
// alone where i = j; they may be visited at the same time.
struct MedianStages {
  int64_t (*bytes)(int64_t n, int64_t d);
  // Centres and packs the rows, in scattered order if asked to: then panels of rows are samples of rows.
  void (*pack)(const MedianSet&, bool scattered);
  // The key at `rank` of all pairs and the next one, for at most `median_kept_pairs`.
  std::pair<Key, Key> (*middle_of_all)(const MedianSet&, int64_t rank);
  // `count` (whole vectors) values of scattered pairs.
  void (*sample)(const MedianSet&, void* values, int64_t count);
  // The key at `rank` of the values, and the next one. A vector behind the values is written; `scratch` holds
  // count/3 + 64.
  std::pair<Key, Key> (*select)(void* values, int64_t count, int64_t rank, void* scratch);
  // Adds to `counts`; writes the values with low < key < high and up to a vector of rubbish behind them.
  int64_t (*count)(const MedianSet&, int64_t i, int64_t j, Key low, Key high, BracketCounts& counts, void* values);
  // Adds the keys of [low, low + (median_bins << shift)) to their bins.
  void (*histogram)(const MedianSet&, int64_t i, int64_t j, Key low, int shift, int64_t* bins);
  // The ordered pairs whose key is one of `middles`, at most median_tile²; any tile, in one order where i ≠ j.
  int64_t (*match)(const MedianSet&, int64_t i, int64_t j, const Key* middles, MedianPair* pairs);
  // dx_i += weights[middle] (x_i − x_j), dx [n, d] in the dtype of the arithmetic
  void (*add)(const MedianSet&, const MedianPair* pairs, int64_t count, const double* weights, void* dx);
  void (*store)(const MedianSet&, const void* from, void* dx);  // in x's dtype
  int64_t element;  // bytes of a value
  double (*spread)(const MedianSet&);                           // Σ_i ‖x_i − x_0‖²/n
};

IVFAST_IN_EACH_ISA(MedianStages median_stages(Storage))

// What the median is of, and what divides med².
struct Heuristic {
  bool full, squared;
  double divisor;
};

struct Bandwidth {
  double h, middles[2];  // squared distances
};

// The bandwidth of one particle set. `set.workspace` is provided here.
Bandwidth median_run(MedianSet set, const MedianStages& stages, const Heuristic& heuristic, bool threaded);

}  // namespace ivfast
