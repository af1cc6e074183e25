// Whole vectors from and to what tensors are stored in, `load` and `store` of math.h lane by lane; included once per
// instruction set.
#pragma once

#include "../math.h"

namespace ivfast {
namespace IVFAST_ISA {
namespace {

typedef float Floats __attribute__((vector_size(IVFAST_VECTOR_BYTES)));
typedef double Doubles __attribute__((vector_size(IVFAST_VECTOR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(IVFAST_VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(IVFAST_VECTOR_BYTES / 2)));

template <class V, class S>
IVFAST_MATH V copied(const S* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}
IVFAST_MATH Words words(const void* from) {
  return __builtin_convertvector(copied<Halves>(static_cast<const uint16_t*>(from)), Words);
}

IVFAST_MATH Floats load_vector(const float* from) { return copied<Floats>(from); }
IVFAST_MATH Doubles load_vector(const double* from) { return copied<Doubles>(from); }
IVFAST_MATH Floats load_vector(const BFloat16* from) { return bit_cast<Floats>(words(from) << 16); }
IVFAST_MATH Floats load_vector(const Float16* from) {
  const Words bits = words(from), magnitude = (bits & 0x7fff) << 13, sign = (bits & 0x8000) << 16;
  const Words finite = bit_cast<Words>(bit_cast<Floats>(magnitude) * 0x1p112f);
  return bit_cast<Floats>(sign | ((bits & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000u : finite));
}

IVFAST_MATH void store_vector(float* to, Floats x) { __builtin_memcpy(to, &x, sizeof x); }
IVFAST_MATH void store_vector(double* to, Doubles x) { __builtin_memcpy(to, &x, sizeof x); }
IVFAST_MATH void store_words(void* to, Words bits) {
  const Halves halves = __builtin_convertvector(bits, Halves);
  __builtin_memcpy(to, &halves, sizeof halves);
}
IVFAST_MATH void store_vector(BFloat16* to, Floats x) {
  const Words bits = bit_cast<Words>(x), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  store_words(to, x != x ? Words{} + 0x7fc0u : rounded);
}
IVFAST_MATH void store_vector(Float16* to, Floats x) {
  const Words bits = bit_cast<Words>(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  const Words subnormal = bit_cast<Words>(bit_cast<Floats>(magnitude) + 0.5f) - 0x3f000000u;
  const Words normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const Words finite = magnitude < (113u << 23) ? subnormal : normal;
  const Words special = magnitude > 0x7f800000u ? Words{} + 0x7e00u : Words{} + 0x7c00u;
  store_words(to, sign | (magnitude >= (143u << 23) ? special : finite));
}

}  // namespace
}  // namespace IVFAST_ISA
}  // namespace ivfast

// function<S, T>(…) of a storage: tensors hold S, arithmetic is in T
#define IVFAST_BY_STORAGE(storage, function, ...)                          \
  (storage == Storage::float64    ? function<double, double>(__VA_ARGS__)  \
   : storage == Storage::bfloat16 ? function<BFloat16, float>(__VA_ARGS__) \
   : storage == Storage::float16  ? function<Float16, float>(__VA_ARGS__)  \
                                  : function<float, float>(__VA_ARGS__))
