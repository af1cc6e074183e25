"""Functions that Triton lacks, as right near 0 as far from it, and numbers that its kernels take.

Each series runs until what is left out is below the rounding of the arithmetic's dtype.
"""

import ctypes

import triton
import triton.language as tl


def parts(x: float) -> tuple[float, float]:
    """x as two float32, since a kernel's numbers are no wider."""
    high = ctypes.c_float(x).value
    return high, x - high


@triton.jit
def log1p(u):
    """log(1 + u) for u in [0, 1]."""
    # 2 artanh s = 2 Σ_k s^(2k+1)/(2k+1),  s = u/(2 + u) <= 1/3
    LAST: tl.constexpr = 16 if u.dtype == tl.float64 else 7
    s = u / (2 + u)
    total = tl.zeros_like(u)
    for k in tl.static_range(LAST, -1, -1):
        total = total * (s * s) + 1.0 / (2 * k + 1)
    return 2 * s * total


@triton.jit
def softplus(x):
    """log(1 + e^x)"""
    return tl.where(x > 0, x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _after_linear(x):
    """e^x − 1 − x where |x| < ½."""
    LAST: tl.constexpr = 16 if x.dtype == tl.float64 else 10
    total = tl.full(x.shape, 1.0, x.dtype)
    for k in tl.static_range(LAST, 2, -1):
        total = 1 + total * x * (1.0 / k)
    return 0.5 * x * x * total


@triton.jit
def expm1(x):
    return tl.where(tl.abs(x) < 0.5, x + _after_linear(x), tl.exp(x) - 1)


@triton.jit
def expm1_minus(x):
    """e^x − 1 − x"""
    return tl.where(tl.abs(x) < 0.5, _after_linear(x), tl.exp(x) - 1 - x)
