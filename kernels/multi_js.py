"""Multi-class Jensen–Shannon loss in Triton: one pass over the logits forward, one backward.

CE = −Σ_c π_c (1/n) Σ_j log softmax(D(z_jc))_c: row r = c·n + j of a set [C·n, C] has the label c = r // n. For a chunk
of rows whose logits are not needed again, one launch computes loss and gradient, and the gradient overwrites the
logits.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .card import on
from .math import parts as two_parts

# A tile is ROWS rows by COLUMNS columns of logits; chosen by register count (tests/test_cubins.py), not yet timed.
TILE = {torch.float32: 2048, torch.float64: 1024}  # elements, by the dtype of the arithmetic
ONE_PROGRAM = 16  # tiles up to which a single program sums, so that a small loss takes one launch
PARTS = 4096  # programs per set at most: as many as one program can add up
# fusion is explicit, because its default differs between Triton versions
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
FORWARD_OPTIONS = OPTIONS | {"maxnreg": 128}  # two programs per SM; without the bound, up to 171 registers and one

ACCEPTED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@triton.jit
def _rows(i_tile, start, n, R, ROWS: tl.constexpr):
    """The first row of a tile in 64 bits; and in 32 bits the tile's rows relative to it, which of them exist, and their
    labels. The given rows start at row `start` of their set."""
    first = tl.cast(i_tile, tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    label = tl.cast((start + first) // n, tl.int32) + (tl.cast((start + first) % n, tl.int32) + row) // n
    return first, row, row < R - first, label


@triton.jit
def _row_losses(
    p_tile, row, inside, label, s, C,
    SMOOTH: tl.constexpr, dtype: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """−⟨target, log softmax⟩ of each row of a tile, and m and Σ e^(x − m), m its largest logit if that is finite."""
    b_label = tl.load(p_tile + row * C + label, mask=inside, other=0.0).to(dtype)
    b_own = tl.where(tl.abs(b_label) == float("inf"), 0.0, b_label)  # Σ target (x − own) keeps what an offset loses
    b_max = tl.full([ROWS], float("-inf"), dtype)
    b_sum = tl.zeros([ROWS], dtype)
    b_all = tl.zeros([ROWS], dtype)
    for start in range(0, C, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        mask = inside[:, None] & (column < C)[None, :]
        b_x = tl.load(p_tile + row[:, None] * C + column[None, :], mask=mask, other=float("-inf")).to(dtype)
        b_new = tl.maximum(b_max, tl.max(b_x, 1))
        # a maximum of ±inf would give inf − inf; replaced with 0 it leaves exp(±inf)
        b_shift = tl.where(tl.abs(b_new) == float("inf"), 0.0, b_new)
        b_sum = b_sum * tl.exp(b_max - b_shift) + tl.sum(tl.exp(b_x - b_shift[:, None]), 1)
        b_max = b_new
        if SMOOTH:
            b_all += tl.sum(tl.where(mask, b_x - b_own[:, None], 0.0), 1)
    b_max = tl.where(tl.abs(b_max) == float("inf"), 0.0, b_max)
    b_sum = tl.where(inside, b_sum, 1.0)
    b_label -= b_own
    if SMOOTH:  # an impossible class is left out of the uniform target
        b_label = tl.where(s == 1, 0.0, (1 - s) * b_label) + s / C * b_all
    return tl.log(b_sum) + (b_max - b_own) - b_label, b_max, b_sum


@triton.jit
def _derivative(b_x, b_max, b_sum, row_label, column, s, C, b_scale):
    """∂CE/∂x = (softmax − target) π_c/n, scaled before rounding."""
    b_target = tl.where(column[None, :] == row_label[:, None], 1 - s, 0.0) + s / C
    return (tl.exp(b_x - b_max[:, None]) / b_sum[:, None] - b_target) * b_scale[:, None]


@triton.jit(do_not_specialize=["n", "R"])
def _forward_kernel(
    p_logits, p_weights, p_out, p_lse, s_high, s_low, n, R, C,
    SMOOTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    dtype = p_lse.dtype.element_ty  # dtype of the arithmetic
    i_set, i_part = tl.program_id(0).to(tl.int64), tl.program_id(1)

    s = tl.cast(s_high, dtype) + s_low
    total = tl.zeros([ROWS], dtype)
    for i_tile in range(i_part, tl.cdiv(R, ROWS), tl.num_programs(1)):
        first, row, inside, label = _rows(i_tile, 0, n, R, ROWS)
        p_tile = p_logits + (i_set * R + first) * C
        b_loss, b_max, b_sum = _row_losses(p_tile, row, inside, label, s, C, SMOOTH, dtype, ROWS, COLUMNS)
        if p_weights is not None:
            b_loss *= tl.load(p_weights + label, mask=inside, other=0.0).to(dtype)
        total += tl.where(inside, b_loss, 0.0)
        tl.store(p_lse + i_set * R + first + row, b_max + tl.log(b_sum), mask=inside)

    mean = tl.sum(total, 0) / (R if p_weights is None else n)
    tl.store(p_out + i_set * tl.num_programs(1) + i_part, mean)


@triton.jit(do_not_specialize=["parts"])
def _sum_kernel(p_parts, p_loss, parts, BLOCK: tl.constexpr):
    i_set = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK)
    b_parts = tl.load(p_parts + i_set * parts + part, mask=part < parts, other=0.0)
    tl.store(p_loss + i_set, tl.sum(b_parts, 0))


@triton.jit(do_not_specialize=["n", "R"])
def _backward_kernel(
    p_grad, p_logits, p_weights, p_lse, p_dlogits, s_high, s_low, n, R, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    dtype = p_lse.dtype.element_ty
    i_set, i_part = tl.program_id(0).to(tl.int64), tl.program_id(1)

    s = tl.cast(s_high, dtype) + s_low
    grad = tl.load(p_grad + i_set).to(dtype) / (R if p_weights is None else n)
    for i_tile in range(i_part, tl.cdiv(R, ROWS), tl.num_programs(1)):
        first, row, inside, label = _rows(i_tile, 0, n, R, ROWS)
        tile = (i_set * R + first) * C
        b_lse = tl.load(p_lse + i_set * R + first + row, mask=inside, other=0.0)
        b_scale = tl.zeros([ROWS], dtype) + grad
        if p_weights is not None:
            b_scale *= tl.load(p_weights + label, mask=inside, other=0.0).to(dtype)
        # the rounded log-sum-exp is as good a shift as the maximum, because the shares are normalised
        b_sum = tl.zeros([ROWS], dtype)
        for start in range(0, C, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            mask = inside[:, None] & (column < C)[None, :]
            offset = row[:, None] * C + column[None, :]
            b_x = tl.load(p_logits + tile + offset, mask=mask, other=float("-inf")).to(dtype)
            b_sum += tl.sum(tl.exp(b_x - b_lse[:, None]), 1)
        b_sum = tl.where(inside, b_sum, 1.0)
        for start in range(0, C, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            mask = inside[:, None] & (column < C)[None, :]
            offset = row[:, None] * C + column[None, :]
            b_x = tl.load(p_logits + tile + offset, mask=mask, other=float("-inf")).to(dtype)
            b_dx = _derivative(b_x, b_lse, b_sum, label, column, s, C, b_scale)
            tl.store(p_dlogits + tile + offset, b_dx, mask=mask)


@triton.jit(do_not_specialize=["start", "n", "R"])
def _rows_kernel(
    p_logits, p_weights, p_out, s_high, s_low, start, n, R, C,
    SMOOTH: tl.constexpr, GRADIENT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    dtype = p_out.dtype.element_ty  # dtype of the arithmetic
    i_part = tl.program_id(0)

    s = tl.cast(s_high, dtype) + s_low
    total = tl.zeros([ROWS], dtype)
    for i_tile in range(i_part, tl.cdiv(R, ROWS), tl.num_programs(0)):
        first, row, inside, label = _rows(i_tile, start, n, R, ROWS)
        p_tile = p_logits + first * C
        b_loss, b_max, b_sum = _row_losses(p_tile, row, inside, label, s, C, SMOOTH, dtype, ROWS, COLUMNS)
        b_scale = tl.full([ROWS], 1.0, dtype) / n
        if p_weights is not None:
            b_scale *= tl.load(p_weights + label, mask=inside, other=0.0).to(dtype)
        else:
            b_scale /= C
        total += tl.where(inside, b_scale * b_loss, 0.0)
        if GRADIENT:
            b_sum = tl.where(b_sum == float("inf"), float("nan"), b_sum)  # as the backward pass
            tl.debug_barrier()  # every thread has read its rows before any thread overwrites them
            for column_0 in range(0, C, COLUMNS):
                column = column_0 + tl.arange(0, COLUMNS)
                mask = inside[:, None] & (column < C)[None, :]
                p_x = p_tile + row[:, None] * C + column[None, :]
                b_x = tl.load(p_x, mask=mask, other=float("-inf")).to(dtype)
                tl.store(p_x, _derivative(b_x, b_max, b_sum, label, column, s, C, b_scale), mask=mask)

    tl.store(p_out + i_part, tl.sum(total, 0))


class _Shape(NamedTuple):
    sets: int
    n: int
    R: int  # rows per set, C·n
    C: int
    arithmetic: torch.dtype

    @property
    def tile(self) -> tuple[int, int]:
        """ROWS and COLUMNS; above TILE classes a row takes several tiles."""
        elements = TILE[self.arithmetic]
        columns = min(triton.next_power_of_2(self.C), elements)
        return min(elements // columns, triton.next_power_of_2(self.R)), columns

    @property
    def programs(self) -> int:
        """Programs per set in the forward pass; if there are several, a second launch adds their partial sums."""
        rows, columns = self.tile
        tiles = triton.cdiv(self.R, rows)
        return 1 if tiles * triton.cdiv(self.C, columns) <= ONE_PROGRAM else min(tiles, PARTS)


def _shape(logits) -> _Shape:
    if logits.dtype not in ACCEPTED:
        raise TypeError(f"multi_js_loss in Triton takes float32, float64, bfloat16 or float16, got {logits.dtype}")
    C, batch = logits.shape[-1], logits.shape[:-3]  # () for [C·n, C] too
    n = logits.shape[-2] if logits.dim() > 2 else logits.shape[0] // C
    return _Shape(batch.numel(), n, C * n, C, torch.promote_types(logits.dtype, torch.float32))


def forward(logits, weights, label_smoothing):
    """The loss `[...]` and the log-sum-exp of each row `logits.shape[:-1]`, in the dtype of the arithmetic."""
    shape = _shape(logits)
    loss = torch.empty(logits.shape[:-3], dtype=shape.arithmetic, device=logits.device)
    lse = torch.empty(logits.shape[:-1], dtype=shape.arithmetic, device=logits.device)
    if shape.sets == 0:
        return loss, lse
    parts = shape.programs
    out = loss if parts == 1 else lse.new_empty(shape.sets, parts)
    weights = None if weights is None else weights.contiguous()
    _forward_kernel[shape.sets, parts](
        *(logits.contiguous(), weights, out, lse, *two_parts(label_smoothing)),
        *(shape.n, shape.R, shape.C, label_smoothing > 0, *shape.tile),
        **on(logits, FORWARD_OPTIONS),
    )
    if parts > 1:
        _sum_kernel[shape.sets,](out, loss, parts, triton.next_power_of_2(parts), **on(logits, OPTIONS))
    return loss, lse


def backward(grad, logits, weights, lse, label_smoothing):
    """∂L/∂logits in logits' dtype, given grad = ∂L/∂loss `[...]`."""
    shape = _shape(logits)
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if shape.sets == 0:
        return dlogits
    weights = None if weights is None else weights.contiguous()
    programs = min(triton.cdiv(shape.R, shape.tile[0]), PARTS)
    _backward_kernel[shape.sets, programs](
        *(grad.contiguous(), logits.contiguous(), weights, lse.contiguous(), dlogits),
        *two_parts(label_smoothing),
        *(shape.n, shape.R, shape.C, *shape.tile),
        **on(logits, OPTIONS),
    )
    return dlogits


def rows(logits, weights, label_smoothing, first, n, gradient):
    """What rows [first, first + len(logits)) of C blocks of n rows add to the loss; overwrites logits with
    ∂loss/∂logits."""
    if logits.dtype not in ACCEPTED:
        raise TypeError(f"multi_js_loss in Triton takes float32, float64, bfloat16 or float16, got {logits.dtype}")
    R, C = logits.shape
    shape = _Shape(1, n, R, C, torch.promote_types(logits.dtype, torch.float32))
    loss = torch.empty((), dtype=shape.arithmetic, device=logits.device)
    if R == 0:
        return loss.zero_()
    parts = shape.programs
    out = loss if parts == 1 else loss.new_empty(parts)
    x = logits.contiguous()
    _rows_kernel[parts,](
        *(x, None if weights is None else weights.contiguous(), out, *two_parts(label_smoothing)),
        *(first, n, R, C, label_smoothing > 0, gradient, *shape.tile),
        **on(logits, OPTIONS),
    )
    if parts > 1:
        _sum_kernel[1,](out, loss, parts, triton.next_power_of_2(parts), **on(logits, OPTIONS))
    if gradient and x is not logits:
        logits.copy_(x)
    return loss
