"""Rows of a sample that are far from the centre: their part of the MMD and its gradient, by differences (far.py)."""

import torch
import triton
import triton.language as tl

from .card import on
from .far import half_distances_of_row, holds, is_far, row_differences, rows_of_program, shape
from .mmd_forms import form, scale
from .particles import OPTIONS, Packed, bandwidth_at

ELEMENTS = 1024  # numbers in a block of other rows
SCALES = 8  # per launch
ROWS_OPTIONS = OPTIONS | {"num_warps": 8}  # four spill with Triton 3.6


@triton.jit
def _add(
    total,
    pull,
    p_x,
    i,
    p_z,
    p_q,
    m,
    d,
    value,
    weight,
    scales,
    b,
    smallest,
    WITHIN: tl.constexpr,
    COUNTED: tl.constexpr,
    IMQ: tl.constexpr,
    COUNT: tl.constexpr,
    GRADIENT: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Add w k [COLUMNS] to total and w k' (x_i − z_j) [COLUMNS, WIDTH] to pull, for all j."""
    for first in range(0, m, COLUMNS):
        j = first + tl.arange(0, COLUMNS)
        u = half_distances_of_row(p_x, i, p_z, j, m, d, WIDTH)
        pair = j < m
        if WITHIN:
            pair &= j != i
        k, slope = form(u, smallest, scales, b, IMQ, COUNT)
        if COUNTED:
            times = tl.full([COLUMNS], 1 if WITHIN else 2, tl.float64)
            if WITHIN and not GRADIENT:
                # near rows leave this pair out
                times = tl.where(is_far(tl.load(p_q + j, mask=j < m, other=0.0), smallest), 1.0, 2.0).to(tl.float64)
            total += times * weight * tl.where(pair, k, 0.0).to(tl.float64)
        if GRADIENT:
            slope = tl.where(pair, slope * weight.to(tl.float32), 0.0)[:, None]
            apart = row_differences(p_x, i, p_z, j, m, d, value, WIDTH)
            pull += tl.where(slope == 0, 0.0, slope * apart)
    return total, pull


@triton.jit(do_not_specialize=["n", "m"])
def _rows_kernel(
    p_x,
    p_q_x,
    p_y,
    p_q_y,
    p_bandwidth,
    p_dx,
    p_parts,
    n,
    m,
    d,
    N,
    M,
    smallest,
    s_0,
    s_1,
    s_2,
    s_3,
    s_4,
    s_5,
    s_6,
    s_7,
    COUNT: tl.constexpr,
    IMQ: tl.constexpr,
    UNBIASED: tl.constexpr,
    BETWEEN: tl.constexpr,
    GRADIENT: tl.constexpr,
    FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    i_set, first_row, row, value, column = rows_of_program(N, ROWS, WIDTH)
    scales = (s_0, s_1, s_2, s_3, s_4, s_5, s_6, s_7)
    b = 1.0 if p_bandwidth is None else bandwidth_at(p_bandwidth + i_set)
    smallest = scale(smallest, b)
    size, other = tl.cast(n, tl.float64), tl.cast(m, tl.float64)
    wanted = is_far(tl.load(p_q_x + i_set * N + row), smallest).to(tl.int32)
    p_x, p_y = p_x + i_set * n * d, p_y + i_set * m * d

    total = tl.zeros([COLUMNS], tl.float64)
    for i in range(first_row, first_row + tl.max(wanted, 0) * ROWS):
        if holds(row, wanted, i):
            pull = tl.zeros([COLUMNS, WIDTH], tl.float32)
            total, pull = _add(
                *(total, pull, p_x, i, p_x, p_q_x + i_set * N, n, d, value, 1 / (size * (size - UNBIASED))),
                *(scales, b, smallest, True, True, IMQ, COUNT, GRADIENT, COLUMNS, WIDTH),
            )
            if GRADIENT or BETWEEN:
                total, pull = _add(
                    *(total, pull, p_x, i, p_y, p_q_y + i_set * M, m, d, value, -1 / (size * other)),
                    *(scales, b, smallest, False, BETWEEN, IMQ, COUNT, GRADIENT, COLUMNS, WIDTH),
                )
            if GRADIENT:
                # ∂x_i = 4 Σ_j w k' (x_i − z_j) over all launches
                p_row = p_dx + (i_set * n + i) * d + column
                before = 0.0 if FIRST else tl.load(p_row, mask=column < d, other=0.0)
                tl.store(p_row, before + 4 * tl.sum(pull, 0), mask=column < d)
    if value == 0:
        tl.store(p_parts + tl.program_id(0), tl.sum(total, 0))


def add(x: Packed, y: Packed, bandwidth, imq, launches, unbiased, between, dx):
    """The value's terms that far rows of x contribute `[launches, sets, ·]`; overwrites their rows of dx, if any."""
    rows, columns, width = shape(x.D, ELEMENTS)
    parts = x.q.new_empty(len(launches), x.sets, x.N // rows, dtype=torch.float64)
    smallest = min(s for some in launches for s in some)
    for k, some in enumerate(launches):
        _rows_kernel[x.sets * (x.N // rows), 1 if dx is None else triton.cdiv(x.d, width)](
            *(x.x, x.q, y.x, y.q, bandwidth, dx, parts[k], x.n, y.n, x.d, x.N, y.N, smallest),
            *some,
            *[1.0] * (SCALES - len(some)),
            *(len(some), imq, unbiased, between, dx is not None, k == 0, rows, columns, width),
            **on(x.x, ROWS_OPTIONS),
        )
    return parts
