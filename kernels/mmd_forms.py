"""The kernels of the MMD, summed over their scales, and their derivatives by r²."""

import triton
import triton.language as tl

from .particles import LARGEST, SMALLEST, within


@triton.jit
def scale(s, b):
    """c = s b, and 1/c normal numbers."""
    return within(s * b, 4 * SMALLEST, LARGEST / 4)


@triton.jit
def imq(d2, scales, b, COUNT: tl.constexpr):
    """Σ_s 1/(1 + r²/c) and its derivative −Σ_s (1/(1 + r²/c))²/c with c = s b; two scales share a reciprocal, which is
    0 where their product overflows."""
    k, slope = tl.zeros_like(d2), tl.zeros_like(d2)
    for s in tl.static_range(0, COUNT, 2):
        inverse = 1 / scale(scales[s], b)
        one = 1 + d2 * inverse
        if s + 1 < COUNT:
            inverse_2 = 1 / scale(scales[s + 1], b)
            other = 1 + d2 * inverse_2
            both = 1 / (one * other)
            term, term_2 = other * both, one * both
            k += term + term_2
            slope -= term * term * inverse + term_2 * term_2 * inverse_2
        else:
            term = 1 / one
            k += term
            slope -= term * term * inverse
    return k, slope


@triton.jit
def rbf(d2, scales, b, COUNT: tl.constexpr):
    """Σ_s exp(−r²/c) and its derivative −Σ_s exp(−r²/c)/c with c = s b."""
    k, slope = tl.zeros_like(d2), tl.zeros_like(d2)
    for s in tl.static_range(COUNT):
        inverse = 1 / scale(scales[s], b)
        term = tl.exp2(d2 * (-1.4426950408889634 * inverse))
        k += term
        slope -= term * inverse
    return k, slope


@triton.jit
def form(u, smallest, scales, b, IMQ: tl.constexpr, COUNT: tl.constexpr):
    """k and its slope for half squared distances u, infinite ones too; `smallest` is the least c."""
    d2 = tl.minimum(2 * u, 1e37 * tl.minimum(smallest, 1.0))  # r²/c stays finite
    k, slope = imq(d2, scales, b, COUNT) if IMQ else rbf(d2, scales, b, COUNT)
    return k, slope
