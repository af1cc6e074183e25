// Opens a translation unit for any CPU: GCC and clang lower vectors of 16 bytes to SSE2, NEON or scalars.
#pragma once
#define IVFAST_GENERIC
#define IVFAST_ISA generic
#define IVFAST_VECTOR_BYTES 16
#define IVFAST_TILE_ROWS 4
#define IVFAST_TILE_VECTORS 2
