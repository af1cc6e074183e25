// A centre of samples that a few far rows do not move. Compiled once, for every instruction set.
#pragma once

#include <cstdint>

namespace ivfast {

// The median of each column of x [n, d] and y [m, d] together, both row by row, then zeros: centre [width]. NaN for a
// column that holds NaN or an infinity.
void median_of_columns(
    double* centre, int64_t width, const double* x, int64_t n, const double* y, int64_t m, int64_t d);

}  // namespace ivfast
