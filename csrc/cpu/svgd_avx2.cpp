// AVX2 and FMA: 16 registers of 32 bytes.
#if defined(__x86_64__)
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define IVFAST_ISA avx2
#define IVFAST_VECTOR_BYTES 32
#define IVFAST_TILE_ROWS 4
#define IVFAST_TILE_VECTORS 3
#include "svgd_kernel.h"

namespace ivfast {
SvgdStages svgd_avx2(Storage storage, bool backward) { return avx2::stages(storage, backward); }
}  // namespace ivfast
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
