// Opens a translation unit for AVX2 and FMA: 16 registers of 32 bytes. `end.h` closes it.
#pragma once
#define IVFAST_ISA avx2
#define IVFAST_VECTOR_BYTES 32
#define IVFAST_TILE_ROWS 4
#define IVFAST_TILE_VECTORS 3
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
