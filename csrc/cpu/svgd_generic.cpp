// Any CPU: GCC and clang lower vectors of 16 bytes to SSE2, NEON or scalars.
#define IVFAST_ISA generic
#define IVFAST_VECTOR_BYTES 16
#define IVFAST_TILE_ROWS 4
#define IVFAST_TILE_VECTORS 2
#include "svgd_kernel.h"

namespace ivfast {
SvgdStages svgd_generic(Storage storage, bool backward) { return generic::stages(storage, backward); }
}  // namespace ivfast
