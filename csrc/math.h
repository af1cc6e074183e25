// Scalar mathematics shared by the CPU and the CUDA kernels.
//
// Every function is local to its translation unit: the same source compiled for several instruction sets must not be
// merged by the linker.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define IVFAST_MATH static __host__ __device__ __forceinline__
#else
#define IVFAST_MATH static inline __attribute__((always_inline))
#endif

namespace ivfast {

template <class To, class From>
IVFAST_MATH To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

// Storage types of tensors; half precision computes in float.
enum class Storage { float32, float64, bfloat16, float16 };
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

IVFAST_MATH float load(float x) { return x; }
IVFAST_MATH double load(double x) { return x; }
IVFAST_MATH float load(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
IVFAST_MATH float load(Float16 x) {
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13, sign = uint32_t(x.bits & 0x8000) << 16;
  // 2^112 moves the exponent's bias from 15 to 127, also for subnormals; the largest exponent means inf or NaN
  const uint32_t finite = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
  return bit_cast<float>(sign | ((x.bits & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000u : finite));
}

// Round to nearest, ties to even.
IVFAST_MATH void store(float* to, float x) { *to = x; }
IVFAST_MATH void store(double* to, double x) { *to = x; }
IVFAST_MATH void store(BFloat16* to, float x) {
  const uint32_t bits = bit_cast<uint32_t>(x), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to->bits = uint16_t(x != x ? 0x7fc0u : rounded);
}
IVFAST_MATH void store(Float16* to, float x) {
  const uint32_t bits = bit_cast<uint32_t>(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  // below 2^-14, adding 0.5 leaves the value in the low bits, rounded to multiples of 2^-24
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  to->bits = uint16_t(sign | (magnitude >= (143u << 23) ? special : finite));
}

// 2^f for |f| <= 1/2, by a polynomial through the Chebyshev nodes: relative error below 1.2e-7 (float) and 4e-16
// (double); 2^0 is exactly 1. Here and below V is a scalar or a GCC vector of T. Compile without -ffast-math.
template <class V>
IVFAST_MATH V exp2_fraction(V f, float) {
  V p = f * 1.54531629451206902e-4f + 1.33908633646712344e-3f;
  p = p * f + 9.61808255727785149e-3f;
  p = p * f + 5.55035711421907782e-2f;
  p = p * f + 2.40226507605681269e-1f;
  p = p * f + 6.93147188026228781e-1f;
  return p * f + 1.f;
}

template <class V>
IVFAST_MATH V exp2_fraction(V f, double) {
  V p = f * 2.57293241773623042e-11 + 4.45581790833606449e-10;
  p = p * f + 7.05489730415549928e-9;
  p = p * f + 1.01780570877339411e-7;
  p = p * f + 1.32154868087055628e-6;
  p = p * f + 1.52527338415567726e-5;
  p = p * f + 1.54035303933707334e-4;
  p = p * f + 1.33335581464064707e-3;
  p = p * f + 9.61812910762847949e-3;
  p = p * f + 5.55041086648216270e-2;
  p = p * f + 2.40226506959100712e-1;
  p = p * f + 6.93147180559945309e-1;
  return p * f + 1.;
}

// The layout of T. Adding `shift` to a number below 2^(mantissa − 1) leaves its nearest integer in the low bits.
template <class T>
struct Layout;
template <>
struct Layout<float> {
  static constexpr int mantissa = 23, bias = 127;
  static constexpr float shift = 0x1.8p23f, ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;
  static constexpr int32_t root_half = 0x3f3504f3;
};
template <>
struct Layout<double> {
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr double shift = 0x1.8p52, ln2_high = 0x1.62e42fefa3800p-1, ln2_low = 0x1.ef35793c7673p-45;
  static constexpr int64_t root_half = 0x3fe6a09e667f3bcd;
};

// 2^t for t <= 0 with the error of `exp2_fraction`; 0 below the normal numbers and for NaN. I is V's bits.
// With t = n + f: 2^n shifts the exponent.
template <class V, class I, class T>
IVFAST_MATH V exp2_nonpositive(V t, T) {
  using L = Layout<T>;
  const V lowest = V{} - T(L::bias), zero = V{};
  t = t > lowest ? t : lowest;  // 2^-127 has the bits of 0
  t = t < zero ? t : zero;
  const V shifted = t + L::shift;  // n in the low bits
  const V p = exp2_fraction(t - (shifted - L::shift), T());
  return bit_cast<V>(bit_cast<I>(p) + (bit_cast<I>(shifted) << L::mantissa));
}

// e^x for |x| <= 87: relative error below 1.3e-7 (float) and 4e-16 (double). The two parts of ln 2 keep x − n ln 2 exact.
template <class V, class I, class T>
IVFAST_MATH V exp_moderate(V x, T) {
  using L = Layout<T>;
  const V shifted = x * T(1.4426950408889634) + L::shift, n = shifted - L::shift;
  const V f = ((x - n * L::ln2_high) - n * L::ln2_low) * T(1.4426950408889634);
  return bit_cast<V>(bit_cast<I>(exp2_fraction(f, T())) + (bit_cast<I>(shifted) << L::mantissa));
}

// e^x for any x: 0 or inf outside the range of T, NaN for NaN; the error of `exp_moderate` if the result is normal.
// 2^n is the product of two powers, because n may exceed the range of exponents.
template <class V, class I, class T>
IVFAST_MATH V exp_any(V x, T) {
  using L = Layout<T>;
  const V most = V{} + T(L::bias + 2) * T(0.6931471805599453), least = V{} - T(L::bias + L::mantissa + 2) * T(0.6931471805599453);
  x = x > most ? most : x;
  x = x < least ? least : x;
  const V shifted = x * T(1.4426950408889634) + L::shift, n = shifted - L::shift;
  const V f = ((x - n * L::ln2_high) - n * L::ln2_low) * T(1.4426950408889634);
  const I exponent = bit_cast<I>(shifted) - bit_cast<I>(V{} + L::shift), half = exponent >> 1;
  const V first = bit_cast<V>((half + L::bias) << L::mantissa);
  const V second = bit_cast<V>((exponent - half + L::bias) << L::mantissa);
  return exp2_fraction(f, T()) * first * second;
}

// log2 x of a positive normal number, as e + log2 m with √½ <= m < √2: absolute error below 1.2e-7 (float) and 2e-16
// (double) plus one rounding of the result. log m = 2 artanh z, z = (m − 1)/(m + 1), |z| < 0.172.
template <class V, class I, class T>
IVFAST_MATH V log2_normal(V x, T) {
  using L = Layout<T>;
  const I exponent = (bit_cast<I>(x) - L::root_half) >> L::mantissa;
  const V m = bit_cast<V>(bit_cast<I>(x) - (exponent << L::mantissa));
  const V z = (m - T(1)) / (m + T(1)), z2 = z * z;
  constexpr int terms = sizeof(T) == 4 ? 5 : 11;  // z2^terms / (2 terms + 1) is below the rounding error
  V series = V{} + T(1) / T(2 * terms - 1);
#pragma GCC unroll 11
  for (int k = terms - 2; k >= 0; --k) series = series * z2 + T(1) / T(2 * k + 1);
  // the exponent as a number: its bits below those of `shift`
  const V e = bit_cast<V>(exponent + bit_cast<I>(V{} + L::shift)) - L::shift;
  return e + z * series * T(2.8853900817779268);
}

}  // namespace ivfast
