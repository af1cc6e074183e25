"""AS-Distance in Triton: log-sums over all pairs of two batches of Gaussians, no pair matrix.

Per pair and dimension ℓ = −½ (A/P + log P) + const, with δ = u_i − u_j and
  P = l_i + l_j, A = δ² (Lebesgue measure);  P = l_i + l_j + l_i l_j, A = δ² + u_i² l_j + u_j² l_i (the prior's).

Special functions are the bottleneck: fractions are merged, so that four dimensions need one division and one
logarithm. A thread owns one Gaussian and compares it with the others in registers, so its sums need no exchange between
threads. Logarithms are to base 2.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .card import on
from .particles import OPTIONS, check_dtype, shares

OWNED = 128  # Gaussians per program, one per thread
PACK_ROWS, PACK_WIDTH = 32, 32
PARTS = 256  # combined at once
GROUP = tl.constexpr(4)
CHUNK = tl.constexpr(64)  # dimensions summed before they are added to the total, which then rounds less often
LOG2E = tl.constexpr(math.log2(math.e))
LOG2_2PI = tl.constexpr(math.log2(2 * math.pi))
OTHERS = 8  # Gaussians that a program compares its own with at once: the most that fit in registers, not measured yet
BLOCKS = 3  # programs per SM
SUMS_OPTIONS = OPTIONS | {"maxnreg": 168}  # for BLOCKS; without the bound ptxas targets 96 and spills a few


@triton.jit(do_not_specialize=["n", "D"])
def _pack_kernel(
    p_mu, p_logvar, p_u, p_l, p_wide, n, d, N, D, PRIOR: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """u and l transposed to [D, N], and whether a Gaussian is too wide, narrow or far for products of four P."""
    i_set, row = (
        (tl.program_id(0) // (N // ROWS)).to(tl.int64),
        tl.program_id(0) % (N // ROWS) * ROWS + tl.arange(0, ROWS),
    )
    wide = tl.zeros([ROWS], tl.int32)
    for start in range(0, D, WIDTH):
        column = start + tl.arange(0, WIDTH)
        mask = (row < n)[:, None] & (column < d)[None, :]
        given = (i_set * n + row)[:, None] * d + column[None, :]
        u = tl.load(p_mu + given, mask=mask, other=0.0).to(tl.float32)
        logvar = tl.load(p_logvar + given, mask=mask, other=0.0).to(tl.float32)
        beyond = (logvar < -20) | (logvar > (9 if PRIOR else 20)) | (tl.abs(u) > 1e4)
        wide = tl.maximum(wide, tl.max(beyond.to(tl.int32), 1))
        # P = 1 in the padding
        l = tl.where(mask, tl.exp(logvar), 0.41421356 if PRIOR else 0.5)
        packed = (i_set * D + column)[:, None] * N + row[None, :]
        inside = (column < D)[:, None] & (row < N)[None, :]
        tl.store(p_u + packed, tl.trans(u), mask=inside)
        tl.store(p_l + packed, tl.trans(l), mask=inside)
    tl.store(p_wide + i_set * N + row, wide)


@triton.jit
def fraction(u_i, l_i, u_j, l_j, PRIOR: tl.constexpr):
    """A and P of one dimension, [others, owned]."""
    apart = u_i[None, :] - u_j[:, None]
    P = l_i[None, :] + l_j[:, None]
    A = apart * apart
    if PRIOR:
        P += l_i[None, :] * l_j[:, None]
        A += (u_i * u_i)[None, :] * l_j[:, None] + (u_j * u_j)[:, None] * l_i[None, :]
    return A, P


@triton.jit
def load_dimension(p_u_i, p_l_i, p_u_j, p_l_j, k, N, M, OTHERS: tl.constexpr, OWNED: tl.constexpr):
    """u_i, l_i [owned] and u_j, l_j [others] in dimension k."""
    i, j = tl.cast(k, tl.int64) * N + tl.arange(0, OWNED), tl.cast(k, tl.int64) * M + tl.arange(0, OTHERS)
    return tl.load(p_u_i + i), tl.load(p_l_i + i), tl.load(p_u_j + j), tl.load(p_l_j + j)


@triton.jit
def _added(h, at, D, N, M, PRIOR: tl.constexpr, GROUP: tl.constexpr, OTHERS: tl.constexpr, OWNED: tl.constexpr):
    """h + Σ_d (A/P + log P), GROUP dimensions at once."""
    for first in range(0, D, CHUNK):
        last = tl.minimum(first + CHUNK, D)
        ratio = tl.zeros([OTHERS, OWNED], tl.float32)
        mantissa = tl.full([OTHERS, OWNED], 1.0, tl.float32)
        exponent = tl.zeros([OTHERS, OWNED], tl.int32)
        for k in range(first, last, GROUP):
            A, P = fraction(*load_dimension(*at, k, N, M, OTHERS, OWNED), PRIOR)
            for more in tl.static_range(1, GROUP):
                A_2, P_2 = fraction(*load_dimension(*at, k + more, N, M, OTHERS, OWNED), PRIOR)
                A = A * P_2 + A_2 * P
                P *= P_2
            ratio += A / P
            bits = P.to(tl.int32, bitcast=True)
            exponent += bits >> 23
            mantissa *= ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
        exponent -= 127 * ((last - first) // GROUP)
        h += ratio * LOG2E + (exponent.to(tl.float32) + tl.log2(mantissa))
    return h


@triton.jit
def log_kernel(
    at,
    wide,
    d,
    D,
    N,
    M,
    ADDITIVE: tl.constexpr,
    PRIOR: tl.constexpr,
    OTHERS: tl.constexpr,
    OWNED: tl.constexpr,
):
    """log k_ij [others, owned]."""
    if ADDITIVE:
        # Σ_d exp ℓ_d = s exp(top), one exponential each
        top = tl.full([OTHERS, OWNED], -float("inf"), tl.float32)
        s = tl.zeros([OTHERS, OWNED], tl.float32)
        for k in range(0, d):
            A, P = fraction(*load_dimension(*at, k, N, M, OTHERS, OWNED), PRIOR)
            l = -0.5 * (A / P * LOG2E + tl.log2(P))
            less = tl.exp2(-tl.abs(l - top))
            s = tl.where(l > top, s * less + 1, s + less)
            top = tl.maximum(top, l)
        return top + tl.log2(s) - tl.log2(tl.cast(d, tl.float32)) - (0.5 + 0.5 * PRIOR) * LOG2_2PI
    h = tl.zeros([OTHERS, OWNED], tl.float32)
    if wide > 0:
        h = _added(h, at, D, N, M, PRIOR, 1, OTHERS, OWNED)
    else:
        h = _added(h, at, D, N, M, PRIOR, GROUP, OTHERS, OWNED)
    return -0.5 * h - d * (0.5 + 0.5 * PRIOR) * LOG2_2PI


@triton.jit
def existing(first_i, first_j, n, m, DIAGONAL: tl.constexpr, OTHERS: tl.constexpr, OWNED: tl.constexpr):
    """Which pairs of a tile exist."""
    i, j = first_i + tl.arange(0, OWNED)[None, :], first_j + tl.arange(0, OTHERS)[:, None]
    there = (i < n) & (j < m)
    return there if DIAGONAL else there & (i != j)


@triton.jit(do_not_specialize=["n", "m", "d", "D"])
def _sums_kernel(
    p_u,
    p_l,
    p_wide,
    p_u_j,
    p_l_j,
    p_wide_j,
    p_parts,
    n,
    m,
    d,
    D,
    N,
    M,
    share,
    WITHIN: tl.constexpr,
    DIAGONAL: tl.constexpr,
    ADDITIVE: tl.constexpr,
    PRIOR: tl.constexpr,
    OTHERS: tl.constexpr,
    OWNED: tl.constexpr,
):
    """Σ k_ij = S 2^top over the owned i of one batch and a share of the j of another (of the same if WITHIN)."""
    i_set, first_i = (tl.program_id(0) // (N // OWNED)).to(tl.int64), tl.program_id(0) % (N // OWNED) * OWNED
    low, high = tl.program_id(1) * share, tl.minimum((tl.program_id(1) + 1) * share, M)
    at_i = i_set * D * N + first_i

    top = tl.full([OWNED], -float("inf"), tl.float32)
    total = tl.zeros([OWNED], tl.float64)
    wide_i = tl.max(tl.load(p_wide + i_set * N + first_i + tl.arange(0, OWNED)), 0)
    for j in range(tl.maximum(low, first_i) if WITHIN else low, high, OTHERS):
        wide = tl.maximum(wide_i, tl.max(tl.load(p_wide_j + i_set * M + j + tl.arange(0, OTHERS)), 0))
        at = p_u + at_i, p_l + at_i, p_u_j + i_set * D * M + j, p_l_j + i_set * D * M + j
        log_k = log_kernel(at, wide, d, D, N, M, ADDITIVE, PRIOR, OTHERS, OWNED)
        log_k = tl.where(existing(first_i, j, n, m, DIAGONAL, OTHERS, OWNED), log_k, -float("inf"))
        higher = tl.maximum(top, tl.max(log_k, 0))
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        # within a batch the tiles above the diagonal also count for those below
        times = ((j >= first_i).to(tl.float64) + (j >= first_i + OWNED)) if WITHIN else 1
        total = total * tl.exp2(top - shift) + times * tl.sum(tl.exp2(log_k - shift[None, :]), 0)
        top = higher

    highest = tl.max(top, 0)
    shift = tl.where(highest == -float("inf"), 0.0, highest)
    part = 2 * (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1))
    tl.store(p_parts + part, highest.to(tl.float64))
    tl.store(p_parts + part + 1, tl.sum(total * tl.exp2(top - shift), 0))


@triton.jit
def _combined(p_parts, parts, BLOCK: tl.constexpr):
    """log Σ_p S_p 2^(M_p) in natural units and float64."""
    part = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], -float("inf"), tl.float64)
    for first in range(0, parts, BLOCK):
        top = tl.maximum(top, tl.load(p_parts + 2 * (first + part), mask=first + part < parts, other=-float("inf")))
    M = tl.max(top, 0)
    M = tl.where(-float("inf") == M, 0.0, M)
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, parts, BLOCK):
        mask = first + part < parts
        exponent = tl.load(p_parts + 2 * (first + part), mask=mask, other=-float("inf")) - M
        total += tl.load(p_parts + 2 * (first + part) + 1, mask=mask, other=0.0) * tl.exp(exponent * 0.6931471805599453)
    return tl.log(tl.sum(total, 0)) + M * 0.6931471805599453


@triton.jit(do_not_specialize=["rr_parts", "gg_parts", "rg_parts", "n", "m"])
def _combine_kernel(
    p_rr,
    p_gg,
    p_rg,
    p_value,
    p_sums,
    rr_parts,
    gg_parts,
    rg_parts,
    n,
    m,
    LOG: tl.constexpr,
    UNBIASED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_set = tl.program_id(0).to(tl.int64)
    rr = _combined(p_rr + 2 * i_set * rr_parts, rr_parts, BLOCK)
    gg = _combined(p_gg + 2 * i_set * gg_parts, gg_parts, BLOCK)
    rg = _combined(p_rg + 2 * i_set * rg_parts, rg_parts, BLOCK)
    tl.store(p_sums + 3 * i_set, rr)
    tl.store(p_sums + 3 * i_set + 1, gg)
    tl.store(p_sums + 3 * i_set + 2, rg)

    n, m = tl.cast(n, tl.float64), tl.cast(m, tl.float64)
    rr, gg, rg = rr - tl.log(n * (n - UNBIASED)), gg - tl.log(m * (m - UNBIASED)), rg - tl.log(n * m)
    value = rr + gg - 2 * rg if LOG else tl.exp(rr) + tl.exp(gg) - 2 * tl.exp(rg)
    tl.store(p_value + i_set, value)


class Batch(NamedTuple):
    """Transposed Gaussians, `[sets, D, N]` except `wide` `[sets, N]`."""

    u: torch.Tensor
    l: torch.Tensor
    wide: torch.Tensor
    n: int
    N: int


def pack(mu, logvar, prior) -> tuple[Batch, int]:
    sets, (n, d) = mu.shape[:-2].numel(), mu.shape[-2:]
    N, D = triton.cdiv(n, OWNED) * OWNED, triton.cdiv(d, 4) * 4
    u, l = (torch.empty(sets, D, N, dtype=torch.float32, device=mu.device) for _ in range(2))
    wide = torch.empty(sets, N, dtype=torch.int32, device=mu.device)
    _pack_kernel[sets * (N // PACK_ROWS),](
        *(mu.contiguous(), logvar.contiguous(), u, l, wide, n, d, N, D, prior, PACK_ROWS, PACK_WIDTH), **on(mu, OPTIONS)
    )
    return Batch(u, l, wide, n, N), D


def forward(mu_r, logvar_r, mu_g, logvar_g, additive, prior, log, unbiased):
    """D `[...]` and log Σk over the pairs (r, r'), (g, g') and (r, g) `[..., 3]`."""
    check_dtype("as_distance", mu_r)
    batch, d = mu_r.shape[:-2], mu_r.shape[-1]
    value = torch.empty(batch, dtype=torch.float32, device=mu_r.device)
    sums = torch.empty(*batch, 3, dtype=torch.float64, device=mu_r.device)
    sets = value.numel()
    if sets == 0:
        return value, sums
    (r, D), (g, _) = pack(mu_r, logvar_r, prior), pack(mu_g, logvar_g, prior)
    parts = []
    for own, other in ((r, r), (g, g), (r, g)):
        programs = own.N // OWNED
        splits, share = shares(other.N // OTHERS, sets * programs, mu_r.device, BLOCKS)
        parts.append(torch.empty(sets, programs * splits, 2, dtype=torch.float64, device=mu_r.device))
        _sums_kernel[sets * programs, splits](
            *(*own[:3], *other[:3], parts[-1], own.n, other.n, d, D, own.N, other.N, share * OTHERS),
            *(own is other, own is not other or not unbiased, additive, prior, OTHERS, OWNED),
            **on(mu_r, SUMS_OPTIONS),
        )
    _combine_kernel[sets,](
        *(*parts, value, sums, *(part.shape[1] for part in parts), r.n, g.n, log, unbiased, PARTS), **on(mu_r, OPTIONS)
    )
    return value, sums
