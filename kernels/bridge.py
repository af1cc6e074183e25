"""Bridges and the block substitution in Triton: all T_k z from one read of z and of the draws, in one launch.

A program processes ELEMENTS consecutive elements of the contiguous z `[..., n, d]`; T_k z follows T_{k−1} z after
`size` elements.
"""

import torch
import triton
import triton.language as tl

from .card import on

# chosen by register count (tests/test_cubins.py), not yet timed: eight elements per thread, two loads of 16 bytes
ELEMENTS = 1024
# fusion is explicit, because its default differs between Triton versions
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def _elements(size, d, ELEMENTS: tl.constexpr):
    """Offsets of a program's elements in z, which of them exist, the row of the first, and each element's row relative
    to it and column."""
    first = tl.program_id(0).to(tl.int64) * ELEMENTS
    i = tl.arange(0, ELEMENTS)
    column = tl.cast(first % d, tl.int32) + i
    return first + i, first + i < size, first // d, column // d, column % d


@triton.jit
def _cos_sin(k, t, dtype: tl.constexpr):
    """cos and sin of kπ/2t, by their series in the angle x <= π/4 from the nearer end."""
    LAST: tl.constexpr = 18 if dtype == tl.float64 else 12  # x^LAST/LAST! is below the rounding error
    x = tl.cast(tl.minimum(k, t - k), dtype) / tl.cast(t, dtype) * 1.5707963267948966
    cos, sin = tl.cast(1.0, dtype), tl.cast(1.0, dtype)
    for i in tl.static_range(LAST, 0, -2):
        cos = 1 - cos * (x * x) * (1.0 / (i * (i - 1)))
        sin = 1 - sin * (x * x) * (1.0 / (i * (i + 1)))
    sin *= x
    far = 2 * k > t
    return tl.where(far, sin, cos), tl.where(far, cos, sin)


@triton.jit(do_not_specialize=["d", "width", "t"])
def _blockwise_kernel(p_z, p_draws, p_bridges, size, d, width, t, ELEMENTS: tl.constexpr):
    at, inside, _, _, column = _elements(size, d, ELEMENTS)
    block = column // width
    b_z = tl.load(p_z + at, mask=inside)
    b_draws = tl.load(p_draws + at, mask=inside)
    for k in range(t + 1):
        tl.store(p_bridges + tl.cast(size, tl.int64) * k + at, tl.where(block < k, b_draws, b_z), mask=inside)


@triton.jit(do_not_specialize=["d", "width", "t"])
def _blockwise_backward_kernel(p_grad, p_dz, size, d, width, t, ELEMENTS: tl.constexpr):
    dtype: tl.constexpr = tl.float64 if p_grad.dtype.element_ty == tl.float64 else tl.float32
    at, inside, _, _, column = _elements(size, d, ELEMENTS)
    block = column // width
    # dz = Σ_{k <= block} grad_k
    b_dz = tl.zeros([ELEMENTS], dtype)
    for k in range(t):
        kept = inside & (block >= k)
        b_dz += tl.load(p_grad + tl.cast(size, tl.int64) * k + at, mask=kept, other=0.0).to(dtype)
    tl.store(p_dz + at, b_dz, mask=inside)


@triton.jit(do_not_specialize=["t"])
def _radial_kernel(p_z, p_draws, p_bridges, size, t, ELEMENTS: tl.constexpr):
    dtype: tl.constexpr = tl.float64 if p_z.dtype.element_ty == tl.float64 else tl.float32
    at = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = at < size
    b_z = tl.load(p_z + at, mask=inside)
    b_draws = tl.load(p_draws + at, mask=inside)
    tl.store(p_bridges + at, b_z, mask=inside)
    for k in range(1, t):
        c, s = _cos_sin(k, t, dtype)
        b_out = c * b_z.to(dtype) + s * b_draws.to(dtype)
        tl.store(p_bridges + tl.cast(size, tl.int64) * k + at, b_out, mask=inside)
    tl.store(p_bridges + tl.cast(size, tl.int64) * t + at, b_draws, mask=inside)


@triton.jit(do_not_specialize=["t"])
def _radial_backward_kernel(p_grad, p_dz, size, t, ELEMENTS: tl.constexpr):
    dtype: tl.constexpr = tl.float64 if p_grad.dtype.element_ty == tl.float64 else tl.float32
    at = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = at < size
    # dz = Σ_k cos(kπ/2t) grad_k; T_t z = ε does not contribute
    b_dz = tl.load(p_grad + at, mask=inside).to(dtype)
    for k in range(1, t):
        c, _ = _cos_sin(k, t, dtype)
        b_dz += c * tl.load(p_grad + tl.cast(size, tl.int64) * k + at, mask=inside).to(dtype)
    tl.store(p_dz + at, b_dz, mask=inside)


@triton.jit(do_not_specialize=["size", "d", "width"])
def _substitute_kernel(p_z, p_draws, p_index, p_out, size, d, width, ELEMENTS: tl.constexpr):
    """Without draws, replace with zeros: this is the gradient of z."""
    at, inside, row_0, row, column = _elements(size, d, ELEMENTS)
    chosen = tl.load(p_index + row_0 + row, mask=inside, other=-1) == column // width
    b_out = tl.load(p_z + at, mask=inside & (chosen == 0), other=0.0)
    if p_draws is not None:
        b_out = tl.where(chosen, tl.load(p_draws + at, mask=inside & chosen, other=0.0), b_out)
    tl.store(p_out + at, b_out, mask=inside)


def blockwise(z, draws, t):
    """T_k z `[t+1, ..., n, d]`."""
    bridges = torch.empty(t + 1, *z.shape, dtype=z.dtype, device=z.device)
    if size := z.numel():
        d = z.shape[-1]
        _blockwise_kernel[triton.cdiv(size, ELEMENTS),](
            z.contiguous(), draws.contiguous(), bridges, size, d, d // t, t, ELEMENTS, **on(z, OPTIONS)
        )
    return bridges


def blockwise_backward(grad, t):
    """∂L/∂z `[..., n, d]`, given grad = ∂L/∂bridges `[t+1, ..., n, d]`."""
    dz = torch.empty(grad.shape[1:], dtype=grad.dtype, device=grad.device)
    if size := dz.numel():
        d = dz.shape[-1]
        _blockwise_backward_kernel[triton.cdiv(size, ELEMENTS),](
            grad.contiguous(), dz, size, d, d // t, t, ELEMENTS, **on(grad, OPTIONS)
        )
    return dz


def radial(z, draws, t):
    """T_k z `[t+1, ..., n, d]`."""
    bridges = torch.empty(t + 1, *z.shape, dtype=z.dtype, device=z.device)
    if size := z.numel():
        _radial_kernel[triton.cdiv(size, ELEMENTS),](
            z.contiguous(), draws.contiguous(), bridges, size, t, ELEMENTS, **on(z, OPTIONS)
        )
    return bridges


def radial_backward(grad, t):
    """∂L/∂z `[..., n, d]`, given grad = ∂L/∂bridges `[t+1, ..., n, d]`."""
    dz = torch.empty(grad.shape[1:], dtype=grad.dtype, device=grad.device)
    if size := dz.numel():
        _radial_backward_kernel[triton.cdiv(size, ELEMENTS),](
            grad.contiguous(), dz, size, t, ELEMENTS, **on(grad, OPTIONS)
        )
    return dz


def substitute(z, draws, index, k):
    """O_i z `[..., n, d]`."""
    return _substituted(z, draws.contiguous(), index, k)


def substitute_backward(grad, index, k):
    """∂L/∂z `[..., n, d]`, given grad = ∂L/∂(O_i z)."""
    return _substituted(grad, None, index, k)


def _substituted(z, draws, index, k):
    out = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    if size := z.numel():
        d = z.shape[-1]
        _substitute_kernel[triton.cdiv(size, ELEMENTS),](
            z.contiguous(), draws, index.contiguous(), out, size, d, d // k, ELEMENTS, **on(z, OPTIONS)
        )
    return out
