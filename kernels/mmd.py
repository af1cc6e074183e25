"""Maximum mean discrepancy and its gradients in Triton: tiles of pairs on the tensor cores, never stored as a matrix.

With both samples about one centre and k' = dk/dr² summed over the scales,
  value = w_x Σ_{i≠j} k(x_i, x_j) + w_y Σ_{i≠j} k(y_i, y_j) − 2 w_xy Σ k(x_i, y_j),
  ∂x_i = 4 Σ_j w_x k'(x_i, x_j)(x_i − x_j) − 4 Σ_j w_xy k'(x_i, y_j)(x_i − y_j), and likewise for y,
in one pass per sample over the pairs of its rows. Without a gradient each pair within a sample is computed once.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import mmd_far
from .card import Card, card, on
from .far import centre, is_far, limit
from .mmd_far import SCALES
from .mmd_forms import form, scale
from .particles import (
    OPTIONS,
    Packed,
    add_product,
    as_operand,
    bandwidth_at,
    check_dtype,
    half_distances,
    pack,
    padded,
    precision,
    shares,
    tile,
)

FINISH_ROWS, FINISH_WIDTH = 16, 64
RBF_SCALES = 2  # per launch


class Tile(NamedTuple):
    rows: int
    columns: int
    values: int  # gradient dimensions per program; each program recomputes its kernel values
    width: int  # dimensions per product
    warps: int = 8
    stages: int = 2

    @property
    def options(self) -> dict:
        return OPTIONS | {"num_warps": self.warps, "num_stages": self.stages}

    @property
    def blocks(self) -> int:
        """Programs per SM: each thread has nearly all of the 255 registers there are."""
        return max(1, 8 // self.warps)


# Nothing here is measured yet: these are the largest tiles that Triton 3.6, 3.8 and 3.9 compile without spills. Eight
# warps on 64 rows do every product twice, but with four the gradient of more than 64 dimensions spills.
def tile_of(D: int, card: Card, gradient: bool) -> Tile:
    """For rows of D numbers."""
    width = min(D, 32)
    if not gradient:
        return Tile(128, 64, D, min(D, 64) if card.wide else width)
    if D <= 16 or (D <= 64 and card.wide):
        return Tile(128, 32, D, width)
    if D <= 64:
        return Tile(64, 16, D, width, 4, 1)
    return Tile(64, 32 if card.wide else 16, 128, width)


@triton.jit
def _walk(
    total,
    r,
    SZ,
    p_X,
    q_i,
    mark_i,
    first_row,
    p_Z,
    p_q,
    p_mark,
    value,
    first,
    last,
    weight,
    scales,
    b,
    smallest,
    WITHIN: tl.constexpr,
    COUNTED: tl.constexpr,
    IMQ: tl.constexpr,
    COUNT: tl.constexpr,
    GRADIENT: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VALUES: tl.constexpr,
):
    """Add Σ_j w k to total, Σ_j w k' to r [ROWS] and Σ_j w k' z_j to SZ [ROWS, VALUES] for j from first to last."""
    most = limit(smallest)
    for j in range(first, last, COLUMNS):
        at_j = tl.cast(j, tl.int64) * D
        xz = add_product(tl.zeros([ROWS, COLUMNS], tl.float32), p_X, p_Z + at_j, D, WIDTH, PRECISION)
        to_j = j + tl.arange(0, COLUMNS)
        q_j = tl.load(p_q + to_j)
        u = half_distances(xz, q_i, q_j, mark_i, tl.load(p_mark + to_j))
        pair = u < float("inf")  # q is infinite in the padding
        if WITHIN and not GRADIENT:
            # pairs with a far row are that row's, however often this one would count
            pair &= (q_j <= most)[None, :]
        if WITHIN:
            pair &= (first_row + tl.arange(0, ROWS))[:, None] != to_j[None, :]
        k, slope = form(u, smallest, scales, b, IMQ, COUNT)
        if COUNTED:
            # within a sample the tiles above the diagonal also count for those below
            times = ((j >= first_row).to(tl.float64) + (j >= first_row + ROWS)) if WITHIN else 2
            total += times * weight * tl.sum(tl.where(pair, k, 0.0), 1).to(tl.float64)
        if GRADIENT:
            slope = as_operand(tl.where(pair, slope * weight.to(tl.float32), 0.0), PRECISION)
            r += tl.sum(slope, 1)
            SZ = tl.dot(slope, tile(p_Z + at_j + value, D, COLUMNS, VALUES), SZ, input_precision=PRECISION)
    return total, r, SZ


@triton.jit(do_not_specialize=["sets", "n", "m"])
def _sums_kernel(
    p_X,
    p_q_x,
    p_mark_x,
    p_Y,
    p_q_y,
    p_mark_y,
    p_bandwidth,
    p_SZ,
    p_r,
    p_parts,
    sets,
    n,
    m,
    N,
    M,
    share,
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
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VALUES: tl.constexpr,
):
    """The rows X of one sample against themselves and against the other sample's Y; BETWEEN counts the latter pairs."""
    i_set, first_row = (tl.program_id(0) // (N // ROWS)).to(tl.int64), tl.program_id(0) % (N // ROWS) * ROWS
    value, i_split = tl.program_id(1) * VALUES, tl.program_id(2)
    row = i_set * N + first_row + tl.arange(0, ROWS)
    scales = (s_0, s_1, s_2, s_3, s_4, s_5, s_6, s_7)
    b = 1.0 if p_bandwidth is None else bandwidth_at(p_bandwidth + i_set)
    smallest = scale(smallest, b)
    low, high = i_split * share, (i_split + 1) * share  # of the rows of X, then of Y

    q_i, mark_i = tl.load(p_q_x + row), tl.load(p_mark_x + row)
    p_rows = p_X + (i_set * N + first_row) * D
    size, other = tl.cast(n, tl.float64), tl.cast(m, tl.float64)
    r = tl.zeros([ROWS], tl.float32) + 0.0 * b  # NaN for a bandwidth of NaN, however far all pairs are
    total = r.to(tl.float64)
    SZ = tl.zeros([ROWS, VALUES], tl.float32)
    total, r, SZ = _walk(
        *(total, r, SZ, p_rows, q_i, mark_i, first_row),
        *(p_X + i_set * N * D, p_q_x + i_set * N, p_mark_x + i_set * N, value),
        *(low if GRADIENT else tl.maximum(low, first_row // COLUMNS * COLUMNS), tl.minimum(high, N)),
        *(1 / (size * (size - UNBIASED)), scales, b, smallest),
        *(True, True, IMQ, COUNT, GRADIENT, D, WIDTH, PRECISION, ROWS, COLUMNS, VALUES),
    )
    if GRADIENT or BETWEEN:
        total, r, SZ = _walk(
            *(total, r, SZ, p_rows, q_i, mark_i, first_row),
            *(p_Y + i_set * M * D, p_q_y + i_set * M, p_mark_y + i_set * M, value),
            *(tl.maximum(low - N, 0), tl.minimum(high - N, M)),
            *(-1 / (size * other), scales, b, smallest),
            *(False, BETWEEN, IMQ, COUNT, GRADIENT, D, WIDTH, PRECISION, ROWS, COLUMNS, VALUES),
        )

    if GRADIENT:
        to = i_split.to(tl.int64) * sets * N + row
        tl.store(p_SZ + to[:, None] * D + value + tl.arange(0, VALUES)[None, :], SZ)
        if value == 0:
            tl.store(p_r + to, r)
    if value == 0:
        # those of far rows come from mmd_far.py
        near = tl.sum(tl.where(is_far(q_i, smallest), 0.0, total), 0)
        tl.store(p_parts + tl.program_id(0) * tl.num_programs(2) + i_split, near)


@triton.jit(do_not_specialize=["sets", "n", "parts"])
def _finish_kernel(
    p_X, p_SZ, p_r, p_dx, sets, n, d, N, parts, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    i_set, i_tile = (tl.program_id(0) // (N // ROWS)).to(tl.int64), tl.program_id(0) % (N // ROWS)
    row, column = i_tile * ROWS + tl.arange(0, ROWS), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    packed = (i_set * N + row)[:, None] * D + column[None, :]

    X = tl.load(p_X + packed)
    r = tl.zeros([ROWS], tl.float32)
    SZ = tl.zeros([ROWS, WIDTH], tl.float32)
    for i_part in range(parts):
        part = tl.cast(i_part, tl.int64) * sets * N
        r += tl.load(p_r + part + i_set * N + row)
        SZ += tl.load(p_SZ + part * D + packed)

    # ∂x = 4 (r∘X − SZ)
    p_rows = p_dx + (i_set * n + row)[:, None] * d + column[None, :]
    tl.store(p_rows, 4 * (r[:, None] * X - SZ), mask=(row < n)[:, None] & (column < d)[None, :])


def _side(x: Packed, y: Packed, bandwidth, imq, scales, unbiased, in_products, shape: Tile, *, between, gradient):
    """The terms of the value that the rows of x contribute `[sets, ·]`, and ∂x (None unless requested)."""
    values = x.D // shape.values if gradient else 1
    rows = x.N // shape.rows
    columns = (x.N + (y.N if gradient or between else 0)) // shape.columns
    splits, share = shares(columns, x.sets * rows * values, x.x.device, shape.blocks)
    at_once = SCALES if imq else RBF_SCALES
    launches = [scales[k : k + at_once] for k in range(0, len(scales), at_once)]
    SZ, r = (x.X.new_empty(len(launches) * splits, x.sets, x.N, *width) if gradient else None for width in ((x.D,), ()))
    parts = torch.empty(len(launches), x.sets, rows * splits, dtype=torch.float64, device=x.X.device)
    for k, some in enumerate(launches):
        sums = (t[k * splits :] if gradient else None for t in (SZ, r))
        _sums_kernel[x.sets * rows, values, splits](
            *(x.X, x.q, x.mark, y.X, y.q, y.mark, bandwidth, *sums, parts[k]),
            *(x.sets, x.n, y.n, x.N, y.N, share * shape.columns, min(scales)),
            *some,
            *[1.0] * (SCALES - len(some)),
            *(len(some), imq, unbiased, between, gradient, x.D, shape.width, in_products),
            *(shape.rows, shape.columns, shape.values if gradient else 16),
            **on(x.x, shape.options),
        )

    def both(dx):
        return torch.cat((parts, mmd_far.add(x, y, bandwidth, imq, launches, unbiased, between, dx)), -1)

    if not gradient:
        return both(None), None
    dx = torch.empty(x.sets, x.n, x.d, dtype=torch.float32, device=x.X.device)
    _finish_kernel[x.sets * (x.N // FINISH_ROWS), triton.cdiv(x.D, FINISH_WIDTH)](
        *(x.X, SZ, r, dx, x.sets, x.n, x.d, x.N, len(SZ), x.D, FINISH_ROWS, min(x.D, FINISH_WIDTH)),
        **on(x.x, OPTIONS),
    )
    return both(dx), dx


def forward(x, y, bandwidth, imq, scales, unbiased, x_gradient, y_gradient):
    """MMD² `[...]`, ∂x and ∂y in float32; a gradient that is not requested is an empty tensor."""
    check_dtype("mmd", x)
    batch, in_products = x.shape[:-2], precision(x.device)
    value = torch.zeros(batch, dtype=torch.float32, device=x.device)
    dx, dy = (value.new_empty(t.shape if wanted else 0) for t, wanted in ((x, x_gradient), (y, y_gradient)))
    if value.numel() == 0:
        return value, dx, dy
    bandwidth = None if bandwidth is None else bandwidth.contiguous()
    about = centre(y)
    shapes = [tile_of(padded(x.shape[-1]), card(x.device), gradient) for gradient in (x_gradient, y_gradient)]
    packed = {w: [pack(t, in_products, w, centre=about) for t in (x, y)] for w in {shape.width for shape in shapes}}
    (X, Y), (other_X, other_Y) = (packed[shape.width] for shape in shapes)
    given = bandwidth, imq, scales, unbiased, in_products
    x_parts, x_found = _side(X, Y, *given, shapes[0], between=True, gradient=x_gradient)
    y_parts, y_found = _side(other_Y, other_X, *given, shapes[1], between=False, gradient=y_gradient)
    total = torch.cat((x_parts, y_parts), -1).sum((0, 2))
    if not unbiased:
        total = total + len(scales) * (1 / x.shape[-2] + 1 / y.shape[-2])  # k(0) = 1 for each scale
    dx, dy = (empty if g is None else g.view(empty.shape) for empty, g in ((dx, x_found), (dy, y_found)))
    return total.to(torch.float32).view(batch), dx, dy
