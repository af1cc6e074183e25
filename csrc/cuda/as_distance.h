// log k of two diagonal Gaussians, four dimensions at a time, for the AS-Distance and its gradient.
//
// ℓ_d = −½ [log P + N/P] − c with P = s, N = δ² over dz and P = s + l_i l_j, N = δ² + u_i² l_j + u_j² l_i under the
// prior. Sums here leave out the constants: C = d c for log k = Σ_d ℓ_d, and C = c + log d for
// log k = log mean_d exp ℓ_d.
#pragma once

#include <cmath>

#include "pooled.h"

namespace ivfast {

constexpr float kLn2 = 0.693147181f, kHalfLog2e = 0.721347520f;

// 1/x of a normal number, accurate to the last bit or the one before
__device__ __forceinline__ float reciprocal(float x) {
#ifdef IVFAST_SIMT
  return 1.f / x;
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// u and l of a row
struct Gaussian {
  float4 u, l;

  __device__ Gaussian(const float* u, const float* l) : u(vec4(u)), l(vec4(l)) {}
};

struct Fractions {
  float N[4], P[4];
};

template <bool Prior>
__device__ __forceinline__ Fractions fractions(const Gaussian& i, const Gaussian& j) {
  Fractions f;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const float u_i = part(i.u, c), l_i = part(i.l, c), u_j = part(j.u, c), l_j = part(j.l, c);
    f.N[c] = (u_i - u_j) * (u_i - u_j), f.P[c] = l_i + l_j;
    if (Prior) f.N[c] += u_i * u_i * l_j + u_j * u_j * l_i, f.P[c] += l_i * l_j;
  }
  return f;
}

// Σ_d log P + N/P: two fractions share a reciprocal, and their denominator is a factor of a single product for the
// logarithm, whose mantissa (below 2^64 in 128 dimensions) and exponent are kept separately.
template <bool Prior>
struct Product {
  float quotients = 0.f, mantissas = 1.f;
  int exponents = 0;

  // only the first `left` of four dimensions if Some is set
  template <bool Some>
  __device__ __forceinline__ void add(const Gaussian& i, const Gaussian& j, int left) {
    Fractions f = fractions<Prior>(i, j);
#pragma unroll
    for (int c = 0; Some && c < 4; ++c) f.N[c] = c < left ? f.N[c] : 0.f, f.P[c] = c < left ? f.P[c] : 1.f;
#pragma unroll
    for (int c = 0; c < 4; c += 2) {
      const float P = f.P[c] * f.P[c + 1], N = f.N[c] * f.P[c + 1] + f.N[c + 1] * f.P[c];
      quotients += N * reciprocal(P);
      const unsigned bits = __float_as_uint(P);
      exponents += static_cast<int>(bits >> 23) - 127;
      mantissas *= __uint_as_float((bits & 0x007FFFFFu) | 0x3F800000u);
    }
  }
  __device__ __forceinline__ void add_lane(int lane) {
    quotients += __shfl_xor_sync(~0u, quotients, lane);
    mantissas *= __shfl_xor_sync(~0u, mantissas, lane);
    exponents += __shfl_xor_sync(~0u, exponents, lane);
  }
  __device__ __forceinline__ float log() const {
    return -0.5f * (kLn2 * (static_cast<float>(exponents) + log2f(mantissas)) + quotients);
  }
};

// Σ_d P^-½ exp(−N/2P) as sum · 2^-least, because it may be below the range of float32.
template <bool Prior>
struct Additive {
  float sum = 0.f, least = INFINITY;

  template <bool Some>
  __device__ __forceinline__ void add(const Gaussian& i, const Gaussian& j, int left) {
    const Fractions f = fractions<Prior>(i, j);
    float root[4], exponent[4], next = least;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      root[c] = rsqrtf(f.P[c]);
      exponent[c] = !Some || c < left ? kHalfLog2e * (f.N[c] * root[c] * root[c]) : INFINITY;
      next = min(next, exponent[c]);
    }
    sum *= exp2f(next - least);
#pragma unroll
    for (int c = 0; c < 4; ++c) sum += root[c] * exp2f(next - exponent[c]);
    least = next;
  }
  __device__ __forceinline__ void add_lane(int lane) {
    const float other = __shfl_xor_sync(~0u, least, lane), next = min(least, other);
    sum = least == INFINITY ? 0.f : sum * exp2f(next - least);  // a lane may have had no dimension
    sum += __shfl_xor_sync(~0u, sum, lane);
    least = next;
  }
  __device__ __forceinline__ float log() const { return logf(sum) - kLn2 * least; }
};

template <bool IsAdditive, bool Prior>
using LogKernel = std::conditional_t<IsAdditive, Additive<Prior>, Product<Prior>>;

struct Variances {  // from the second array, their logarithms
  __device__ float operator()(int array, float x) const { return array == 1 ? expf(x) : x; }
};

struct AsForm {
  double constant;  // C
  double log_pairs[3];  // for (r, r'), (g, g') and (r, g)
  bool log, unbiased;

  AsForm(int n, int m, int d, bool additive, bool prior, bool log, bool unbiased) : log(log), unbiased(unbiased) {
    const double c = (prior ? 1 : 0.5) * std::log(2 * 3.14159265358979323846);
    constant = additive ? c + std::log(double(d)) : d * c;
    const double own = unbiased ? 1 : 0;
    log_pairs[0] = std::log(n * (n - own)), log_pairs[1] = std::log(m * (m - own)), log_pairs[2] = std::log(double(n) * m);
  }
};

// f(additive, prior) as compile-time constants
template <class F>
void by_form(bool additive, bool prior, F f) {
  if (additive) return prior ? f(std::true_type{}, std::true_type{}) : f(std::true_type{}, std::false_type{});
  return prior ? f(std::false_type{}, std::true_type{}) : f(std::false_type{}, std::false_type{});
}

}  // namespace ivfast
