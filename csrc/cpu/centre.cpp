#include "centre.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace ivfast {

void median_of_columns(double* centre, const double* x, int64_t n, const double* y, int64_t m, int64_t d) {
  std::vector<double> column(n + m);
  for (int64_t k = 0; k < d; ++k) {
    bool finite = true;
    for (int64_t i = 0; i < n + m; ++i) {
      column[i] = i < n ? x[i * d + k] : y[(i - n) * d + k];
      finite &= std::isfinite(column[i]);
    }
    const auto middle = column.begin() + (n + m) / 2;
    if (finite) std::nth_element(column.begin(), middle, column.end());
    centre[k] = finite ? *middle : std::numeric_limits<double>::quiet_NaN();
  }
}

}  // namespace ivfast
