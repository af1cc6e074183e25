// Closes the section opened by `avx2.h` or `avx512.h`.
#ifdef __clang__
#ifndef IVFAST_GENERIC
#pragma clang attribute pop
#endif
#endif
