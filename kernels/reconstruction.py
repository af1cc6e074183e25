"""Reconstruction losses in Triton. Each row of m pixels is summed by one program; if rows are few and long, by several
and a second launch. Kinds are L2, L1 and BCE of ivfast/ops/reconstruction.py.
"""

import torch
import triton
import triton.language as tl

from .card import on
from .math import log1p
from .particles import shares

# A tile is ROWS samples by COLUMNS pixels; chosen by register count (tests/test_cubins.py), not yet timed.
TILE = 1024  # elements
ONE_PROGRAM = 16  # tiles of a row up to which one program sums, so that a typical image takes one launch
BLOCKS = 2  # programs per SM that fill a GPU
PARTS = 256  # per row at most: as many as one program adds up
L2, L1 = tl.constexpr(0), tl.constexpr(1)
# fusion is explicit, because its default differs between Triton versions
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def _finite(x):
    """x with infinity replaced by the largest finite number."""
    most = 1.7976931348623157e308 if x.dtype == tl.float64 else 3.4028234663852886e38
    return tl.where(x == float("inf"), most, tl.where(x == float("-inf"), -most, x))


@triton.jit(do_not_specialize=["n", "share"])
def _forward_kernel(
    p_output, p_target, p_loss, n, m, share, KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    dtype = p_loss.dtype.element_ty  # dtype of the arithmetic
    first, i_part = tl.program_id(0).to(tl.int64) * ROWS, tl.program_id(1)
    row = tl.arange(0, ROWS)
    inside = row < n - first

    total = tl.zeros([ROWS], dtype)
    for i_tile in range(i_part * share, tl.minimum((i_part + 1) * share, tl.cdiv(m, COLUMNS))):
        column = i_tile * COLUMNS + tl.arange(0, COLUMNS)
        mask = inside[:, None] & (column < m)[None, :]
        at = row[:, None] * m + column[None, :]  # relative to the tile's first row
        b_x = tl.load(p_output + first * m + at, mask=mask, other=0.0).to(dtype)
        b_t = tl.load(p_target + first * m + at, mask=mask, other=0.0).to(dtype)
        if KIND == L2:
            b_loss = (b_x - b_t) * (b_x - b_t)
        elif KIND == L1:
            b_loss = tl.abs(b_x - b_t)
        else:
            # max(x, 0) − x t + log(1 + e^−|x|)
            b_x = _finite(b_x)
            b_loss = tl.where(mask, (tl.where(b_x > 0, b_x, 0.0) - b_x * b_t) + log1p(tl.exp(-tl.abs(b_x))), 0.0)
        total += tl.sum(b_loss, 1)

    tl.store(p_loss + (first + row) * tl.num_programs(1) + i_part, total, mask=inside)


@triton.jit(do_not_specialize=["parts"])
def _sum_kernel(p_parts, p_loss, parts, BLOCK: tl.constexpr):
    i_row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK)
    b_parts = tl.load(p_parts + i_row * parts + part, mask=part < parts, other=0.0)
    tl.store(p_loss + i_row, tl.sum(b_parts, 0))


@triton.jit(do_not_specialize=["n"])
def _backward_kernel(
    p_grad, p_output, p_target, p_doutput, p_dtarget, n, m,
    KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = tl.float64 if p_output.dtype.element_ty == tl.float64 else tl.float32
    tiles = tl.cdiv(m, COLUMNS)
    first, i_tile = (tl.program_id(0) // tiles).to(tl.int64) * ROWS, tl.program_id(0) % tiles
    row, column = tl.arange(0, ROWS), i_tile * COLUMNS + tl.arange(0, COLUMNS)
    inside = row < n - first
    mask = inside[:, None] & (column < m)[None, :]
    at = row[:, None] * m + column[None, :]  # relative to the tile's first row

    b_grad = tl.load(p_grad + first + row, mask=inside, other=0.0).to(dtype)[:, None]
    b_x = tl.load(p_output + first * m + at, mask=mask, other=0.0).to(dtype)
    b_t = tl.load(p_target + first * m + at, mask=mask, other=0.0).to(dtype)
    if KIND == L2:
        b_dx = 2 * b_grad * (b_x - b_t)
        b_dt = -b_dx
    elif KIND == L1:
        b_apart = b_x - b_t
        b_sign = (b_apart > 0).to(dtype) - (b_apart < 0).to(dtype)
        b_dx = b_grad * tl.where(b_apart != b_apart, b_apart, b_sign)
        b_dt = -b_dx
    else:
        b_dx = b_grad * (1 / (1 + tl.exp(-b_x)) - b_t)
        b_dt = -b_grad * _finite(b_x)
    tl.store(p_doutput + first * m + at, b_dx, mask=mask)
    if p_dtarget is not None:
        tl.store(p_dtarget + first * m + at, b_dt, mask=mask)


def _tile(n: int, m: int) -> tuple[int, int]:
    """ROWS and COLUMNS for n samples of m pixels."""
    columns = min(triton.next_power_of_2(m), TILE)
    return min(TILE // columns, triton.next_power_of_2(n)), columns


def forward(output, target, kind):
    """The loss `[n]` of output and target `[n, ...]`."""
    n = output.shape[0]
    dtype = torch.promote_types(output.dtype, torch.float32)
    loss = torch.empty(n, dtype=dtype, device=output.device)
    if not output.numel():
        return loss.zero_()
    m = output.numel() // n
    rows, columns = _tile(n, m)
    programs, tiles = triton.cdiv(n, rows), triton.cdiv(m, columns)
    parts, share = (1, tiles) if tiles <= ONE_PROGRAM else shares(tiles, programs, output.device, BLOCKS)
    if parts > PARTS:
        share = triton.cdiv(tiles, PARTS)
        parts = triton.cdiv(tiles, share)
    out = loss if parts == 1 else loss.new_empty(n, parts)
    _forward_kernel[programs, parts](
        output.contiguous(), target.contiguous(), out, n, m, share, kind, rows, columns, **on(output, OPTIONS)
    )
    if parts > 1:
        _sum_kernel[n,](out, loss, parts, PARTS, **on(output, OPTIONS))
    return loss


def backward(grad, output, target, kind, target_gradient):
    """∂L/∂output and ∂L/∂target (`[0]` unless requested), given grad = ∂L/∂loss `[n]`."""
    doutput = torch.empty(output.shape, dtype=output.dtype, device=output.device)
    dtarget = torch.empty(output.shape if target_gradient else 0, dtype=output.dtype, device=output.device)
    if size := output.numel():
        n = output.shape[0]
        m = size // n
        rows, columns = _tile(n, m)
        _backward_kernel[triton.cdiv(n, rows) * triton.cdiv(m, columns),](
            *(grad.contiguous(), output.contiguous(), target.contiguous()),
            *(doutput, dtarget if target_gradient else None, n, m, kind, rows, columns),
            **on(output, OPTIONS),
        )
    return doutput, dtarget
