"""The pairs at the middle distances of a large set: Σ_j (x_i − x_j) over them, for the gradient of the median."""

import triton
import triton.language as tl

from .far import row_differences
from .particles import tile
from .selection import bits_of, bits_of_pairs, tile_distances


@triton.jit
def _hits(u, pair, differ, wanted, i, j):
    """For the rows from i: how often each is the later of a middle pair, and with which rows from j [TILE, TILE]."""
    hit = (pair & (bits_of_pairs(u, differ) == wanted)).to(tl.int32)
    # as in counting, the later row comes first
    return tl.sum(hit, 1) * (j <= i), hit * (j <= i) + tl.trans(hit) * (j >= i)


@triton.jit
def _add_tile(p_apart, both, p_i, p_j, D: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr):
    total, both = tl.sum(both, 1)[:, None].to(tl.float32), both.to(tl.float32)
    for start in range(0, D, WIDTH):
        x_i, x_j = tile(p_i + start, D, TILE, WIDTH), tile(p_j + start, D, TILE, WIDTH)
        p_rows = p_apart + tl.arange(0, TILE)[:, None] * D + start + tl.arange(0, WIDTH)[None, :]
        tl.store(p_rows, tl.load(p_rows) + total * x_i - tl.dot(both, x_j, input_precision="ieee"))


@triton.jit
def _add_rows(p_apart, both, p_x, i, j, n, d, D: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr):
    row, other = tl.arange(0, TILE), j + tl.arange(0, TILE)
    for one in range(TILE):
        weight = tl.sum(tl.where((row == one)[:, None], both, 0), 0)
        if tl.max(weight, 0) > 0:
            for start in range(0, d, WIDTH):
                apart = row_differences(p_x, i + one, p_x, other, n, d, start, WIDTH)
                apart = tl.sum(tl.where(weight[:, None] == 0, 0.0, weight[:, None] * apart), 0)
                p_row = p_apart + one * D + start + tl.arange(0, WIDTH)
                tl.store(p_row, tl.load(p_row) + apart)


@triton.jit(do_not_specialize=["sets", "n"])
def apart_kernel(
    p_x,
    p_X,
    p_q,
    p_mark,
    p_reach,
    p_lost,
    p_middles,
    p_apart,
    p_count,
    sets,
    n,
    d,
    N,
    FAR: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Σ_j (x_i − x_j) over the middle pairs, and how many of them have i as the later row; FAR: in tiles that need
    differences, otherwise in the others."""
    i_set, i = (tl.program_id(0) // (N // TILE)).to(tl.int64), tl.program_id(0) % (N // TILE) * TILE
    base, middle, p_set = i_set * N, tl.program_id(1), p_x + i_set * n * d
    wanted, lost = bits_of(tl.load(p_middles + 2 * i_set + middle)), tl.load(p_lost + i_set)
    reach = tl.load(p_reach + (base + i) // TILE)
    p_apart += middle.to(tl.int64) * sets * N * D
    p_count += (middle.to(tl.int64) * sets + i_set) * N + i + tl.arange(0, TILE)
    for j in range(0, N, TILE):
        if not FAR or reach + tl.load(p_reach + (base + j) // TILE) > lost:
            u, pair, differ, far = tile_distances(
                *(p_x, p_X, p_q, p_mark, p_reach, p_lost, i_set, tl.maximum(i, j), tl.minimum(i, j)),
                *(n, d, N, FAR, D, TILE, WIDTH, PRECISION),
            )
            if far == FAR:
                count, both = _hits(u, pair, differ, wanted, i, j)
                if tl.max(tl.ravel(both), 0) > 0:
                    tl.store(p_count, tl.load(p_count) + count)
                    if FAR:
                        _add_rows(p_apart + (base + i) * D, both, p_set, i, j, n, d, D, TILE, WIDTH)
                    else:
                        _add_tile(
                            p_apart + (base + i) * D, both, p_X + (base + i) * D, p_X + (base + j) * D, D, TILE, WIDTH
                        )
