"""Order statistics of all squared distances of a particle set in Triton, without storing the distances.

Squared distances are not negative, so their float32 bits sort like integers. Every pass recomputes the distances and
counts those below a window and those in each of its BINS equal bins. The window then narrows to the bin that holds the
rank, until a bin is one number wide: eleven bits per pass, so three passes from [0, 2³¹). A window around the quantile
of a sample saves one pass; if it misses the rank, the following passes start over on the side where the rank is. The
number of passes is fixed, and a pass without work returns at once, so the host never waits.

All passes compute a distance by the same instructions, always accurate to float32, so that ranks agree and backward
finds the pairs. Counts are integers, so the order of atomic additions does not matter.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .card import on
from .far import HUGE, direct_half_distances
from .particles import OPTIONS, ROWS, Packed, add_product, exact, half_distances

# Nothing here is measured yet.
TILE, SEGMENT = ROWS, 16  # a counting program processes TILE rows by up to SEGMENT tiles of TILE columns
# for every kernel with tiles of pairs: with four warps, which would not do products twice, counting spills
TILE_OPTIONS = OPTIONS | {"num_warps": 8}
BINS = 2048
# Pairs from which a sample is drawn. Without one, the first pass adds every pair atomically to one of few bins, which
# hold an exponent and three digits: at d = 64, a quarter of the pairs to the fullest. A window around the sample's
# quantile holds a tenth to a quarter of the pairs, and no bin more than one in a hundred, unless distances tie.
SAMPLED = 1 << 15
SAMPLES, MANY, MANY_SAMPLES = 1 << 12, 1 << 20, 1 << 14  # sampled pairs; of many pairs, more
SAMPLE_ROWS = 64
FEW_OPTIONS = BRACKET_OPTIONS = OPTIONS | {"num_warps": 16}
DEVIATIONS = 4  # of a sampled median's rank, on either side
FEW, FEW_MARGIN = 512, 6 * 0.5 * math.sqrt(512)  # pairs for a lower bound of the median
# Products lose about 2^-22 of the norms q_i + q_j, and three times that in 4096 dimensions where tensor cores cut sums:
# 2e-5 of a u that is a larger share of them
SHARE = tl.constexpr(2.0**-5)


@triton.jit
def bits_of(d2):
    return tl.maximum(d2, 0.0).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def value_of(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def rank_of(bits, k):
    """The number of rank k >= 0 among the bits, a tensor of any shape."""
    found = tl.full([], 0, tl.int32)
    for step in range(31):
        candidate = found | (1 << (30 - step))
        found = tl.where(tl.sum((tl.ravel(bits) < candidate).to(tl.int32), 0) <= k, candidate, found)
    return found


@triton.jit
def _sampled(p_x, i_set, pair, n, d, WIDTH: tl.constexpr):
    """Squared distances of pairs spread over the set by a fixed sequence."""
    i = (tl.randint(1, pair).to(tl.int32) & 0x7FFFFFFF) % n
    j = (i + 1 + (tl.randint(2, pair).to(tl.int32) & 0x7FFFFFFF) % tl.maximum(n - 1, 1)) % n
    d2 = tl.zeros(pair.shape, tl.float32)
    for start in range(0, d, WIDTH):
        column = start + tl.arange(0, WIDTH)[None, :]
        apart = tl.load(p_x + (i_set * n + i)[:, None] * d + column, mask=column < d, other=0.0).to(tl.float32)
        apart -= tl.load(p_x + (i_set * n + j)[:, None] * d + column, mask=column < d, other=0.0).to(tl.float32)
        d2 += tl.sum(apart * apart, 1)
    return d2


@triton.jit(do_not_specialize=["n"])
def _sample_kernel(p_x, p_sample, n, d, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    i_set = tl.program_id(0).to(tl.int64)
    pair = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    d2 = _sampled(p_x, i_set, pair, n, d, WIDTH)
    tl.store(p_sample + i_set * tl.num_programs(1) * ROWS + pair, d2)


@triton.jit(do_not_specialize=["n", "rank"])
def _lost_kernel(p_x, p_lost, n, d, rank, FEW: tl.constexpr, WIDTH: tl.constexpr):
    """The norms q_i + q_j above which products may lose what matters beside the median."""
    i_set = tl.program_id(0).to(tl.int64)
    bits = bits_of(_sampled(p_x, i_set, tl.arange(0, FEW), n, d, WIDTH))
    low = tl.full([], 0, tl.int32)
    for step in range(10):  # exponent and two digits of a distance below the median
        candidate = low | (1 << (30 - step))
        low = tl.where(tl.sum((bits < candidate).to(tl.int32), 0) <= rank, candidate, low)
    tl.store(p_lost + i_set, tl.minimum(value_of(low) / (2 * SHARE), HUGE))


@triton.jit
def _shift(span, BINS: tl.constexpr):
    """The smallest s for which BINS bins of 2^s numbers cover a span of numbers."""
    return tl.sum(((tl.full([32], BINS, tl.int64) << tl.arange(0, 32).to(tl.int64)) < span).to(tl.int32), 0)


@triton.jit(do_not_specialize=["low_rank", "high_rank"])
def _bracket_kernel(p_sample, p_window, low_rank, high_rank, SAMPLES: tl.constexpr, BINS: tl.constexpr):
    """The window for both ranks: between two ranks of the sample."""
    i_set = tl.program_id(0).to(tl.int64)
    bits = bits_of(tl.load(p_sample + i_set * SAMPLES + tl.arange(0, SAMPLES)))
    low, high = rank_of(bits, low_rank), rank_of(bits, high_rank)
    shift = _shift(high.to(tl.int64) - low + 1, BINS)
    target = tl.arange(0, 2)
    tl.store(p_window + 4 * i_set + 2 * target, low + 0 * target)
    tl.store(p_window + 4 * i_set + 2 * target + 1, shift + 0 * target)


@triton.jit
def shows(u, norms, pair, lost):
    """Whether rounding of the norms shows in any of these distances; NaN does."""
    certain = (norms <= lost) | ((u >= SHARE * norms) & (norms < HUGE))
    return tl.max(tl.ravel((pair & ~certain).to(tl.int32)), 0) > 0


@triton.jit
def bits_of_pairs(u, differ):
    """The bits of d²; rows that differ, but by less than float32 holds squared, are not at distance 0."""
    return tl.maximum(bits_of(2 * u), differ.to(tl.int32))


@triton.jit
def tile_distances(
    p_x,
    p_X,
    p_q,
    p_mark,
    p_reach,
    p_lost,
    i_set,
    i,
    j,
    n,
    d,
    N,
    DIRECT: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """u between the tiles of rows starting at i and j <= i, which entries are pairs of particles, which differ, and
    whether the tile is one of far rows, which needs differences: u has them if DIRECT."""
    base, xx = i_set * N, tl.zeros([TILE, TILE], tl.float32)
    xx = add_product(xx, p_X + (base + i) * D, p_X + (base + j) * D, D, WIDTH, PRECISION)
    row, column = i + tl.arange(0, TILE), j + tl.arange(0, TILE)
    q_i, q_j = tl.load(p_q + base + row), tl.load(p_q + base + column)
    mark_i, mark_j = tl.load(p_mark + base + row), tl.load(p_mark + base + column)
    u = half_distances(xx, q_i, q_j, mark_i, mark_j)
    pair = (column[None, :] < row[:, None]) & (row < n)[:, None]
    lost = tl.load(p_lost + i_set)
    far = tl.load(p_reach + (base + i) // TILE) + tl.load(p_reach + (base + j) // TILE) > lost
    if far:
        far = shows(u, q_i[:, None] + q_j[None, :], pair, lost)
    if DIRECT:  # noqa: SIM102 (decided when it is compiled)
        if far:
            u = direct_half_distances(p_x + (i_set * n + i) * d, p_x + (i_set * n + j) * d, n - i, n - j, d, TILE, TILE)
    return u, pair, mark_i[:, None] != mark_j[None, :], far


@triton.jit
def _count_target(bits, pair, p_counts, low, shift, BINS: tl.constexpr):
    """Count into the bins; return how many in each row are below them."""
    bin = (bits - low) >> tl.maximum(shift, 0)
    inside = (pair & (bits >= low) & (bin < tl.where(shift < 0, 0, BINS))).to(tl.int1)
    tl.atomic_add(p_counts + bin, tl.full(bits.shape, 1, p_counts.dtype.element_ty), mask=inside, sem="relaxed")
    return tl.sum((pair & (bits < low)).to(tl.int32), 1)


@triton.jit(do_not_specialize=["n"])
def _count_kernel(
    p_x,
    p_X,
    p_q,
    p_mark,
    p_reach,
    p_lost,
    p_window,
    p_counts,
    n,
    d,
    N,
    D: tl.constexpr,
    TILE: tl.constexpr,
    SEGMENT: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BINS: tl.constexpr,
    TWO: tl.constexpr,
):
    i_set, i_tile = (tl.program_id(0) // (N // TILE)).to(tl.int64), tl.program_id(0) % (N // TILE)
    p_window += 4 * i_set
    p_counts += i_set * (2 * BINS + 2)
    low_0, shift_0 = tl.load(p_window), tl.load(p_window + 1)
    low_1, shift_1 = tl.load(p_window + 2), tl.load(p_window + 3)

    first = tl.program_id(1) * SEGMENT
    end = tl.minimum(first + SEGMENT, i_tile + 1)
    done = (shift_0 < 0) & (shift_1 < 0) if TWO else shift_0 < 0
    end = tl.where(done, first, end)
    below_0, below_1 = tl.zeros([TILE], tl.int32), tl.zeros([TILE], tl.int32)
    for j_tile in range(first, end):
        u, pair, differ, _far = tile_distances(
            *(p_x, p_X, p_q, p_mark, p_reach, p_lost, i_set, i_tile * TILE, j_tile * TILE),
            *(n, d, N, True, D, TILE, WIDTH, PRECISION),
        )
        bits = bits_of_pairs(u, differ)
        below_0 += _count_target(bits, pair, p_counts, low_0, shift_0, BINS)
        if TWO:
            below_1 += _count_target(bits, pair, p_counts + BINS + 1, low_1, shift_1, BINS)

    if end > first:
        tl.atomic_add(p_counts + BINS, tl.sum(below_0, 0).to(p_counts.dtype.element_ty), sem="relaxed")
        if TWO:
            tl.atomic_add(p_counts + 2 * BINS + 1, tl.sum(below_1, 0).to(p_counts.dtype.element_ty), sem="relaxed")


@triton.jit(do_not_specialize=["rank_0", "rank_1"])
def _narrow_kernel(p_counts, p_window, rank_0, rank_1, BINS: tl.constexpr):
    """The next window for one rank, from the counts in the last one; resets the counts to 0."""
    i_set, target = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p_window += 4 * i_set + 2 * target
    p_counts += i_set * (2 * BINS + 2) + target * (BINS + 1)
    low, shift = tl.load(p_window).to(tl.int64), tl.load(p_window + 1)
    bin = tl.arange(0, BINS)
    counts = tl.load(p_counts + bin).to(tl.int64)
    rank = tl.where(target == 0, rank_0, rank_1) - tl.load(p_counts + BINS).to(tl.int64)

    active, one = tl.maximum(shift, 0).to(tl.int64), tl.full([], 1, tl.int64)
    chosen = tl.sum((tl.cumsum(counts, 0) <= rank).to(tl.int64), 0)
    above = chosen == BINS
    span = tl.where(above, 2147483648 - low - (chosen << active), one << active)
    span = tl.where(rank < 0, low, span)
    found = (rank >= 0) & (chosen < BINS) & (shift == 0)
    low = tl.where(rank < 0, 0, low + (chosen << active))

    tl.store(p_window, low.to(tl.int32), mask=shift >= 0)
    tl.store(p_window + 1, tl.where(found, -1, _shift(span, BINS)), mask=shift >= 0)
    tl.store(p_counts + bin, tl.zeros([BINS], p_counts.dtype.element_ty))
    tl.store(p_counts + BINS, tl.zeros([], p_counts.dtype.element_ty))


class Ranks(NamedTuple):
    """Ranks of the two middles among the n(n−1)/2 squared distances; −1 for a 0 on the full matrix's diagonal."""

    first: int
    second: int
    pairs: int

    @classmethod
    def of(cls, n: int, full: bool) -> "Ranks":
        pairs = n * (n - 1) // 2
        count = n * n if full else pairs
        if n == 1:
            return cls(-1, -1, 0)
        first, second = (count - 1) // 2, count // 2
        return (
            cls(*((k - n) // 2 if k >= n else -1 for k in (first, second)), pairs)
            if full
            else cls(first, second, pairs)
        )


def width(D: int) -> int:
    return min(D, 16)


def tiles(packed: Packed) -> tuple[Tensor, ...]:
    """What every pass reads of the particles."""
    lost, ranks = packed.q.new_empty(packed.sets), Ranks.of(packed.n, True)  # the lower of either form
    rank = max(0, math.floor(FEW * ranks.first / max(ranks.pairs, 1) - FEW_MARGIN))
    _lost_kernel[packed.sets,](packed.x, lost, packed.n, packed.d, rank, FEW, width(packed.D), **on(lost, FEW_OPTIONS))
    return packed.x, packed.X, packed.q, packed.mark, packed.reach, lost


def select(packed: Packed, ranks: Ranks) -> Tensor:
    """`[sets, 2, 2]`: the bits of the squared distance of each rank, and −1."""
    sets, n, N, D, device = packed.sets, packed.n, packed.N, packed.D, packed.X.device
    window, two, read = _window(packed, ranks), ranks.first < ranks.second, tiles(packed)
    counts = torch.zeros(sets, 2, BINS + 1, dtype=torch.int32 if ranks.pairs < 2**31 else torch.int64, device=device)
    grid = sets * (N // TILE), triton.cdiv(N // TILE, SEGMENT)
    for _ in range(4 if ranks.pairs >= SAMPLED else 3):
        _count_kernel[grid](
            *(*read, window, counts, n, packed.d, N, D, TILE, SEGMENT, width(D), exact(device), BINS, two),
            **on(packed.x, TILE_OPTIONS),
        )
        _narrow_kernel[sets, 1 + two](counts, window, ranks.first, ranks.second, BINS, **on(counts, OPTIONS))
    return window


def _window(packed, ranks):
    """The first window to search: `[sets, 2, 2]`, the lowest bits and the logarithm of a bin's width."""
    window = torch.zeros(packed.sets, 2, 2, dtype=torch.int32, device=packed.X.device)
    if ranks.pairs < SAMPLED:
        window[..., 1] = 31 - (BINS.bit_length() - 1)
        return window
    samples = MANY_SAMPLES if ranks.pairs >= MANY else SAMPLES
    sample = packed.X.new_empty(packed.sets, samples)
    _sample_kernel[packed.sets, samples // SAMPLE_ROWS](
        *(packed.x, sample, packed.n, packed.d, SAMPLE_ROWS, width(packed.D)), **on(sample, OPTIONS)
    )
    centre, margin = samples * ranks.first / ranks.pairs, DEVIATIONS * 0.5 * math.sqrt(samples)
    low, high = max(0, int(centre - margin)), min(samples - 1, math.ceil(centre + margin))
    _bracket_kernel[packed.sets,](sample, window, low, high, samples, BINS, **on(sample, BRACKET_OPTIONS))
    return window
