// Closes what `avx2.h` or `avx512.h` opened.
#ifdef __clang__
#ifndef IVFAST_GENERIC
#pragma clang attribute pop
#endif
#endif
