#include "centre.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace ivfast {

void median_of_columns(
    double* centre, int64_t width, const double* x, int64_t n, const double* y, int64_t m, int64_t d) {
  constexpr int64_t together = 8;  // columns, which share a cache line
  const int64_t rows = n + m;
  std::vector<double> columns(together * rows);
  for (int64_t first = 0; first < d; first += together) {
    const int64_t count = std::min(together, d - first);
    for (int64_t i = 0; i < rows; ++i) {
      const double* const row = (i < n ? x + i * d : y + (i - n) * d) + first;
      for (int64_t k = 0; k < count; ++k) columns[k * rows + i] = row[k];
    }
    for (int64_t k = 0; k < count; ++k) {
      const auto begin = columns.begin() + k * rows, middle = begin + rows / 2;
      const bool finite = std::all_of(begin, begin + rows, [](double value) { return std::isfinite(value); });
      if (finite) std::nth_element(begin, middle, begin + rows);
      centre[first + k] = finite ? *middle : std::numeric_limits<double>::quiet_NaN();
    }
  }
  std::fill(centre + d, centre + width, 0.0);
}

}  // namespace ivfast
