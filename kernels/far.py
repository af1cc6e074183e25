"""Rows so far from the centre that their products with others hold nothing of the distances that matter.

u_ij = q_i + q_j − x_i·x_j loses a share LOSS of q_i + q_j, and x_i − c loses eps ‖x_i − c‖. Both show where other
distances matter that are small beside these norms. There u is a sum of squares of x_i − x_j, from the rows as they are
given: right however far the rows are from anything else.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..ops._pairwise import column_medians

ROWS = 16  # per program of the kernels that compute far rows by differences
SAMPLE = 127  # rows whose columns' medians are the centre; no result depends on it but by rounding
CUT = tl.constexpr(1e17)  # centred rows are cut here: q of up to 8192 dimensions stays finite,
HUGE = tl.constexpr(1e33)  # and above this for every row that was cut
# q/h of rows that products and their sums serve: for two of them k is off by 2^-22 · 4 NEAR = 3e-5 at most, if sums are
# rounded
NEAR = tl.constexpr(32.0)


def centre(x: Tensor) -> Tensor:
    """The columns' medians `[..., d]` of some rows, which a few far rows do not move; NaN if x is not finite."""
    x = x.detach()
    rows = x[..., :: triton.cdiv(x.shape[-2], SAMPLE), :].float()
    return column_medians(rows).squeeze(-2) + 0 * x.amax(-2) + 0 * x.amin(-2)


@triton.jit
def differences(p_x, p_y, n, m, d, k, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """x_ik − y_jk [ROWS, COLUMNS] of rows x [n, d] and y [m, d], undefined for i >= n or j >= m."""
    i, j = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    x = tl.load(p_x + k + i * d, mask=i < n, other=0.0).to(tl.float32)
    y = tl.load(p_y + k + j * d, mask=j < m, other=0.0).to(tl.float32)
    return x[:, None] - y[None, :]


@triton.jit
def direct_half_distances(p_x, p_y, n, m, d, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    u = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in tl.range(0, d, num_stages=1):
        apart = differences(p_x, p_y, n, m, d, k, ROWS, COLUMNS)
        u += 0.5 * apart * apart
    return u


@triton.jit
def limit(h):
    """The largest q of near rows; for an h beside which rows that were cut are not far, none is near."""
    return tl.where(h > 1e20, -1.0, NEAR * h)


@triton.jit
def is_far(q, h):
    """Rows whose pairs and sums rounding may spoil in a kernel exp(−2u/h), not those of the padding. Other rows' pairs
    with them are right: either their q is not much larger, or k is 0, or u is q but for rounding."""
    return (q > limit(h)) & (q < float("inf"))


@triton.jit
def rows(p_x, j, n, d, start, WIDTH: tl.constexpr):
    """x_j [j, WIDTH] from dimension start, 0 beyond n and d."""
    column = start + tl.arange(0, WIDTH)
    mask = (j < n)[:, None] & (column < d)[None, :]
    return tl.load(p_x + j.to(tl.int64)[:, None] * d + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def row_differences(p_x, i, p_y, j, n, d, start, WIDTH: tl.constexpr):
    """x_i − y_j [j, WIDTH] for one row i of x and rows j of y [n, d], 0 beyond d."""
    column = start + tl.arange(0, WIDTH)
    x_i = tl.load(p_x + tl.cast(i, tl.int64) * d + column, mask=column < d, other=0.0).to(tl.float32)
    return x_i[None, :] - rows(p_y, j, n, d, start, WIDTH)


@triton.jit
def half_distances_of_row(p_x, i, p_y, j, n, d, WIDTH: tl.constexpr):
    """u_ij [j] for one row i of x and rows j of y [n, d]."""
    u = tl.zeros(j.shape, tl.float32)
    for start in range(0, d, WIDTH):
        apart = row_differences(p_x, i, p_y, j, n, d, start, WIDTH)
        u += 0.5 * tl.sum(apart * apart, 1)
    return u


@triton.jit
def rows_of_program(N, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Set, first row and rows [ROWS] of a program, and the first of its dimensions and these [WIDTH]."""
    i_set, first = (tl.program_id(0) // (N // ROWS)).to(tl.int64), tl.program_id(0) % (N // ROWS) * ROWS
    value = tl.program_id(1) * WIDTH
    return i_set, first, first + tl.arange(0, ROWS), value, value + tl.arange(0, WIDTH)


@triton.jit
def holds(row, wanted, i):
    """Whether row i is one of those wanted."""
    return tl.sum(tl.where(row == i, wanted, 0), 0) > 0


def shape(D: int, elements: int) -> tuple[int, int, int]:
    """Rows per program, and other rows and dimensions at once, of which a block has `elements` numbers."""
    width = min(D, 64)
    return ROWS, elements // width, width
