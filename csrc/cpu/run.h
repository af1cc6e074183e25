// Operators that another operator runs on one set, with data of `dtype`.
#pragma once

#include "median.h"
#include "operator.h"
#include "svgd.h"

namespace ivfast {

// φ and the row sums, or with a gradient the gradients, of one particle set; returns ∂h in the backward pass. This
// function sets the workspace.
double svgd_run(const SvgdSet& set, ScalarType dtype, bool threaded);

// The bandwidth of one particle set. This function sets the workspace.
Bandwidth median_run(const MedianSet& set, ScalarType dtype, const Heuristic& heuristic, bool threaded);

}  // namespace ivfast
