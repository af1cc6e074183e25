"""SVGD direction and its gradient in Triton for large particle sets: tiles of K on the tensor cores, never all of K.

K' = K − I, r' = K'1: a particle's own term is added separately and exactly, however narrow the kernel. With X centred,
V = αS − βX, γα = 1 and γβ = 2/h,
  φ_i = (1/n) [s_i + γ (K'V + β r'∘X)_i].
Backward, with B_ij = k'_ij (g_i·v_j + v_i·g_j + β g_i·x_i + β g_j·x_j), D = (γ/n) [(B1)∘X − BX] and
E = (1/n) [r'∘G − K'G],
  ∂S = (1/n) (G + K'G),   ∂X = −(2/h) (D − E),   ∂h = ⟨X, D − 2E⟩/h².

Four passes each way: pack the rows (particles.py), sum over pairs of tiles, finish the sums, and recompute the rows
that are far from the others (svgd_far.py).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import svgd_far
from .card import Card, card, on
from .particles import (
    HALF,
    OPTIONS,
    Packed,
    add_product,
    as_operand,
    bandwidth_at,
    check_dtype,
    factors,
    half_distances,
    pack,
    padded,
    precision,
    shares,
    tile,
)

FINISH_ROWS, FINISH_WIDTH = 16, 64


class Tile(NamedTuple):
    rows: int
    columns: int
    values: int  # dimensions of K'V per program; each program recomputes its K
    width: int  # dimensions per product
    warps: int
    stages: int = 2

    @property
    def options(self) -> dict:
        return OPTIONS | {"num_warps": self.warps, "num_stages": self.stages}

    @property
    def blocks(self) -> int:
        """Programs per SM: each thread has nearly all of the 255 registers there are."""
        return max(1, 8 // self.warps)


# Nothing here is measured yet: these are the largest tiles that Triton 3.6, 3.8 and 3.9 compile without spills.
#
# The products are the bottleneck. Forward, a pair costs 4 D flop, three times over in 3xTF32, and one exponential: at
# D = 64 that is 768 flop, 0.36 clocks of an H100's tensor cores, against 0.06 for its special functions. A tile reads
# its columns' X and V from the L2 cache, 8 D bytes per row: rows/2 flop per byte, which is 64 at 128 rows, where an
# H100 needs 30 (165 Tflop/s in 3xTF32 over 5.5 TB/s). If width < D, the rows' X is read again with every tile and 20
# remain: enough for an A100, whose mma holds both parts of an operand in registers and leaves no room for more;
# Hopper's wgmma reads them from shared memory. Above 128 dimensions K is recomputed for every 128 of them.
#
# A warp takes 16 of the rows: eight warps on 64 rows would do every product twice. Of four, an SM has room for two or
# more programs, one of which multiplies while another waits.
def forward_tile(D: int, card: Card) -> Tile:
    """For rows of D numbers."""
    if D > 64:
        return Tile(64, 32 if card.wide else 16, 128, 32, 4)
    if card.wide:
        return Tile(64, 64, D, D, 4) if D <= 16 else Tile(128, 64, D, D, 8)
    return Tile(128, 32, D, min(D, 32), 8)


# Five products and two sums of [rows, values]: registers limit this to 10 to 15 flop per byte.
def backward_tile(D: int, card: Card) -> Tile:
    if card.wide:
        return Tile(64, 32, min(D, 64), 32 if D == 32 or (D > 32 and card.tensor_memory) else 16, 4)
    return Tile(64, 32, D, 16, 4) if D == 32 else Tile(64, 16, min(D, 64), min(D, 32), 4)


@triton.jit
def kernel_tile(u, i, j, exponent):
    """k'_ij = 2^(−u_ij · 2 log2(e)/h), 0 for j = i."""
    return tl.where(i[:, None] == j[None, :], 0.0, tl.exp2(-u * exponent))


@triton.jit(do_not_specialize=["sets"])
def _forward_kernel(
    p_X,
    p_V,
    p_q,
    p_mark,
    p_bandwidth,
    p_KV,
    p_r,
    sets,
    N,
    share,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VALUES: tl.constexpr,
):
    i_set, i_tile = (tl.program_id(0) // (N // ROWS)).to(tl.int64), tl.program_id(0) % (N // ROWS)
    value, i_split = tl.program_id(1) * VALUES, tl.program_id(2)
    base, i = i_set * N, i_tile * ROWS + tl.arange(0, ROWS)
    at_i = (base + i_tile * ROWS) * D
    _, _, _, exponent = factors(bandwidth_at(p_bandwidth + i_set))

    q_i, mark_i = tl.load(p_q + base + i), tl.load(p_mark + base + i)
    r = tl.zeros([ROWS], tl.float32)
    KV = tl.zeros([ROWS, VALUES], tl.float32)
    for first in range(i_split * share, tl.minimum((i_split + 1) * share, N), COLUMNS):
        j, at_j = first + tl.arange(0, COLUMNS), (base + first) * D
        xx = add_product(tl.zeros([ROWS, COLUMNS], tl.float32), p_X + at_i, p_X + at_j, D, WIDTH, PRECISION)
        u = half_distances(xx, q_i, tl.load(p_q + base + j), mark_i, tl.load(p_mark + base + j))
        k = as_operand(kernel_tile(u, i, j, exponent), PRECISION)
        r += tl.sum(k, 1)
        KV = tl.dot(k, tile(p_V + at_j + value, D, COLUMNS, VALUES), KV, input_precision=PRECISION)

    to = (i_split.to(tl.int64) * sets + i_set) * N + i
    tl.store(p_KV + to[:, None] * D + value + tl.arange(0, VALUES)[None, :], KV)
    if value == 0:
        tl.store(p_r + to, r)


@triton.jit(do_not_specialize=["sets"])
def _backward_kernel(
    p_X,
    p_V,
    p_G,
    p_q,
    p_mark,
    p_p,
    p_bandwidth,
    p_KG,
    p_BX,
    p_r,
    p_b,
    sets,
    N,
    share,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VALUES: tl.constexpr,
):
    i_set, i_tile = (tl.program_id(0) // (N // ROWS)).to(tl.int64), tl.program_id(0) % (N // ROWS)
    value, i_split = tl.program_id(1) * VALUES, tl.program_id(2)
    base, i = i_set * N, i_tile * ROWS + tl.arange(0, ROWS)
    at_i = (base + i_tile * ROWS) * D
    _, _, _, exponent = factors(bandwidth_at(p_bandwidth + i_set))

    q_i, mark_i, p_i = tl.load(p_q + base + i), tl.load(p_mark + base + i), tl.load(p_p + base + i)
    r, b = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    KG, BX = tl.zeros([ROWS, VALUES], tl.float32), tl.zeros([ROWS, VALUES], tl.float32)
    for first in range(i_split * share, tl.minimum((i_split + 1) * share, N), COLUMNS):
        j, at_j = first + tl.arange(0, COLUMNS), (base + first) * D
        xx = add_product(tl.zeros([ROWS, COLUMNS], tl.float32), p_X + at_i, p_X + at_j, D, WIDTH, PRECISION)
        u = half_distances(xx, q_i, tl.load(p_q + base + j), mark_i, tl.load(p_mark + base + j))
        k = kernel_tile(u, i, j, exponent)
        # B_ij = k'_ij (g_i·v_j + v_i·g_j + p_i + p_j)
        gv = add_product(tl.zeros([ROWS, COLUMNS], tl.float32), p_G + at_i, p_V + at_j, D, WIDTH, PRECISION)
        gv = add_product(gv, p_V + at_i, p_G + at_j, D, WIDTH, PRECISION)
        B = as_operand(k * (gv + p_i[:, None] + tl.load(p_p + base + j)[None, :]), PRECISION)
        k = as_operand(k, PRECISION)
        r += tl.sum(k, 1)
        b += tl.sum(B, 1)
        KG = tl.dot(k, tile(p_G + at_j + value, D, COLUMNS, VALUES), KG, input_precision=PRECISION)
        BX = tl.dot(B, tile(p_X + at_j + value, D, COLUMNS, VALUES), BX, input_precision=PRECISION)

    to = (i_split.to(tl.int64) * sets + i_set) * N + i
    columns = value + tl.arange(0, VALUES)[None, :]
    tl.store(p_KG + to[:, None] * D + columns, KG)
    tl.store(p_BX + to[:, None] * D + columns, BX)
    if value == 0:
        tl.store(p_r + to, r)
        tl.store(p_b + to, b)


@triton.jit(do_not_specialize=["sets", "n", "splits"])
def _finish_forward_kernel(
    p_x,
    p_score,
    p_bandwidth,
    p_X,
    p_KV,
    p_r,
    p_phi,
    p_row_sum,
    sets,
    n,
    d,
    N,
    splits,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    i_set, i_tile = (tl.program_id(0) // (N // ROWS)).to(tl.int64), tl.program_id(0) % (N // ROWS)
    row, column = i_tile * ROWS + tl.arange(0, ROWS), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside, mask = row < n, (row < n)[:, None] & (column < d)[None, :]
    given = (i_set * n + row)[:, None] * d + column[None, :]
    packed = (i_set * N + row)[:, None] * D + column[None, :]
    _, beta, gamma, _ = factors(bandwidth_at(p_bandwidth + i_set))

    if p_score is None:
        s = -tl.load(p_x + given, mask=mask, other=0.0).to(tl.float32)
    else:
        s = tl.load(p_score + given, mask=mask, other=0.0).to(tl.float32)
    X = tl.load(p_X + packed)
    r = tl.zeros([ROWS], tl.float32)
    KV = tl.zeros([ROWS, WIDTH], tl.float32)
    for i_split in range(splits):
        part = tl.cast(i_split, tl.int64) * sets * N
        r += tl.load(p_r + part + i_set * N + row)
        KV += tl.load(p_KV + part * D + packed)

    # φ = (1/n) [s + γ (K'V + β r'∘X)]
    phi = (s + gamma * (KV + beta * r[:, None] * X)) / n

    tl.store(p_phi + given, phi, mask=mask)
    if tl.program_id(1) == 0:
        tl.store(p_row_sum + i_set * n + row, 1 + r, mask=inside)


@triton.jit(do_not_specialize=["sets", "n", "splits"])
def _finish_backward_kernel(
    p_grad,
    p_bandwidth,
    p_X,
    p_G,
    p_q,
    p_KG,
    p_BX,
    p_r,
    p_b,
    p_dx,
    p_dscore,
    p_dh,
    sets,
    n,
    d,
    N,
    splits,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    i_set, i_tile = (tl.program_id(0) // (N // ROWS)).to(tl.int64), tl.program_id(0) % (N // ROWS)
    row, column = i_tile * ROWS + tl.arange(0, ROWS), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    mask = (row < n)[:, None] & (column < d)[None, :]
    given = (i_set * n + row)[:, None] * d + column[None, :]
    packed = (i_set * N + row)[:, None] * D + column[None, :]
    h = bandwidth_at(p_bandwidth + i_set)
    _, beta, gamma, _ = factors(h)

    g = tl.load(p_grad + given, mask=mask, other=0.0).to(tl.float32)
    X, G = tl.load(p_X + packed), tl.load(p_G + packed)
    r, b = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    KG, BX = tl.zeros([ROWS, WIDTH], tl.float32), tl.zeros([ROWS, WIDTH], tl.float32)
    for i_split in range(splits):
        part = tl.cast(i_split, tl.int64) * sets * N
        r += tl.load(p_r + part + i_set * N + row)
        b += tl.load(p_b + part + i_set * N + row)
        KG += tl.load(p_KG + part * D + packed)
        BX += tl.load(p_BX + part * D + packed)

    # D = (γ/n) [(B1)∘X − BX],  E = (1/n) [r'∘G − K'G],  ∂S = (1/n) (G + K'G),  ∂X = −(2/h) (D − E)
    b_D = gamma * (b[:, None] * X - BX) / n
    b_E = (r[:, None] * G - KG) / n
    b_dS = (g + KG) / n
    b_dX = beta * gamma * (b_E - b_D)

    if p_dscore is None:
        tl.store(p_dx + given, b_dX - b_dS, mask=mask)  # S = −x
    else:
        tl.store(p_dx + given, b_dX, mask=mask)
        tl.store(p_dscore + given, b_dS, mask=mask)
    if p_dh is not None:
        far = svgd_far.needs_differences(tl.load(p_q + i_set * N + row), r, h)
        dh = tl.sum(tl.sum(tl.where(far[:, None], 0.0, X * (b_D - 2 * b_E)), 1), 0)
        tl.store(p_dh + (i_set * (N // ROWS) + i_tile) * tl.num_programs(1) + tl.program_id(1), dh)


def _grid(packed: Packed, tile: Tile) -> tuple[tuple[int, int, int], int]:
    """Programs of the middle pass, and how many columns each covers."""
    rows, values = packed.sets * packed.N // tile.rows, packed.D // tile.values
    parts, share = shares(packed.N // tile.columns, rows * values, packed.x.device, tile.blocks)
    return (rows, values, parts), share * tile.columns


def forward(x, score, bandwidth):
    """φ `[..., n, d]` and the row sums r = K1 `[..., n]` of K."""
    check_dtype("svgd_direction", x)
    # half precision has no more bits than TF32
    in_products = card(x.device).precision("tf32") if x.dtype in HALF else precision(x.device)
    tile = forward_tile(padded(x.shape[-1]), card(x.device))
    packed = pack(x, in_products, tile.width, score=score, bandwidth=bandwidth)
    sets, n, d, N, D = packed[:5]
    phi = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    row_sum = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if sets == 0:
        return phi, row_sum
    bandwidth, score = bandwidth.contiguous(), None if score is None else score.contiguous()
    grid, share = _grid(packed, tile)
    KV, r = packed.X.new_empty(grid[2], sets, N, D), packed.X.new_empty(grid[2], sets, N)
    _forward_kernel[grid](
        *(packed.X, packed.V, packed.q, packed.mark, bandwidth, KV, r, sets, N, share),
        *(D, tile.width, in_products, tile.rows, tile.columns, tile.values),
        **on(x, tile.options),
    )
    _finish_forward_kernel[sets * (N // FINISH_ROWS), triton.cdiv(D, FINISH_WIDTH)](
        *(packed.x, score, bandwidth, packed.X, KV, r, phi, row_sum, sets, n, d, N, grid[2]),
        *(D, FINISH_ROWS, min(D, FINISH_WIDTH)),
        **on(x, OPTIONS),
    )
    svgd_far.forward(packed, score, bandwidth, r, phi, row_sum)
    return phi, row_sum


def backward(grad, x, score, bandwidth, row_sum, bandwidth_gradient):
    """∂L/∂x, ∂L/∂score (empty without a score) and ∂L/∂h (empty unless asked for). r' is recomputed, because 1 + r'
    has lost a small r'."""
    check_dtype("svgd_direction_backward", x)
    in_products = precision(x.device)  # half precision too: ∂h is a sum that cancels
    tile = backward_tile(padded(x.shape[-1]), card(x.device))
    packed = pack(x, in_products, tile.width, score=score, bandwidth=bandwidth, grad=grad)
    sets, n, d, N, D = packed[:5]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dscore = None if score is None else torch.empty_like(dx)
    dh = bandwidth.new_empty(bandwidth.shape if bandwidth_gradient else 0)
    if sets:
        grad, bandwidth, score = (t if t is None else t.contiguous() for t in (grad, bandwidth, score))
        grid, share = _grid(packed, tile)
        sums = [packed.X.new_empty(grid[2], sets, N, *width) for width in ((D,), (D,), (), ())]  # KG, BX, r', B1
        _backward_kernel[grid](
            *(packed.X, packed.V, packed.G, packed.q, packed.mark, packed.p, bandwidth, *sums, sets, N, share),
            *(D, tile.width, in_products, tile.rows, tile.columns, tile.values),
            **on(x, tile.options),
        )
        finish = N // FINISH_ROWS, triton.cdiv(D, FINISH_WIDTH)
        parts = packed.X.new_empty(sets, finish[0] * finish[1]) if bandwidth_gradient else None  # of h² ∂h
        _finish_backward_kernel[sets * finish[0], finish[1]](
            *(grad, bandwidth, packed.X, packed.G, packed.q, *sums, dx, dscore, parts, sets, n, d, N, grid[2]),
            *(D, FINISH_ROWS, min(D, FINISH_WIDTH)),
            **on(x, OPTIONS),
        )
        far_parts = svgd_far.backward(packed, grad, score, bandwidth, sums[2], dx, dscore, bandwidth_gradient)
        if bandwidth_gradient:
            parts, h = torch.cat((parts, far_parts), -1), bandwidth.double()
            dh = (parts.sum(-1, dtype=torch.float64).view_as(h) / h / h).to(bandwidth.dtype)
    return dx, dx.new_empty(0) if dscore is None else dscore, dh
