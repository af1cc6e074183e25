"""Means and centred products of chunks of a batch in Triton, in one pass over the batch.

A program reads the rows of a chunk tile by tile and sums s = Σ (x − c) and P = Σ (x − c)(x − c)ᵀ about the mean c of
the first tile. The chunk's own mean is c + s/n and its scatter P − s sᵀ/n. Because c is close to the mean, little
cancels: |s/n|² is 1/ROWS of the variance if rows are in random order. Chunks are merged by Chan's formula.
"""

import torch
import triton
import triton.language as tl

from .card import card, on

ROWS = 32  # per tile: with twice as many, the code for sm_80 spills
BLOCK = 64  # dimensions per tile; a program computes the products of one pair of such blocks
BLOCKS = 2  # programs per SM that fill a GPU
CHUNK = 4096  # rows per chunk at most: a float32 sum of this many squares has a relative error of 1e-6
# fusion is explicit, because its default differs between Triton versions
OPTIONS = {"num_warps": 8, "num_stages": 2, "enable_fp_fusion": True}

ACCEPTED = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _tile(p_x, first, last, column, d, ROWS: tl.constexpr):
    """Rows [first, first + ROWS), with 0 outside, and which of their elements exist."""
    row = first + tl.arange(0, ROWS)
    mask = (row < last)[:, None] & (column < d)[None, :]
    return tl.load(p_x + row[:, None] * d + column[None, :], mask=mask, other=0.0), mask


@triton.jit
def _origin(p_x, first, last, column, d, ROWS: tl.constexpr):
    """The mean c of the first tile, and a power of two λ such that λ(x − c) is about 1: its squares neither underflow
    nor overflow unless later rows are 1e18 times farther from c or nearer to it."""
    b_first = tl.load(p_x + first * d + column, mask=column < d, other=0.0)
    b_x, mask = _tile(p_x, first, last, column, d, ROWS)
    count = tl.minimum(last - first, ROWS).to(tl.float32)
    # x − x₀ is exact where x is far from 0
    c = b_first + tl.sum(tl.where(mask, (b_x - b_first[None, :]) / count, 0.0), 0)
    largest = tl.max(tl.where(mask, tl.abs(b_x - c[None, :]), 0.0), 0)
    exponent = tl.minimum(largest.to(tl.int32, bitcast=True) >> 23, 253)
    return c, tl.where(largest > 0, (254 - exponent) << 23, 127 << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["n", "share"])
def _scatter_kernel(p_x, p_means, p_parts, n, d, share, BLOCKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    i_part = tl.program_id(0).to(tl.int64)
    # the pair i <= j of dimension blocks
    i, j = tl.program_id(1) // BLOCKS, tl.program_id(1) % BLOCKS
    if i > j:
        return
    first = i_part * share
    last = tl.minimum(first + share, n)
    column_i, column_j = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)

    c_i, scale_i = _origin(p_x, first, last, column_i, d, ROWS)
    c_j, scale_j = _origin(p_x, first, last, column_j, d, ROWS)

    P = tl.zeros([BLOCK, BLOCK], tl.float32)
    s_i, s_j = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(first, last, ROWS):
        b_i, mask_i = _tile(p_x, start, last, column_i, d, ROWS)
        b_i = tl.where(mask_i, b_i - c_i[None, :], 0.0) * scale_i[None, :]
        b_j = b_i
        if BLOCKS > 1:
            b_j, mask_j = _tile(p_x, start, last, column_j, d, ROWS)
            b_j = tl.where(mask_j, b_j - c_j[None, :], 0.0) * scale_j[None, :]
        s_i += tl.sum(b_i, 0)
        s_j += tl.sum(b_j, 0)
        P = tl.dot(tl.trans(b_i), b_j, P, input_precision="ieee")

    # in float64, whose range holds squares of float32 numbers
    count = (last - first).to(tl.float64)
    shift_i, shift_j = s_i.to(tl.float64) / count, s_j.to(tl.float64)
    S = P.to(tl.float64) - shift_i[:, None] * shift_j[None, :]
    S = S / scale_i.to(tl.float64)[:, None] / scale_j.to(tl.float64)[None, :]
    inside = (column_i < d)[:, None] & (column_j < d)[None, :]
    tl.store(p_parts + (i_part * d + column_i[:, None]) * d + column_j[None, :], S, mask=inside)
    if i == j:
        mean = c_i.to(tl.float64) + shift_i / scale_i.to(tl.float64)
        tl.store(p_means + i_part * d + column_i, mean, mask=column_i < d)


def forward(x):
    """Rows per chunk (the last may have fewer), the means `[k, d]` of the chunks of x `[n, d]`, and the sum `[d, d]` of
    their scatters, upper triangle only; in float64."""
    if x.dtype not in ACCEPTED:
        raise TypeError(f"GaussianStatistics in Triton takes float32, bfloat16 or float16, got {x.dtype}")
    n, d = x.shape
    x = x.float()  # Triton 3.6 fails for Blackwell where products take what was loaded in half precision
    blocks = triton.cdiv(d, BLOCK)
    tiles = triton.cdiv(n, ROWS)
    share = min(CHUNK, ROWS * max(1, triton.cdiv(tiles * blocks, card(x.device).programs(BLOCKS))))
    chunks = triton.cdiv(n, share)
    means, parts = (torch.empty(chunks, *shape, dtype=torch.float64, device=x.device) for shape in ((d,), (d, d)))
    if chunks:
        with torch.cuda.device_of(x):
            _scatter_kernel[chunks, blocks * blocks](
                *(x.contiguous(), means, parts, n, d, share, blocks, ROWS, BLOCK), **on(x, OPTIONS)
            )
    return share, means, parts.triu().sum(0)
