"""Median heuristic in Triton: the exact median of all squared distances, and its gradient.

Up to SMALL particles, one program holds all distances of a set and finds the ranks by bisection on their bits. Larger
sets are selected in passes (selection.py).
"""

import torch
import triton
import triton.language as tl

from .card import on
from .far import CUT, differences, direct_half_distances, half_distances_of_row
from .median_pairs import apart_kernel
from .particles import (
    OPTIONS,
    check_dtype,
    exact,
    half_diagonal,
    half_distances,
    mark_of,
    mean_of_rows,
    pack,
    padded,
    within,
)
from .selection import (
    TILE,
    TILE_OPTIONS,
    Ranks,
    bits_of,
    bits_of_pairs,
    rank_of,
    select,
    shows,
    tiles,
    value_of,
    width,
)

SMALL = 64  # one tile without spills; not measured yet
SMALL_OPTIONS = OPTIONS | {"num_stages": 1}  # two spill on sm_80


@triton.jit
def median2(m_0, m_1, SQUARED: tl.constexpr):
    if SQUARED:
        return 0.5 * (m_0 + m_1)
    root = 0.5 * (tl.sqrt(m_0) + tl.sqrt(m_1))
    return root * root


@triton.jit
def _slope(m, other, SQUARED: tl.constexpr):
    """∂med²/∂m, 0 where m is 0: there is no direction between equal particles."""
    if SQUARED:
        return tl.where(m > 0, 0.5, 0.0)
    return tl.where(m > 0, 0.25 * (1 + tl.sqrt(other / tl.where(m > 0, m, 1.0))), 0.0)


@triton.jit
def bandwidth(m_0, m_1, spread, divisor, SQUARED: tl.constexpr):
    """med²/divisor. `spread` replaces a median of 0, and is NaN if a particle is. The bits 1 are of a distance whose
    square float32 does not hold, which gives 0, no bandwidth."""
    med2 = median2(m_0, m_1, SQUARED)
    held = (bits_of(m_1) != 1) | (spread != spread)
    med2 = tl.where((med2 > 0) & (spread == spread), med2, spread)
    return tl.where(held, tl.where(med2 == 0, 1.0, med2 / divisor), 0.0)


@triton.jit
def _centred(p_x, i_set, n, d, start, N: tl.constexpr, WIDTH: tl.constexpr):
    """[N, WIDTH] of one set, and the same centred and cut, 0 outside."""
    row, column = tl.arange(0, N), start + tl.arange(0, WIDTH)
    mask = (row < n)[:, None] & (column < d)[None, :]
    x = tl.load(p_x + (i_set * n + row)[:, None] * d + column[None, :], mask=mask, other=0.0).to(tl.float32)
    return x, within(tl.where(mask, x - mean_of_rows(x, n)[None, :], 0.0), -CUT, CUT)


@triton.jit
def _small_distances(p_x, i_set, n, d, D: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr):
    """The bits of d²_ij [N, N] for j < i < n, elsewhere the largest number; the mean of d²_i0; whether rows are far."""
    xx, spread, mark = tl.zeros([N, N], tl.float32), tl.zeros([N], tl.float32), tl.zeros([N], tl.int32)
    i = tl.arange(0, N)
    for start in range(0, D, WIDTH):
        x, X = _centred(p_x, i_set, n, d, start, N, WIDTH)
        xx = tl.dot(X, tl.trans(X), xx, input_precision=PRECISION)
        mark += mark_of(X, start + tl.arange(0, WIDTH))
        apart = x - tl.sum(tl.where(i[:, None] == 0, x, 0.0), 0)[None, :]
        spread += tl.sum(apart * apart, 1)
    q = half_diagonal(xx)
    pair = (i[None, :] < i[:, None]) & (i < n)[:, None]
    u = half_distances(xx, q, q, mark, mark)
    far = shows(u, q[:, None] + q[None, :], pair, 0.0)
    if far:
        u = direct_half_distances(p_x + i_set * n * d, p_x + i_set * n * d, n, n, d, N, N)
    bits = tl.where(pair, bits_of_pairs(u, mark[:, None] != mark[None, :]), 0x7FFFFFFF)
    # q is NaN for a particle that is not finite, because its columns' means are not finite either
    return bits, tl.sum(tl.where(i < n, spread + 0.0 * q, 0.0), 0) / n, far


@triton.jit
def small_middles(bits, rank_0, rank_1):
    """The numbers of two ranks that are equal or adjacent; 0 for a negative rank."""
    second = tl.where(rank_1 < 0, 0, rank_of(bits, tl.maximum(rank_1, 0)))
    flat = tl.ravel(bits)
    less = flat < second
    before = tl.max(tl.where(less, flat, 0), 0)
    is_before = (rank_0 < 0) | (tl.sum(less.to(tl.int32), 0) > rank_0)
    return value_of(tl.where(is_before, before, second)), value_of(second)


@triton.jit(do_not_specialize=["n", "rank_0", "rank_1"])
def _small_kernel(
    p_x,
    p_h,
    p_middles,
    n,
    d,
    rank_0,
    rank_1,
    divisor,
    SQUARED: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_set = tl.program_id(0).to(tl.int64)

    bits, spread, _ = _small_distances(p_x, i_set, n, d, D, N, WIDTH, PRECISION)
    m_0, m_1 = small_middles(bits, rank_0, rank_1)

    h = bandwidth(m_0, m_1, spread, divisor, SQUARED)
    tl.store(p_middles + 2 * i_set, tl.where(h == h, m_0, h))
    tl.store(p_middles + 2 * i_set + 1, tl.where(h == h, m_1, h))
    tl.store(p_h + i_set, h)


@triton.jit(do_not_specialize=["n"])
def _small_backward_kernel(
    p_grad,
    p_x,
    p_middles,
    p_dx,
    n,
    d,
    divisor,
    SQUARED: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_set, row = tl.program_id(0).to(tl.int64), tl.arange(0, N)
    m_0, m_1 = tl.load(p_middles + 2 * i_set), tl.load(p_middles + 2 * i_set + 1)
    grad = tl.load(p_grad + i_set) / divisor + 0.0 * m_0  # NaN if a particle is

    # c_ij, the share of a pair in the two middles: tied pairs share
    bits, _, far = _small_distances(p_x, i_set, n, d, D, N, WIDTH, PRECISION)
    is_0, is_1 = (bits == bits_of(m_0)).to(tl.float32), (bits == bits_of(m_1)).to(tl.float32)
    share_0 = grad * _slope(m_0, m_1, SQUARED) / tl.maximum(tl.sum(tl.sum(is_0, 1), 0), 1.0)
    share_1 = grad * _slope(m_1, m_0, SQUARED) / tl.maximum(tl.sum(tl.sum(is_1, 1), 0), 1.0)
    c = share_0 * is_0 + share_1 * is_1
    c += tl.trans(c)
    total = tl.sum(c, 1)

    # ∂h/∂x_i = Σ_j c_ij 2(x_i − x_j)
    if far:
        p_set = p_x + i_set * n * d
        for k in tl.range(0, d, num_stages=1):
            apart = differences(p_set, p_set, n, n, d, k, N, N)
            dx_k = 2 * tl.sum(tl.where(c == 0, 0.0, c * apart), 1)
            tl.store(p_dx + (i_set * n + row) * d + k, dx_k, mask=row < n)
    else:
        for start in range(0, D, WIDTH):
            _x, X = _centred(p_x, i_set, n, d, start, N, WIDTH)
            dx = 2 * (total[:, None] * X - tl.dot(c, X, input_precision=PRECISION))
            column = start + tl.arange(0, WIDTH)
            mask = (row < n)[:, None] & (column < d)[None, :]
            tl.store(p_dx + (i_set * n + row)[:, None] * d + column[None, :], dx, mask=mask)


@triton.jit(do_not_specialize=["n"])
def _finish_kernel(
    p_x,
    p_q,
    p_window,
    p_h,
    p_middles,
    n,
    d,
    N,
    divisor,
    SQUARED: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    TWO: tl.constexpr,
):
    i_set = tl.program_id(0).to(tl.int64)
    m_0 = value_of(tl.load(p_window + 4 * i_set))
    m_1 = value_of(tl.load(p_window + 4 * i_set + 2)) if TWO else m_0
    med2 = median2(m_0, m_1, SQUARED)

    # the mean of d²_i0 replaces a median of 0; a NaN is in the centre and so in every q
    spread = tl.zeros([TILE], tl.float32) + 0.0 * tl.load(p_q + i_set * N)
    p_set = p_x + i_set * n * d
    for first in range(0, tl.where(med2 > 0, 0, n), TILE):
        row = first + tl.arange(0, TILE)
        u = half_distances_of_row(p_set, 0, p_set, row, n, d, WIDTH)
        spread += tl.where(row < n, 2 * u, 0.0)

    h = bandwidth(m_0, m_1, tl.sum(spread, 0) / n, divisor, SQUARED)
    tl.store(p_middles + 2 * i_set, tl.where(h == h, m_0, h))
    tl.store(p_middles + 2 * i_set + 1, tl.where(h == h, m_1, h))
    tl.store(p_h + i_set, h)


def _small_shape(n: int, d: int) -> tuple[int, int, int]:
    """D, N, and width of the products."""
    return padded(d), max(16, triton.next_power_of_2(n)), width(padded(d))


def forward(x, full, squared, divisor):
    """h `[...]` and the two middle squared distances `[..., 2]`."""
    check_dtype("median_bandwidth", x)
    (n, d), ranks = x.shape[-2:], Ranks.of(x.shape[-2], full)
    h = torch.empty(x.shape[:-2], dtype=torch.float32, device=x.device)
    middles = torch.empty(*x.shape[:-2], 2, dtype=torch.float32, device=x.device)
    if h.numel() == 0:
        return h, middles
    if n <= SMALL:
        shape = _small_shape(n, d)
        arguments = x.contiguous(), h, middles, n, d, ranks.first, ranks.second, divisor
        _small_kernel[h.numel(),](*arguments, squared, *shape, exact(x.device), **on(x, SMALL_OPTIONS))
        return h, middles

    packed = pack(x, exact(x.device), width(padded(d)))
    window = select(packed, ranks)
    _finish_kernel[packed.sets,](
        *(packed.x, packed.q, window, h, middles, n, d, packed.N, divisor),
        *(squared, TILE, width(packed.D), ranks.first < ranks.second),
        **on(x, OPTIONS),
    )
    return h, middles


def backward(grad, x, middles, squared, divisor):
    """∂L/∂x, given grad = ∂L/∂h `[...]`."""
    check_dtype("median_bandwidth_backward", x)
    n, d = x.shape[-2:]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if grad.numel() == 0:
        return dx
    grad, middles = grad.contiguous(), middles.contiguous()
    if n <= SMALL:
        shape = _small_shape(n, d)
        arguments = grad, x.contiguous(), middles, dx, n, d, divisor
        _small_backward_kernel[grad.numel(),](*arguments, squared, *shape, exact(x.device), **on(x, SMALL_OPTIONS))
        return dx

    packed = pack(x, exact(x.device), width(padded(d)))
    sets, N, D = packed.sets, packed.N, packed.D
    apart = torch.zeros(2, sets, N, D, dtype=torch.float32, device=x.device)
    count = torch.zeros(2, sets, N, dtype=torch.int32, device=x.device)
    read = tiles(packed)
    for far in (False, True):
        apart_kernel[sets * (N // TILE), 2](
            *(*read, middles, apart, count, sets, n, d, N, far, D, TILE, width(D), exact(x.device)),
            **on(x, TILE_OPTIONS),
        )
    # ∂h/∂x_i = Σ_a (∂h/∂m_a) · mean of 2 (x_i − x_j) over the pairs at distance m_a
    m = middles.view(sets, 2).T
    slope = 0.5 + 0 * m if squared else 0.25 * (1 + (m.flip(0) / m).sqrt())
    share = torch.where(m == 0, 0.0, slope) * grad.view(sets) / divisor / count.sum(-1).clamp_min(1)
    dx.copy_((2 * share[..., None, None] * apart).sum(0)[:, :n, :d].reshape(x.shape))
    return dx
