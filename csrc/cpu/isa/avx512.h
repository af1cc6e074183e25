// Opens a translation unit for AVX-512: 32 registers of 64 bytes. `end.h` closes it.
#pragma once
#define IVFAST_ISA avx512
#define IVFAST_VECTOR_BYTES 64
#define IVFAST_TILE_ROWS 8
#define IVFAST_TILE_VECTORS 2
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
