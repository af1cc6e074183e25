// Interface between the driver (median.cpp) and the kernels (median_kernel.h, once per instruction set).
//
// Distances are handled as keys: the bits of u_ij = ‖x_i − x_j‖²/2 in the dtype of the arithmetic, which sort in the
// same order as the distances.
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

// How many keys are below, and how many at most, each end of a bracket.
struct BracketCounts {
  int64_t below_low = 0, upto_low = 0, below_high = 0, upto_high = 0;
};

struct MedianPair {
  int64_t i, j;
  int middle;
};

constexpr int64_t median_tile = 64, median_bins = 2048;
// Up to this many pairs all keys are kept: they stay in the L2 cache during the search for the middle.
constexpr int64_t median_kept_pairs = 1 << 16;

// `values` are u_ij. A tile covers rows [i, i + median_tile) and columns [j, j + median_tile), and if i = j only the
// pairs with row < column. Tiles may be processed in parallel.
struct MedianStages {
  int64_t (*bytes)(int64_t n, int64_t d);
  // Centres and packs the rows; false if one is not finite. In scattered order, panels of rows are random samples of
  // rows.
  bool (*pack)(const MedianSet&, bool scattered);
  double (*norm)(const MedianSet&);  // the largest ‖x_i‖²/2 of the packed rows
  // The key at `rank` of all pairs and the next one, for at most `median_kept_pairs`.
  std::pair<Key, Key> (*middle_of_all)(const MedianSet&, int64_t rank);
  // `count` (whole vectors) values of scattered pairs.
  void (*sample)(const MedianSet&, void* values, int64_t count);
  // The key at `rank` of the values, and the next one. One vector past the values is overwritten; `scratch` holds
  // count/3 + 64.
  std::pair<Key, Key> (*select)(void* values, int64_t count, int64_t rank, void* scratch);
  // Adds to `counts`; writes the values with low < key < high, and up to a vector of garbage after them.
  int64_t (*count)(const MedianSet&, int64_t i, int64_t j, Key low, Key high, BracketCounts& counts, void* values);
  // Adds the keys of [low, low + (median_bins << shift)) to their bins.
  void (*histogram)(const MedianSet&, int64_t i, int64_t j, Key low, int shift, int64_t* bins);
  // The ordered pairs whose key is in one of the `ranges`, first and last of each, at most median_tile²; for any tile, in
  // one order if i ≠ j.
  int64_t (*match)(const MedianSet&, int64_t i, int64_t j, const Key (*ranges)[2], MedianPair* pairs);
  // dx_i += weights[middle] (x_i − x_j), dx [n, d] in the dtype of the arithmetic
  void (*add)(const MedianSet&, const MedianPair* pairs, int64_t count, const double* weights, void* dx);
  void (*store)(const MedianSet&, const void* from, void* dx);  // in x's dtype
  int64_t element;  // bytes of a value
  double (*spread)(const MedianSet&);                           // Σ_i ‖x_i − x_0‖²/n
};

IVFAST_IN_EACH_ISA(MedianStages median_stages(Storage))

// What the median is taken over, and the divisor of med².
struct Heuristic {
  bool full, squared;
  double divisor;
};

struct Bandwidth {
  double h, middles[2];  // squared distances
};

}  // namespace ivfast
