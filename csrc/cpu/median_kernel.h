// Operations on the distances of a tile of pairs; included once per instruction set.
#pragma once

#include "distances.h"
#include "median_select.h"

namespace ivfast {
namespace IVFAST_ISA {
namespace {

// Rows are in panels [padded n, d]; padded rows are 0.
template <class T>
struct Panels {
  int64_t n, d, padded;
  T *centre, *half_norms, *x;
  T *values, *scratch;  // all u_ij, if they are kept
  int64_t bytes;

  explicit Panels(const MedianSet& set) : n(set.n), d(set.d), padded(round_up(n, lanes<T>)) {
    const int64_t pairs = n * (n - 1) / 2, kept = pairs <= median_kept_pairs ? pairs : 0;
    char *const base = static_cast<char*>(set.workspace), *next = base;
    const auto take = [&](int64_t count, T*& pointer) {
      pointer = reinterpret_cast<T*>(next);
      next += round_up(count * int64_t(sizeof(T)), 64);
    };
    take(round_up(d, lanes<T>), centre), take(padded, half_norms), take(padded * d, x);
    take(kept + 64, values), take(kept / 2 + 64, scratch);
    bytes = next - base;
  }
};

// A fixed bijection of [0, n), as good as a random one.
class Scatter {
 public:
  explicit Scatter(int64_t n) : n_(uint64_t(n)) {
    while (mask_ < n_) mask_ = mask_ << 1 | 1, ++bits_;
  }
  int64_t operator()(int64_t i) const {
    uint64_t x = uint64_t(i);
    do {
      for (const uint64_t factor : {0x9e3779b97f4a7c15u, 0xbf58476d1ce4e5b9u, 0x94d049bb133111ebu}) {
        x = (x + 0x5bd1e995u) * factor & mask_;
        x ^= x >> (bits_ / 2 + 1);
      }
    } while (x >= n_);
    return int64_t(x);
  }

 private:
  uint64_t n_, mask_ = 1;
  int bits_ = 1;
};

inline uint64_t hash(uint64_t x) {
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

template <class T>
int64_t bytes(int64_t n, int64_t d) {
  return Panels<T>(MedianSet{n, d, nullptr, nullptr}).bytes;
}

template <class S, class T>
bool pack(const MedianSet& set, bool scattered) {
  constexpr int L = lanes<T>;
  const Panels<T> w(set);
  const S* const x = static_cast<const S*>(set.x);
  const Scatter place(w.n);
  centre(w.centre, x, w.n, w.d);
  for (int64_t i = 0; i < w.padded; i += L) {
    int64_t source[L];
    for (int r = 0; r < L; ++r) source[r] = i + r < w.n ? (scattered ? place(i + r) : i + r) : w.n;
    T* const panel = w.x + i * w.d;
    for (int64_t k = 0; k < w.d; k += L) {
      const int64_t count = w.d - k < L ? w.d - k : L;
      Vec<T> rows[L];
      for (int r = 0; r < L; ++r) {
        const int64_t from = source[r] * w.d + k;
        rows[r] = source[r] < w.n ? load_row<T>(x + from, count, w.n * w.d - from) - at(w.centre + k) : Vec<T>{};
      }
      store_panel<T>(panel, rows, k, count);
    }
    at(w.half_norms + i) = half_norms(panel, w.d);
  }
  return nan_of<T>(w.centre, w.d) == 0;
}

IVFAST_INLINE int64_t extent(int64_t i, int64_t n) { return n - i < tile ? n - i : tile; }

// A tile's u, with padding where there is no pair or, if `ordered`, none with i < j.
template <class T>
IVFAST_INLINE void pair_tile(T* u, const Panels<T>& w, int64_t i, int64_t j, bool ordered) {
  const int64_t rows = extent(i, w.n), cols = extent(j, w.n), vectors = round_up(cols, lanes<T>);
  distance_tile(u, w.x, w.half_norms, w.d, Range{i, round_up(rows, group<T>), j, vectors});
  const T none = bit_cast<T>(padding<T>);
  for (int64_t r = 0; cols < vectors && r < rows; ++r)
    for (int64_t c = cols; c < vectors; ++c) u[r * tile + c] = none;
  if (ordered && i == j)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c <= r; ++c) u[r * tile + c] = none;
}

// f(vector of keys) for each vector of a tile
template <class T, class F>
IVFAST_INLINE void each_vector(const T* u, int64_t rows, int64_t cols, const F& f) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; c += lanes<T>) f(unaligned(u + r * tile + c));
}

// Strips of few rows: half of a square tile on the diagonal would be wasted work.
template <class T>
std::pair<Key, Key> middle_of_all(const MedianSet& set, int64_t rank) {
  constexpr int64_t strip = 16, L = lanes<T>;
  const Panels<T> w(set);
  T* out = w.values;
  for (int64_t i = 0; i < w.n; i += strip) {
    alignas(64) T u[strip * tile + L];
    const int64_t rows = w.n - i < strip ? w.n - i : strip;
    for (int64_t j = i; j < w.n; j += tile) {
      const int64_t cols = extent(j, w.n);
      distance_tile(u, w.x, w.half_norms, w.d, Range{i, round_up(rows, group<T>), j, round_up(cols, L)});
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = i == j ? r + 1 : 0; c < cols; c += L) {
          __builtin_memcpy(out, u + r * tile + c, sizeof(Vec<T>));  // garbage after a row is overwritten
          out += cols - c < L ? cols - c : L;
        }
    }
  }
  pad(out);
  return select<T>(w.values, out - w.values, rank, w.scratch);
}

// Two panels lane by lane: no two pairs in a vector share a row.
template <class T>
void sample(const MedianSet& set, void* values, int64_t count) {
  constexpr int L = lanes<T>;
  const Panels<T> w(set);
  const uint64_t panels = uint64_t(w.n / L);
  for (int64_t s = 0; s < count; s += L) {
    const uint64_t random = hash(uint64_t(s)), a = (random & 0xffffffff) % panels;
    const uint64_t b = (a + 1 + (random >> 32) % (panels - 1)) % panels;
    const T *const x = w.x + a * L * w.d, *const y = w.x + b * L * w.d;
    Vec<T> sum = {};
    for (int64_t k = 0; k < w.d; ++k) Apart<T>::add(sum, at(x + k * L), at(y + k * L));
    const Vec<T> u = half_square<T>(sum, at(w.half_norms + a * L), at(w.half_norms + b * L));
    at(static_cast<T*>(values) + s) = u > Vec<T>{} ? u : Vec<T>{};
  }
}

template <class T>
std::pair<Key, Key> select_key(void* values, int64_t count, int64_t rank, void* scratch) {
  pad(static_cast<T*>(values) + count);
  return select<T>(static_cast<const T*>(values), count, rank, static_cast<T*>(scratch));
}

template <class T>
int64_t count(const MedianSet& set, int64_t i, int64_t j, Key low, Key high, BracketCounts& counts, void* values) {
  const Panels<T> w(set);
  alignas(64) T u[tile * tile];
  pair_tile(u, w, i, j, true);
  const Bits<T> lows = Bits<T>{} + Integer<T>(low), highs = Bits<T>{} + Integer<T>(high);
  Bits<T> below_low = {}, upto_low = {}, below_high = {}, upto_high = {};
  T *const first = static_cast<T*>(values), *out = first;
  each_vector(u, extent(i, w.n), extent(j, w.n), [&](Bits<T> key) __attribute__((always_inline)) {
    const Bits<T> above_low = key > lows, under_high = key < highs;
    below_low -= key < lows, upto_low -= ~above_low, below_high -= under_high, upto_high -= key <= highs;
    out = append<T>(out, key, above_low & under_high);
  });
  counts.below_low += sum<T>(below_low), counts.upto_low += sum<T>(upto_low);
  counts.below_high += sum<T>(below_high), counts.upto_high += sum<T>(upto_high);
  return out - first;
}

template <class T>
void histogram(const MedianSet& set, int64_t i, int64_t j, Key low, int shift, int64_t* bins) {
  const Panels<T> w(set);
  alignas(64) T u[tile * tile];
  pair_tile(u, w, i, j, true);
  each_vector(u, extent(i, w.n), extent(j, w.n), [&](Bits<T> key) {
    for (int l = 0; l < lanes<T>; ++l) {
      const uint64_t bin = (uint64_t(key[l]) - uint64_t(low)) >> shift;
      if (bin < uint64_t(median_bins)) ++bins[bin];
    }
  });
}

template <class T>
int64_t match(const MedianSet& set, int64_t i, int64_t j, const Key (*ranges)[2], MedianPair* pairs) {
  const Panels<T> w(set);
  alignas(64) T u[tile * tile];
  pair_tile(u, w, i, j, false);
  const auto inside = [&](const auto& key, int a) __attribute__((always_inline)) {
    return (key >= Integer<T>(ranges[a][0])) & (key <= Integer<T>(ranges[a][1]));
  };
  Bits<T> any = {};
  const int64_t rows = extent(i, w.n), cols = extent(j, w.n);
  each_vector(u, rows, cols, [&](Bits<T> key) __attribute__((always_inline)) { any |= inside(key, 0) | inside(key, 1); });
  if (sum<T>(any) == 0) return 0;
  int64_t found = 0;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) {
      const Integer<T> key = bit_cast<Integer<T>>(u[r * tile + c]);
      if (inside(key, 0) || inside(key, 1)) pairs[found++] = {i + r, j + c, !inside(key, 0)};
    }
  return found;
}

template <class S, class T>
void add(const MedianSet& set, const MedianPair* pairs, int64_t count, const double* weights, void* dx) {
  const S* const x = static_cast<const S*>(set.x);
  for (; count-- > 0; ++pairs) {
    const S *const from = x + pairs->i * set.d, *const to = x + pairs->j * set.d;
    T* const out = static_cast<T*>(dx) + pairs->i * set.d;
    const T weight = T(weights[pairs->middle]);
    for (int64_t k = 0; k < set.d; ++k) out[k] += weight * (load(from[k]) - load(to[k]));
  }
}

template <class S, class T>
void store_all(const MedianSet& set, const void* from, void* dx) {
  for (int64_t e = 0; e < set.n * set.d; ++e) store(static_cast<S*>(dx) + e, static_cast<const T*>(from)[e]);
}

template <class S>
double spread_of(const MedianSet& set) {
  return spread(static_cast<const S*>(set.x), set.n, set.d);
}

template <class T>
double norm(const MedianSet& set) {
  const Panels<T> w(set);
  T most = 0;
  for (int64_t i = 0; i < w.n; ++i) most = w.half_norms[i] > most ? w.half_norms[i] : most;
  return double(most);
}

template <class S, class T>
MedianStages stages_of() {
  return {bytes<T>, pack<S, T>, norm<T>, middle_of_all<T>, sample<T>, select_key<T>, count<T>, histogram<T>,
          match<T>, add<S, T>, store_all<S, T>, int64_t(sizeof(T)), spread_of<S>};
}

}  // namespace

MedianStages median_stages(Storage storage) {
  return IVFAST_BY_STORAGE(storage, stages_of);
}

}  // namespace IVFAST_ISA
}  // namespace ivfast
