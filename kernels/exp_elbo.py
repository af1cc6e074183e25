"""The exponential of the ELBO in Triton: one program per set forward, one launch backward.

L = 1/(α n) Σ_i e^min(t_i, 80),  t = a rec + b KL; a factor of 0 drops its term.
"""

import torch
import triton
import triton.language as tl

from .card import on
from .math import parts

BLOCK = 1024  # samples at once; chosen by register count (tests/test_cubins.py), not yet timed
MOST = tl.constexpr(80.0)  # clamp of the exponent, as in ivfast/ops/exp_elbo.py
# fusion is explicit, because its default differs between Triton versions
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}


@triton.jit
def _exponent(
    p_reconstruction, p_kl, at, mask, a_high, a_low, b_high, b_low,
    A: tl.constexpr, B: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    b_t = tl.zeros(at.shape, dtype)
    if A:
        b_t += (tl.cast(a_high, dtype) + a_low) * tl.load(p_reconstruction + at, mask=mask, other=0.0).to(dtype)
    if B:
        b_t += (tl.cast(b_high, dtype) + b_low) * tl.load(p_kl + at, mask=mask, other=0.0).to(dtype)
    return b_t


@triton.jit
def _forward_kernel(
    p_reconstruction, p_kl, p_loss, n, a_high, a_low, b_high, b_low, alpha_high, alpha_low,
    A: tl.constexpr, B: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    dtype = p_loss.dtype.element_ty  # dtype of the arithmetic
    i_set = tl.program_id(0).to(tl.int64)

    b_sum = tl.zeros([BLOCK], dtype)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        b_t = _exponent(
            p_reconstruction + i_set * n, p_kl + i_set * n, i, i < n, a_high, a_low, b_high, b_low, A, B, dtype
        )
        b_sum += tl.where(i < n, tl.exp(tl.where(b_t > MOST, MOST, b_t)), 0.0)

    tl.store(p_loss + i_set, tl.sum(b_sum, 0) / n / (tl.cast(alpha_high, dtype) + alpha_low))


@triton.jit
def _backward_kernel(
    p_grad, p_reconstruction, p_kl, p_dreconstruction, p_dkl, n, a_high, a_low, b_high, b_low, alpha_high, alpha_low,
    A: tl.constexpr, B: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = tl.float64 if p_kl.dtype.element_ty == tl.float64 else tl.float32
    tiles = tl.cdiv(n, BLOCK)
    i_set, i_tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    i = i_tile * BLOCK + tl.arange(0, BLOCK)
    at = i_set * n + i

    grad = tl.load(p_grad + i_set).to(dtype) / n / (tl.cast(alpha_high, dtype) + alpha_low)
    b_t = _exponent(p_reconstruction, p_kl, at, i < n, a_high, a_low, b_high, b_low, A, B, dtype)
    # ∂x_i = factor e^t_i/(α n); no gradient where the exponent is clamped
    b_e = grad * tl.where(b_t > MOST, 0.0, tl.exp(b_t))
    tl.store(p_dreconstruction + at, (tl.cast(a_high, dtype) + a_low) * b_e, mask=i < n)
    tl.store(p_dkl + at, (tl.cast(b_high, dtype) + b_low) * b_e, mask=i < n)


def forward(reconstruction, kl, a, b, alpha):
    """The loss `[...]` of reconstruction losses and KLs `[..., n]`."""
    dtype = torch.promote_types(kl.dtype, torch.float32)
    loss = torch.empty(kl.shape[:-1], dtype=dtype, device=kl.device)
    if sets := loss.numel():
        _forward_kernel[sets,](
            *(reconstruction.contiguous(), kl.contiguous(), loss, kl.shape[-1]),
            *(*parts(a), *parts(b), *parts(alpha), a != 0, b != 0, BLOCK),
            **on(kl, OPTIONS),
        )
    return loss


def backward(grad, reconstruction, kl, a, b, alpha):
    """∂L/∂reconstruction and ∂L/∂KL, given grad = ∂L/∂loss `[...]`."""
    dreconstruction, dkl = (torch.empty(kl.shape, dtype=kl.dtype, device=kl.device) for _ in range(2))
    if sets := grad.numel():
        n = kl.shape[-1]
        _backward_kernel[sets * triton.cdiv(n, BLOCK),](
            *(grad.contiguous(), reconstruction.contiguous(), kl.contiguous(), dreconstruction, dkl, n),
            *(*parts(a), *parts(b), *parts(alpha), a != 0, b != 0, BLOCK),
            **on(kl, OPTIONS),
        )
    return dreconstruction, dkl
