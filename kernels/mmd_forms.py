"""The kernels of the MMD, summed over their scales, and their derivatives by r²."""

import triton
import triton.language as tl

from .particles import LARGEST, SMALLEST, within

FAR = tl.constexpr(1e18)  # limit of r² and of the scales: products of two are finite and not 0


@triton.jit
def scale(s, b):
    return within(s * b, 1 / FAR, FAR)


@triton.jit
def imq(d2, scales, b, COUNT: tl.constexpr):
    """Σ_s c/(c + r²) and its derivative −Σ_s (c/(c + r²))²/c with c = s b; two scales share a reciprocal."""
    k, slope = tl.zeros_like(d2), tl.zeros_like(d2)
    for s in tl.static_range(0, COUNT, 2):
        c = scale(scales[s], b)
        if s + 1 < COUNT:
            c_2 = scale(scales[s + 1], b)
            inverse = 1 / ((d2 + c) * (d2 + c_2))
            term, term_2 = c * (d2 + c_2) * inverse, c_2 * (d2 + c) * inverse
            k += term + term_2
            slope -= term * term * (1 / c) + term_2 * term_2 * (1 / c_2)
        else:
            term = c / (d2 + c)
            k += term
            slope -= term * term * (1 / c)
    return k, slope


@triton.jit
def rbf(d2, scales, b, COUNT: tl.constexpr):
    """Σ_s exp(−r²/c) and its derivative −Σ_s exp(−r²/c)/c with c = s b."""
    k, slope = tl.zeros_like(d2), tl.zeros_like(d2)
    for s in tl.static_range(COUNT):
        inverse = within(1 / (scales[s] * b), SMALLEST, LARGEST / 2)
        term = tl.exp2(d2 * (-1.4426950408889634 * inverse))
        k += term
        slope -= term * inverse
    return k, slope


@triton.jit
def form(u, scales, b, IMQ: tl.constexpr, COUNT: tl.constexpr):
    """k and its slope for half squared distances u."""
    d2 = tl.minimum(2 * u, FAR)
    k, slope = imq(d2, scales, b, COUNT) if IMQ else rbf(d2, scales, b, COUNT)
    return k, slope
