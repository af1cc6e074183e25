// What the driver (fld.cpp) and the kernels (fld_kernel.h, once per instruction set) agree on.
#pragma once

#include <cstdint>

#include "inverse_root.h"

namespace ivfast {

constexpr int64_t chunk = 256;      // rows of codes taken at once

// One set of codes z [n, d], contiguous, and its distance, gradient (null: not wanted) and error, as `fld_gram` says.
// The Gram matrix is over the m = min(n, d) columns of W [rows, m], the centred codes or, for n <= d, their transpose.
struct Codes {
  const void* z;
  int64_t n, d;
  void* gradient;
  double distance = 0, error = 0;
  int64_t rows = n > d ? n : d, m = n > d ? d : n;
  int64_t parts = rows > 4 * chunk ? 4 : (rows + chunk - 1) / chunk;  // of the chunks; they decide the order of sums
  void* workspace = nullptr;
  bool wide() const { return n <= d; }
};

// In order: `means`, `center`, `scatter`, `root` (false: this arithmetic does not serve), `gradients`. Those that take a
// part may run at the same time.
struct CodesStages {
  int64_t (*bytes)(const Codes&);
  void (*means)(const Codes&, int64_t part);
  void (*center)(const Codes&);
  void (*scatter)(const Codes&, int64_t part);
  bool (*root)(Codes&);
  void (*gradients)(const Codes&, int64_t part);
};
IVFAST_IN_EACH_ISA(CodesStages codes_stages(Storage))

}  // namespace ivfast
