"""Rows of the SVGD direction that are far from the centre, each by differences from all others (far.py).

(Σ_j k'_ij) x_i − Σ_j k'_ij x_j loses eps ‖x_i‖, so there
  φ_i = (1/n) [s_i + γ Σ_j k'_ij (α s_j + β (x_i − x_j))],
  B_ij = k'_ij [α (g_i·s_j + s_i·g_j) + β (g_i − g_j)·(x_i − x_j)],
  D_i = (γ/n) Σ_j B_ij (x_i − x_j),   E_i = (1/n) Σ_j k'_ij (g_i − g_j),
and ∂h's share of a pair, (1/h²) (x_i − x_j)·[(γ/n) B_ij (x_i − x_j) − (2/n) k'_ij (g_i − g_j)], is halved between two
far rows; with a near row, which has its share from x_j in svgd.py, the first factor is x_i.
"""

import triton
import triton.language as tl

from .card import on
from .far import half_distances_of_row, holds, is_far, row_differences, rows, rows_of_program, shape
from .particles import OPTIONS, Packed, bandwidth_at, factors

VANISH, NOTHING = tl.constexpr(2.0**18), tl.constexpr(2.0**-100)
FORWARD, BACKWARD = 1024, 512  # numbers in a block of other rows, without spills
BACKWARD_OPTIONS = OPTIONS | {"num_warps": 8}


@triton.jit
def row_sums(p_r, i_set, row, sets, N, splits):
    r = tl.zeros(row.shape, tl.float32)
    for i_split in range(splits):
        r += tl.load(p_r + (tl.cast(i_split, tl.int64) * sets + i_set) * N + row)
    return r


@triton.jit
def needs_differences(q, r, h):
    """Far rows, unless r' is so small that their k' vanish: rounding moves u by less than 2^-15 (q_i + q_j), so below
    VANISH k' by less than a factor of 2^46."""
    return is_far(q, h) & ((q > VANISH * h) | ~(r < NOTHING))


@triton.jit
def _opening(p_x, p_score, p_bandwidth, p_q, p_r, i_set, row, sets, n, d, N, splits):
    """h, which rows are wanted, x and scores of the set, and their sign: without a score S = −x."""
    h = bandwidth_at(p_bandwidth + i_set)
    q, r = tl.load(p_q + i_set * N + row), row_sums(p_r, i_set, row, sets, N, splits)
    wanted = needs_differences(q, r, h).to(tl.int32)
    p_scores = (p_x if p_score is None else p_score) + i_set * n * d
    return h, wanted, p_x + i_set * n * d, p_scores, -1.0 if p_score is None else 1.0


@triton.jit
def _kernel_values(u, i, j, n, exponent):
    return tl.where((j == i) | (j >= n), 0.0, tl.exp2(-u * exponent))


@triton.jit(do_not_specialize=["sets", "n", "splits"])
def _forward_kernel(
    p_x,
    p_score,
    p_bandwidth,
    p_q,
    p_r,
    p_phi,
    p_row_sum,
    sets,
    n,
    d,
    N,
    splits,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    i_set, first_row, row, value, column = rows_of_program(N, ROWS, WIDTH)
    h, wanted, p_set, p_scores, sign = _opening(p_x, p_score, p_bandwidth, p_q, p_r, i_set, row, sets, n, d, N, splits)
    alpha, beta, gamma, exponent = factors(h)

    for i in range(first_row, first_row + tl.max(wanted, 0) * ROWS):
        if holds(row, wanted, i):
            r_i = tl.zeros([COLUMNS], tl.float32)
            sums = tl.zeros([COLUMNS, WIDTH], tl.float32)
            for first in range(0, n, COLUMNS):
                j = first + tl.arange(0, COLUMNS)
                u = half_distances_of_row(p_set, i, p_set, j, n, d, WIDTH)
                k = _kernel_values(u, i, j, n, exponent)
                s = sign * rows(p_scores, j, n, d, value, WIDTH)
                term = alpha * s + beta * row_differences(p_set, i, p_set, j, n, d, value, WIDTH)
                r_i += k
                sums += tl.where(k[:, None] == 0, 0.0, k[:, None] * term)

            at = (i_set * n + i) * d + column
            s_i = tl.load(p_scores + tl.cast(i, tl.int64) * d + column, mask=column < d, other=0.0).to(tl.float32)
            s_i *= sign
            tl.store(p_phi + at, (s_i + gamma * tl.sum(sums, 0)) / n, mask=column < d)
            if value == 0:
                tl.store(p_row_sum + i_set * n + i, 1 + tl.sum(r_i, 0))


@triton.jit(do_not_specialize=["sets", "n", "splits"])
def _backward_kernel(
    p_grad,
    p_x,
    p_score,
    p_bandwidth,
    p_X,
    p_q,
    p_r,
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
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    i_set, first_row, row, value, column = rows_of_program(N, ROWS, WIDTH)
    h, wanted, p_set, p_scores, sign = _opening(p_x, p_score, p_bandwidth, p_q, p_r, i_set, row, sets, n, d, N, splits)
    alpha, beta, gamma, exponent = factors(h)
    p_grads = p_grad + i_set * n * d

    dh = tl.zeros([COLUMNS], tl.float32)
    for i in range(first_row, first_row + tl.max(wanted, 0) * ROWS):
        if holds(row, wanted, i):
            one = i + tl.zeros([1], tl.int32)
            D_i, E_i = tl.zeros([COLUMNS, WIDTH], tl.float32), tl.zeros([COLUMNS, WIDTH], tl.float32)
            KG = tl.zeros([COLUMNS, WIDTH], tl.float32)
            for first in range(0, n, COLUMNS):
                j = first + tl.arange(0, COLUMNS)
                u = tl.zeros([COLUMNS], tl.float32)
                gs, xg, Xx, Xg = tl.zeros_like(u), tl.zeros_like(u), tl.zeros_like(u), tl.zeros_like(u)
                for start in range(0, d, WIDTH):
                    x_ij = row_differences(p_set, i, p_set, j, n, d, start, WIDTH)
                    g_ij = row_differences(p_grads, i, p_grads, j, n, d, start, WIDTH)
                    g_i, g_j = rows(p_grads, one, n, d, start, WIDTH), rows(p_grads, j, n, d, start, WIDTH)
                    s_i, s_j = rows(p_scores, one, n, d, start, WIDTH), rows(p_scores, j, n, d, start, WIDTH)
                    u += 0.5 * tl.sum(x_ij * x_ij, 1)
                    xg += tl.sum(x_ij * g_ij, 1)
                    gs += sign * tl.sum(g_i * s_j + s_i * g_j, 1)
                    if p_dh is not None:
                        X_i = tl.load(p_X + (i_set * N + i) * D + start + tl.arange(0, WIDTH))[None, :]
                        Xx += tl.sum(X_i * x_ij, 1)
                        Xg += tl.sum(X_i * g_ij, 1)
                k = _kernel_values(u, i, j, n, exponent)
                B = tl.where(k == 0, 0.0, k * (alpha * gs + beta * xg))
                if p_dh is not None:
                    far = is_far(tl.load(p_q + i_set * N + j, mask=j < n, other=0.0), h)
                    share = gamma * B * tl.where(far, u, Xx) - 2 * k * tl.where(far, 0.5 * xg, Xg)
                    dh += tl.where(k == 0, 0.0, share)

                x_ij = row_differences(p_set, i, p_set, j, n, d, value, WIDTH)
                g_ij = row_differences(p_grads, i, p_grads, j, n, d, value, WIDTH)
                D_i += tl.where(k[:, None] == 0, 0.0, B[:, None] * x_ij)
                E_i += k[:, None] * g_ij
                KG += k[:, None] * rows(p_grads, j, n, d, value, WIDTH)

            at = (i_set * n + i) * d + column
            g = tl.load(p_grad + at, mask=column < d, other=0.0).to(tl.float32)
            dS = (g + tl.sum(KG, 0)) / n
            dX = beta * gamma * (tl.sum(E_i, 0) - gamma * tl.sum(D_i, 0)) / n
            if p_dscore is None:
                tl.store(p_dx + at, dX - dS, mask=column < d)
            else:
                tl.store(p_dx + at, dX, mask=column < d)
                tl.store(p_dscore + at, dS, mask=column < d)
    if p_dh is not None:
        tl.store(p_dh + tl.program_id(0), tl.sum(dh, 0) / n, mask=value == 0)


def forward(packed: Packed, score, bandwidth, r, phi, row_sum) -> None:
    """Overwrite far rows of φ and of K1; r: the parts of the sums r'."""
    sets, n, d, N, D = packed[:5]
    rows, columns, width = shape(D, FORWARD)
    _forward_kernel[sets * (N // rows), triton.cdiv(d, width)](
        *(packed.x, score, bandwidth, packed.q, r, phi, row_sum, sets, n, d, N, len(r), rows, columns, width),
        **on(phi, OPTIONS),
    )


def backward(packed: Packed, grad, score, bandwidth, r, dx, dscore, bandwidth_gradient):
    """Overwrite far rows of the gradients; their terms of h² ∂h `[sets, ·]`, or None."""
    sets, n, d, N, D = packed[:5]
    rows, columns, width = shape(D, BACKWARD)
    parts = packed.q.new_empty(sets, N // rows) if bandwidth_gradient else None
    _backward_kernel[sets * (N // rows), triton.cdiv(d, width)](
        *(grad, packed.x, score, bandwidth, packed.X, packed.q, r, dx, dscore, parts, sets, n, d, N, len(r), D),
        *(rows, columns, width),
        **on(dx, BACKWARD_OPTIONS),
    )
    return parts
