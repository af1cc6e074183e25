// 1/x and 1/√x of vectors, for normal x whose result is normal; included once per instruction set.
//
// If the CPU has an estimate instruction, one Newton step on it takes a third of the time of a division, with a
// relative error below 2e-7.
#pragma once

#if IVFAST_VECTOR_BYTES > 16
#include <immintrin.h>
#endif

#include "tiles.h"

namespace ivfast {
namespace IVFAST_ISA {
namespace {

IVFAST_INLINE Vec<double> reciprocal(Vec<double> x) { return 1. / x; }

IVFAST_INLINE Vec<double> reciprocal_root(Vec<double> x) {
  for (int l = 0; l < lanes<double>; ++l) x[l] = 1. / __builtin_sqrt(x[l]);
  return x;
}

#if IVFAST_VECTOR_BYTES > 16
IVFAST_INLINE Vec<float> reciprocal(Vec<float> x) {
#if IVFAST_VECTOR_BYTES == 64
  const Vec<float> y = (Vec<float>)_mm512_rcp14_ps((__m512)x);
#else
  const Vec<float> y = (Vec<float>)_mm256_rcp_ps((__m256)x);
#endif
  return y + y * (1.f - x * y);
}

IVFAST_INLINE Vec<float> reciprocal_root(Vec<float> x) {
#if IVFAST_VECTOR_BYTES == 64
  const Vec<float> y = (Vec<float>)_mm512_rsqrt14_ps((__m512)x);
#else
  const Vec<float> y = (Vec<float>)_mm256_rsqrt_ps((__m256)x);
#endif
  return y + (0.5f * y) * (1.f - x * y * y);
}
#else
IVFAST_INLINE Vec<float> reciprocal(Vec<float> x) { return 1.f / x; }

IVFAST_INLINE Vec<float> reciprocal_root(Vec<float> x) {
  for (int l = 0; l < lanes<float>; ++l) x[l] = 1.f / __builtin_sqrtf(x[l]);
  return x;
}
#endif

}  // namespace
}  // namespace IVFAST_ISA
}  // namespace ivfast
