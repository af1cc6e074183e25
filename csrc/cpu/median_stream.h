// Order statistics of all distances of a set without storing them; included by median.cpp.
//
// A sample of the pairs brackets the rank. One pass over all pairs counts those below the bracket and collects those
// inside, about one percent, from which the answer is selected. If the counts show that it is elsewhere, or more pairs
// are inside than fit, histograms over the keys' bits narrow the range until they fit.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <mutex>

#include "median.h"
#include "operator.h"

namespace ivfast {
namespace {

std::atomic<int64_t> histograms{0};
std::atomic<double> bracket_reach{2};

// f(i, j) for the tiles of the upper triangle or of the whole matrix, one strip of rows at a time, which the threads take
// from a shared counter
template <class F>
void take_tiles(std::atomic<int64_t>& next, int64_t n, bool whole, const F& f) {
  for (int64_t i; (i = next.fetch_add(median_tile, std::memory_order_relaxed)) < n;)
    for (int64_t j = whole ? 0 : i; j < n; j += median_tile) f(i, j);
}

struct Range {
  Key low, high;  // both may be the answer
};

// Order statistics of the u_ij of one packed set with too many pairs to keep.
class Stream {
 public:
  Stream(const MedianSet& set, const MedianStages& stages, bool threaded, Workspace& memory)
      : set_(set), stages_(stages), threaded_(threaded), memory_(memory), pairs_(set.n * (set.n - 1) / 2) {
    const double size = std::cbrt(double(pairs_)) * std::cbrt(double(pairs_));
    sampled_ = (int64_t(size) + 63) / 64 * 64;
    room_ = 8 * sampled_;  // twice the number expected within ±2√sampled ranks
    greatest_ = stages.element == 4 ? 0x7f800000 : 0x7ff0000000000000;
  }

  // Called for a rank and then the next; the counts of one pass are reused.
  Key find(int64_t rank) {
    if (!counted_) count(sampled_bracket(rank));
    Range range{0, greatest_};
    for (int64_t below = 0;;) {
      if (rank < counts_.below_low)
        range.high = std::min(range.high, bracket_.low - 1);
      else if (rank < counts_.upto_low)
        return bracket_.low;
      else if (rank < counts_.below_high) {
        if (collected_ <= room_) return selected(rank - counts_.upto_low);
        range = {bracket_.low + 1, bracket_.high - 1}, below = counts_.upto_low;
      } else if (rank < counts_.upto_high)
        return bracket_.high;
      else
        range.low = bracket_.high + 1, below = counts_.upto_high;
      count(narrowed(range, below, rank));
    }
  }

 private:
  Range sampled_bracket(int64_t rank) {
    void* const values = memory_.reserve((room_ + sampled_ + 256) * stages_.element);
    void* const scratch = static_cast<char*>(values) + sampled_ * stages_.element;
    stages_.sample(set_, values, sampled_);
    const double wanted = (double(rank) + 0.5) / double(pairs_) * double(sampled_);
    const double reach = bracket_reach * std::sqrt(double(sampled_));
    const int64_t low = int64_t(std::floor(wanted - reach)), high = int64_t(std::ceil(wanted + reach));
    return {low < 0 ? 0 : stages_.select(values, sampled_, low, scratch).first,
            high >= sampled_ ? greatest_ : stages_.select(values, sampled_, high, scratch).first};
  }

  void count(Range bracket) {
    bracket_ = bracket, counts_ = {}, collected_ = 0, counted_ = true;
    values_ = static_cast<char*>(memory_.reserve((room_ + room_ / 2 + 256) * stages_.element));
    selected_rank_ = -1;
    std::atomic<int64_t> next{0}, collected{0};
    std::mutex mutex;
    each_thread(threaded_, [&] {
      constexpr int64_t most = median_tile * median_tile;
      static thread_local Workspace workspace;
      char* const chunk = static_cast<char*>(workspace.reserve((4 * most + 64) * stages_.element));
      BracketCounts counts;
      int64_t filled = 0;
      const auto flush = [&] {
        const int64_t first = collected.fetch_add(filled);
        if (first + filled <= room_)
          std::copy_n(chunk, filled * stages_.element, values_ + first * stages_.element);
        filled = 0;
      };
      take_tiles(next, set_.n, false, [&](int64_t i, int64_t j) {
        filled += stages_.count(set_, i, j, bracket.low, bracket.high, counts, chunk + filled * stages_.element);
        if (filled > 3 * most) flush();
      });
      flush();
      const std::lock_guard<std::mutex> lock(mutex);
      counts_.below_low += counts.below_low, counts_.upto_low += counts.upto_low;
      counts_.below_high += counts.below_high, counts_.upto_high += counts.upto_high;
    });
    collected_ = collected;
  }

  // The part of `range` that holds `rank`: one key, or no more pairs than fit. `below` pairs lie below `range`.
  Range narrowed(Range range, int64_t below, int64_t rank) {
    for (int64_t inside = pairs_; range.low < range.high && inside > room_;) {
      int shift = 0;
      while ((range.high - range.low) >> shift >= median_bins) ++shift;
      int64_t bins[median_bins] = {};
      histograms.fetch_add(1, std::memory_order_relaxed);
      std::atomic<int64_t> next{0};
      std::mutex mutex;
      each_thread(threaded_, [&] {
        int64_t own[median_bins] = {};
        take_tiles(next, set_.n, false,
                   [&](int64_t i, int64_t j) { stages_.histogram(set_, i, j, range.low, shift, own); });
        const std::lock_guard<std::mutex> lock(mutex);
        for (int64_t bin = 0; bin < median_bins; ++bin) bins[bin] += own[bin];
      });
      int64_t bin = 0;
      while (bin < median_bins - 1 && below + bins[bin] <= rank) below += bins[bin++];
      range.low += bin << shift;
      range.high = std::min(range.high, range.low + (Key(1) << shift) - 1);
      inside = bins[bin];
    }
    return range;
  }

  Key selected(int64_t rank) {
    if (selected_rank_ < 0 || rank - selected_rank_ > 1) {
      selected_ = stages_.select(values_, collected_, rank, values_ + (room_ + 64) * stages_.element);
      selected_rank_ = rank;
    }
    return rank == selected_rank_ ? selected_.first : selected_.second;
  }

  const MedianSet& set_;
  const MedianStages& stages_;
  const bool threaded_;
  Workspace& memory_;
  const int64_t pairs_;
  int64_t sampled_, room_, collected_ = 0, selected_rank_ = -1;
  Key greatest_;
  bool counted_ = false;
  Range bracket_{};
  BracketCounts counts_;
  char* values_ = nullptr;
  std::pair<Key, Key> selected_;
};

}  // namespace
}  // namespace ivfast
