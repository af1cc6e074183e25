"""The gradient of the AS-Distance and its log-sums in Triton.

With w_ij = (∂L/∂log Σk) k_ij/Σk, per dimension for the additive kernel, and c = 1, or 1 + l_j for the prior,
  t = δ/P, or (δ + u_i l_j)/P,  ∂u_i = −Σ_j w t,  ∂log l_i = ½ l_i Σ_j w (t² − c/P),
in the notation of `as_distance`.
"""

import torch
import triton
import triton.language as tl

from .as_distance import (
    LOG2_2PI,
    LOG2E,
    OWNED,
    PACK_ROWS,
    PACK_WIDTH,
    existing,
    fraction,
    load_dimension,
    log_kernel,
    pack,
)
from .card import on
from .particles import OPTIONS, check_dtype, shares

OTHERS = 8  # see `as_distance`
BLOCKS = 2  # programs per SM
GRADIENT_OPTIONS = OPTIONS | {"maxnreg": 192}  # for BLOCKS; without the bound ptxas spills a few registers


@triton.jit(do_not_specialize=["sets", "n", "m", "d", "D"])
def _gradient_kernel(
    p_u,
    p_l,
    p_wide,
    p_u_j,
    p_l_j,
    p_wide_j,
    p_sums,
    p_dvalue,
    p_dsums,
    p_du,
    p_dl,
    sets,
    n,
    m,
    d,
    D,
    N,
    M,
    share,
    KIND: tl.constexpr,
    LOG: tl.constexpr,
    DIAGONAL: tl.constexpr,
    ADDITIVE: tl.constexpr,
    PRIOR: tl.constexpr,
    OTHERS: tl.constexpr,
    OWNED: tl.constexpr,
):
    """Add Σ_j w t and Σ_j w (t² − c/P) over pairs of KIND 0 (r, r'), 1 (g, g') or 2 (r, g) to p_du and p_dl."""
    i_set, first_i = (tl.program_id(0) // (N // OWNED)).to(tl.int64), tl.program_id(0) % (N // OWNED) * OWNED
    low, high = tl.program_id(1) * share, tl.minimum((tl.program_id(1) + 1) * share, M)
    at_i = i_set * D * N + first_i
    part = tl.program_id(1).to(tl.int64) * sets * D * N + at_i
    # ∂L/∂log Σk; within a batch a pair (i, j) occurs twice
    log_sum = tl.load(p_sums + 3 * i_set + KIND)
    factor = tl.zeros([], tl.float64)
    if p_dsums is not None:
        factor += tl.load(p_dsums + 3 * i_set + KIND)
    if p_dvalue is not None:
        pairs = tl.cast(n, tl.float64) * (m if DIAGONAL else m - 1)
        factor += (-2 if KIND == 2 else 1) * tl.load(p_dvalue + i_set) * (1.0 if LOG else tl.exp(log_sum) / pairs)
    # to base 2 and without constants; what rounding it takes away is in the weight, so that shares add up to 1
    log2_sum = log_sum * 1.4426950408889634
    if ADDITIVE:
        log2_sum += tl.log2(tl.cast(d, tl.float32)) + (0.5 + 0.5 * PRIOR) * LOG2_2PI
    shift = log2_sum.to(tl.float32)
    lost = tl.exp((shift.to(tl.float64) - log2_sum) * 0.6931471805599453)
    weight = ((1 if KIND == 2 else 2) * factor * lost).to(tl.float32)

    wide_i = tl.max(tl.load(p_wide + i_set * N + first_i + tl.arange(0, OWNED)), 0)
    for j in range(low, high, OTHERS):
        wide = tl.maximum(wide_i, tl.max(tl.load(p_wide_j + i_set * M + j + tl.arange(0, OTHERS)), 0))
        at = p_u + at_i, p_l + at_i, p_u_j + i_set * D * M + j, p_l_j + i_set * D * M + j
        pair = existing(first_i, j, n, m, DIAGONAL, OTHERS, OWNED)
        if ADDITIVE:
            w = weight
        else:
            log_k = log_kernel(at, wide, d, D, N, M, ADDITIVE, PRIOR, OTHERS, OWNED)
            w = weight * tl.exp2(tl.where(pair, log_k - shift, -1000.0))
        for k in range(0, d):
            u_i, l_i, u_j, l_j = load_dimension(*at, k, N, M, OTHERS, OWNED)
            A, P = fraction(u_i, l_i, u_j, l_j, PRIOR)
            inverse = 1 / P
            w_k = w
            if ADDITIVE:
                l = -0.5 * (A * inverse * LOG2E + tl.log2(P))
                w_k = w * tl.exp2(tl.where(pair, l - shift, -1000.0))
            if PRIOR:
                t, c = (u_i[None, :] - u_j[:, None] + u_i[None, :] * l_j[:, None]) * inverse, 1 + l_j[:, None]
            else:
                t, c = (u_i[None, :] - u_j[:, None]) * inverse, 1.0
            to = part + tl.cast(k, tl.int64) * N + tl.arange(0, OWNED)
            tl.store(p_du + to, tl.load(p_du + to) + tl.sum(w_k * t, 0))
            tl.store(p_dl + to, tl.load(p_dl + to) + tl.sum(w_k * (t * t - c * inverse), 0))


@triton.jit(do_not_specialize=["sets", "n", "D", "parts"])
def _finish_kernel(p_l, p_du, p_dl, p_dmu, p_dlogvar, sets, n, d, N, D, parts, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """∂u = −Σ_j w t and ∂log l = ½ l Σ_j w (t² − c/P), transposed back."""
    i_set, row = (
        (tl.program_id(0) // (N // ROWS)).to(tl.int64),
        tl.program_id(0) % (N // ROWS) * ROWS + tl.arange(0, ROWS),
    )
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    packed, inside = (i_set * D + column)[:, None] * N + row[None, :], (column < d)[:, None] & (row < n)[None, :]
    given, mask = (i_set * n + row)[:, None] * d + column[None, :], (row < n)[:, None] & (column < d)[None, :]

    l = tl.load(p_l + packed, mask=inside, other=0.0)
    du, dl = tl.zeros([WIDTH, ROWS], tl.float32), tl.zeros([WIDTH, ROWS], tl.float32)
    for i_part in range(parts):
        part = tl.cast(i_part, tl.int64) * sets * D * N
        du += tl.load(p_du + part + packed, mask=inside, other=0.0)
        dl += tl.load(p_dl + part + packed, mask=inside, other=0.0)

    tl.store(p_dmu + given, tl.trans(-du), mask=mask)
    tl.store(p_dlogvar + given, tl.trans(0.5 * l * dl), mask=mask)


def backward(mu_r, logvar_r, mu_g, logvar_g, sums, dvalue, dsums, additive, prior, log, unbiased):
    """∂mu_r, ∂logvar_r, ∂mu_g and ∂logvar_g, given the gradients of forward's results; None means zeros."""
    check_dtype("as_distance_backward", mu_r)
    gradients = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (mu_r, logvar_r, mu_g, logvar_g)]
    sets, d = mu_r.shape[:-2].numel(), mu_r.shape[-1]
    if sets == 0:
        return tuple(gradients)
    given = [t if t is None else t.contiguous() for t in (sums, dvalue, dsums)]
    (r, D), (g, _) = pack(mu_r, logvar_r, prior), pack(mu_g, logvar_g, prior)
    for side, own in enumerate((r, g)):
        programs = own.N // OWNED
        pairs = [(own, side), ((g, r)[side], 2)]
        split = [shares(other.N // OTHERS, sets * programs, mu_r.device, BLOCKS) for other, _ in pairs]
        du, dl = torch.zeros(
            2, sum(splits for splits, _ in split), sets, D, own.N, dtype=torch.float32, device=mu_r.device
        )
        first = 0
        for (other, kind), (splits, share) in zip(pairs, split, strict=True):
            _gradient_kernel[sets * programs, splits](
                *(*own[:3], *other[:3], *given, du[first:], dl[first:], sets, own.n, other.n, d, D, own.N, other.N),
                *(share * OTHERS, kind, log, kind == 2 or not unbiased, additive, prior, OTHERS, OWNED),
                **on(mu_r, GRADIENT_OPTIONS),
            )
            first += splits
        _finish_kernel[sets * (own.N // PACK_ROWS), triton.cdiv(d, PACK_WIDTH)](
            *(own.l, du, dl, *gradients[2 * side : 2 * side + 2], sets, own.n, d, own.N, D, first),
            *(PACK_ROWS, PACK_WIDTH),
            **on(mu_r, OPTIONS),
        )
    return tuple(gradients)
