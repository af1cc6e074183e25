"""KL of diagonal Gaussians to the prior, and samples from them, in Triton: one launch forward, one backward.

KL = ½ Σ_d (μ² + e^logvar − 1 − logvar),  z = μ + e^{logvar/2} ε. One kernel computes KL alone or both.
"""

import torch
import triton
import triton.language as tl

from .card import on
from .math import expm1, expm1_minus

# A tile is ROWS posteriors by COLUMNS dimensions; chosen by register count (tests/test_cubins.py), not yet timed.
TILE = 512  # elements
# fusion is explicit, because its default differs between Triton versions
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit(do_not_specialize=["n"])
def _forward_kernel(p_mu, p_logvar, p_draws, p_z, p_kl, n, d, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    dtype = p_kl.dtype.element_ty  # dtype of the arithmetic
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    inside = row < n - first

    total = tl.zeros([ROWS], dtype)
    for start in range(0, d, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        mask = inside[:, None] & (column < d)[None, :]
        at = row[:, None] * d + column[None, :]  # relative to the tile's first row
        b_mu = tl.load(p_mu + first * d + at, mask=mask, other=0.0).to(dtype)
        b_logvar = tl.load(p_logvar + first * d + at, mask=mask, other=0.0).to(dtype)
        total += tl.sum(b_mu * b_mu + expm1_minus(b_logvar), 1)
        if p_draws is not None:
            b_draws = tl.load(p_draws + first * d + at, mask=mask, other=0.0).to(dtype)
            tl.store(p_z + first * d + at, b_mu + tl.exp(0.5 * b_logvar) * b_draws, mask=mask)

    tl.store(p_kl + first + row, 0.5 * total, mask=inside)


@triton.jit(do_not_specialize=["n"])
def _backward_kernel(
    p_dz, p_dkl, p_mu, p_logvar, p_draws, p_dmu, p_dlogvar, n, d, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    dtype: tl.constexpr = tl.float64 if p_dmu.dtype.element_ty == tl.float64 else tl.float32
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    inside = row < n - first
    if p_dkl is not None:
        b_dkl = tl.load(p_dkl + first + row, mask=inside, other=0.0).to(dtype)[:, None]

    for start in range(0, d, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        mask = inside[:, None] & (column < d)[None, :]
        at = row[:, None] * d + column[None, :]  # relative to the tile's first row
        b_logvar = tl.load(p_logvar + first * d + at, mask=mask, other=0.0).to(dtype)
        b_dmu = tl.zeros([ROWS, COLUMNS], dtype)
        b_dlogvar = tl.zeros([ROWS, COLUMNS], dtype)
        # ∂μ = ∂z + ∂kl μ,  ∂logvar = ½ (∂z ε e^{logvar/2} + ∂kl (e^logvar − 1))
        if p_dz is not None:
            b_dmu = tl.load(p_dz + first * d + at, mask=mask, other=0.0).to(dtype)
            b_draws = tl.load(p_draws + first * d + at, mask=mask, other=0.0).to(dtype)
            b_dlogvar = 0.5 * b_dmu * b_draws * tl.exp(0.5 * b_logvar)
        if p_dkl is not None:
            b_dmu += b_dkl * tl.load(p_mu + first * d + at, mask=mask, other=0.0).to(dtype)
            b_dlogvar += 0.5 * b_dkl * expm1(b_logvar)
        tl.store(p_dmu + first * d + at, b_dmu, mask=mask)
        tl.store(p_dlogvar + first * d + at, b_dlogvar, mask=mask)


def _tile(n: int, d: int) -> tuple[int, int]:
    """ROWS and COLUMNS for n posteriors of d dimensions; wide posteriors take several tiles."""
    columns = min(triton.next_power_of_2(max(d, 1)), TILE)
    return min(TILE // columns, triton.next_power_of_2(n)), columns


def _forward(mu, logvar, draws):
    kl = torch.empty(mu.shape[:-1], dtype=torch.promote_types(mu.dtype, torch.float32), device=mu.device)
    z = None if draws is None else torch.empty(mu.shape, dtype=mu.dtype, device=mu.device)
    n, d = kl.numel(), mu.shape[-1]
    if n:
        tile = _tile(n, d)
        draws = None if draws is None else draws.contiguous()
        _forward_kernel[triton.cdiv(n, tile[0]),](
            mu.contiguous(), logvar.contiguous(), draws, z, kl, n, d, *tile, **on(mu, OPTIONS)
        )
    return z, kl


def kl(mu, logvar):
    """KL `[...]` of N(μ, diag e^logvar), both `[..., d]`, to N(0, I)."""
    return _forward(mu, logvar, None)[1]


def kl_backward(grad, mu, logvar):
    """∂L/∂μ and ∂L/∂logvar, given grad = ∂L/∂KL `[...]`."""
    return reparameterize_backward(None, grad, mu, logvar, None)


def reparameterize(mu, logvar, draws):
    """z `[..., d]` and KL `[...]`."""
    return _forward(mu, logvar, draws)


def reparameterize_backward(dz, dkl, mu, logvar, draws):
    """∂L/∂μ and ∂L/∂logvar, given ∂L/∂z, ∂L/∂KL or both."""
    dmu, dlogvar = (torch.empty(mu.shape, dtype=mu.dtype, device=mu.device) for _ in range(2))
    d = mu.shape[-1]
    if mu.numel():
        n = mu.numel() // d
        tile = _tile(n, d)
        dz, draws = (None, None) if dz is None else (dz.contiguous(), draws.contiguous())
        mu, dkl = (None, None) if dkl is None else (mu.contiguous(), dkl.contiguous())
        _backward_kernel[triton.cdiv(n, tile[0]),](
            dz, dkl, mu, logvar.contiguous(), draws, dmu, dlogvar, n, d, *tile, **on(logvar, OPTIONS)
        )
    return dmu, dlogvar
