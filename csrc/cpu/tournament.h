// A symmetric problem split into pairs of blocks of rows, for any number of threads, always with the same rounding.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>

#include "stable.h"

namespace ivfast {

// Rows per block, for n rows of d numbers: few enough blocks that scheduling is cheap, enough for many threads, and two
// tiles of wide rows, so that a tile's rows are used twice from the L2 cache. Never a function of the number of
// threads, because the blocks determine the order of every sum.
inline int64_t block_rows(int64_t n, int64_t d, int64_t edge) {
  const int64_t least = n >= 1024 && d >= 256 ? 2 * edge : edge;
  return std::clamp<int64_t>((n / 32 + edge - 1) / edge * edge, least, 512);
}

// The stages of `blocks` blocks as a list of tasks for any number of threads: each block is begun, meets every other
// block in a round-robin tournament, and is finished. A task waits until its blocks have played the earlier rounds.
// Those come earlier in the list, so some thread is already working on them. There is no barrier.
//
// Stages has begin(a), pair(a, b) for a != b in either order, and finish(a).
template <class Stages>
class Tournament {
 public:
  Tournament(const Stages& stages, int64_t blocks) : stages_(stages), blocks_(blocks) {
    seats_ = (blocks_ + 1) / 2 * 2, rounds_ = seats_ - 1;  // with an odd number of blocks, one sits out each round
    if (blocks_ > few) more_.reset(new std::atomic<int64_t>[size_t(blocks_)]);
    played_ = blocks_ > few ? more_.get() : few_;
    for (int64_t block = 0; block < blocks_; ++block) played_[block].store(0, std::memory_order_relaxed);
  }

  void run(bool threaded) {
    each_thread(threaded, [&] { work(); });
  }

 private:
  static constexpr int64_t few = 32;

  void work() {
    const int64_t games = rounds_ * (seats_ / 2), tasks = blocks_ + games + blocks_;
    for (int64_t task; (task = next_.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      if (task < blocks_) {
        stages_.begin(task);
        played_[task].store(1, std::memory_order_release);
      } else if (task < blocks_ + games) {
        play((task - blocks_) / (seats_ / 2), (task - blocks_) % (seats_ / 2));
      } else {
        const int64_t block = task - blocks_ - games;
        wait(block, rounds_ + 1);
        stages_.finish(block);
      }
    }
  }

  void play(int64_t round, int64_t seat) {
    const int64_t a = seat == 0 ? rounds_ : (round + seat) % rounds_, b = (round + rounds_ - seat) % rounds_;
    for (const int64_t block : {a, b})
      if (block < blocks_) wait(block, round + 1);
    if (std::max(a, b) < blocks_) stages_.pair(a, b);
    for (const int64_t block : {a, b})
      if (block < blocks_) played_[block].store(round + 2, std::memory_order_release);
  }

  void wait(int64_t block, int64_t stages) const {
    for (int tries = 0; played_[block].load(std::memory_order_acquire) < stages; ++tries)
      if (tries > 1000) std::this_thread::yield();
  }

  const Stages& stages_;
  int64_t blocks_, seats_, rounds_;
  std::atomic<int64_t> next_{0}, few_[few], *played_;  // stages that each block has completed
  std::unique_ptr<std::atomic<int64_t>[]> more_;
};

}  // namespace ivfast
