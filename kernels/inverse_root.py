"""Inverse square roots of symmetric matrices of up to 128 rows in Triton: one launch, one program per matrix, in
float64.

The products are tl.dot in float64, which also runs on tensor cores. A program keeps its matrices in global memory,
which stays in the cache, padded to a power of two with ones on the diagonal. The iteration is that of
ops/inverse_root.py:

  T = (15 − 10 A + 3 A²)/8,  X ← X T,  A ← T² A,  and finally T = (35 − 35 A + 21 A² − 5 A³)/16.
"""

import torch
import triton
import triton.language as tl

from ..ops.inverse_root import LAST as _LAST
from ..ops.inverse_root import MOST
from ..ops.inverse_root import STEPS as _STEPS
from .card import on

STEPS = tl.constexpr(_STEPS)
LAST = tl.constexpr(_LAST)
WIDTH = tl.constexpr(16)  # of the summed axis in a product
BUFFERS = 6  # per program: A, X, T, U, a, its inverse root
ACCEPTED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@triton.jit
def unit(i, j):
    return tl.where(i[:, None] == j[None, :], 1.0, 0.0).to(tl.float64)


@triton.jit
def load_tile(p, i, j, N: tl.constexpr):
    return tl.load(p + i[:, None] * N + j[None, :])


@triton.jit
def store_symmetric(p, c, i, j, I, J, N: tl.constexpr):
    """Store rows i, columns j and their mirror image."""
    c = tl.where(I == J, 0.5 * (c + tl.trans(c)), c)
    tl.store(p + i[:, None] * N + j[None, :], c)
    tl.store(p + j[:, None] * N + i[None, :], tl.trans(c))


@triton.jit
def _product(p_a, p_b, i, j, N: tl.constexpr):
    """Rows i, columns j of A B for symmetric B."""
    c = tl.zeros([i.shape[0], j.shape[0]], tl.float64)
    for k in range(0, N, WIDTH):
        column = k + tl.arange(0, WIDTH)
        b_a, b_b = load_tile(p_a, i, column, N), load_tile(p_b, j, column, N)
        c = tl.dot(b_a, tl.trans(b_b), c, input_precision="ieee", out_dtype=tl.float64)
    return c


@triton.jit
def _multiply(p_c, p_a, p_b, p_d, alpha, beta, gamma, N: tl.constexpr, BLOCK: tl.constexpr):
    """C = α I + β D + γ A B for symmetric matrices that commute; C must not alias the others."""
    tl.debug_barrier()  # earlier writes of the program are visible
    for I in range(0, N, BLOCK):
        for J in range(0, I + 1, BLOCK):
            i, j = I + tl.arange(0, BLOCK), J + tl.arange(0, BLOCK)
            c = gamma * _product(p_a, p_b, i, j, N) + alpha * unit(i, j) + beta * load_tile(p_d, i, j, N)
            store_symmetric(p_c, c, i, j, I, J, N)
    tl.debug_barrier()


@triton.jit
def _distance_from_unit(p_a, N: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float64)
    for I in range(0, N, BLOCK):
        for J in range(0, N, BLOCK):
            i, j = I + tl.arange(0, BLOCK), J + tl.arange(0, BLOCK)
            e = unit(i, j) - load_tile(p_a, i, j, N)
            total += tl.sum(e * e, 1)
    return tl.sqrt(tl.sum(total, 0))


@triton.jit
def trace(p_a, N: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float64)
    for I in range(0, N, BLOCK):
        total += tl.load(p_a + (I + tl.arange(0, BLOCK)) * (N + 1))
    return tl.sum(total, 0)


@triton.jit
def _scale(p_a, m, N: tl.constexpr, BLOCK: tl.constexpr):
    """The divisor of a: at least λ_max / 2.2."""
    squares = tl.zeros([BLOCK], tl.float64)
    largest = tl.zeros([BLOCK], tl.float64)
    for I in range(0, N, BLOCK):
        row = tl.zeros([BLOCK], tl.float64)
        for J in range(0, N, BLOCK):
            a = load_tile(p_a, I + tl.arange(0, BLOCK), J + tl.arange(0, BLOCK), N)
            row += tl.sum(tl.abs(a), 1)
            squares += tl.sum(a * a, 1)
        largest = tl.maximum(largest, row)
    bound = tl.minimum(tl.max(largest, 0), tl.sqrt(tl.sum(squares, 0)))
    scale = tl.maximum(trace(p_a, N, BLOCK) / m, bound / 2.2)
    return tl.where(scale == 0, 1.0, scale)


@triton.jit
def root(p_work, m, N: tl.constexpr, BLOCK: tl.constexpr):
    """Tr √a and the remaining error ‖I − X a X‖ for a in buffer 4, 0 beyond its m rows; writes X to buffer 5."""
    SIZE: tl.constexpr = N * N
    p_a, p_X = p_work + 4 * SIZE, p_work + 5 * SIZE
    tl.debug_barrier()
    scale = _scale(p_a, m, N, BLOCK)
    for I in range(0, N, BLOCK):
        for J in range(0, N, BLOCK):
            i, j = I + tl.arange(0, BLOCK), J + tl.arange(0, BLOCK)
            at, one = i[:, None] * N + j[None, :], unit(i, j)
            tl.store(p_work + at, load_tile(p_a, i, j, N) / scale + tl.where((i < m)[:, None], 0.0, one))
            tl.store(p_work + SIZE + at, one)
    tl.debug_barrier()

    step = 0
    error = _distance_from_unit(p_work, N, BLOCK)
    while (step < STEPS - 1) & (error > LAST):
        # A and T swap places, and so do X and U
        p_A, p_T = p_work + (step % 2) * 2 * SIZE, p_work + (1 - step % 2) * 2 * SIZE
        _multiply(p_T, p_A, p_A, p_A, 15 / 8, -10 / 8, 3 / 8, N, BLOCK)
        _multiply(p_T + SIZE, p_A + SIZE, p_T, p_T, 0.0, 0.0, 1.0, N, BLOCK)
        _multiply(p_A + SIZE, p_T, p_T, p_T, 0.0, 0.0, 1.0, N, BLOCK)
        _multiply(p_T, p_A + SIZE, p_A, p_A, 0.0, 0.0, 1.0, N, BLOCK)
        error = _distance_from_unit(p_T, N, BLOCK)
        step += 1

    p_A, p_T = p_work + (step % 2) * 2 * SIZE, p_work + (1 - step % 2) * 2 * SIZE
    exact = error <= LAST
    if exact:
        _multiply(p_T + SIZE, p_A, p_A, p_A, 0.0, 21 / 16, -5 / 16, N, BLOCK)
        _multiply(p_T, p_A, p_T + SIZE, p_A, 35 / 16, -35 / 16, 1.0, N, BLOCK)
    else:
        _multiply(p_T, p_A, p_A, p_A, 15 / 8, -10 / 8, 3 / 8, N, BLOCK)
    shrink = tl.where(error == error, 1 / tl.sqrt(scale), error)
    _multiply(p_X, p_A + SIZE, p_T, p_T, 0.0, 0.0, shrink, N, BLOCK)

    # Tr √a = ½ Tr(aX) (3 − …), as in one more step of order 2: errors of X enter only to second order
    _multiply(p_work, p_a, p_X, p_X, 0.0, 0.0, 1.0, N, BLOCK)
    third = tl.zeros([BLOCK], tl.float64)
    for I in range(0, N, BLOCK):
        for J in range(0, I + 1, BLOCK):
            i, j = I + tl.arange(0, BLOCK), J + tl.arange(0, BLOCK)
            product = tl.sum(_product(p_work, p_work, i, j, N) * load_tile(p_X, i, j, N), 1)
            third += tl.where(I == J, 1.0, 2.0) * product
    first = trace(p_work, N, BLOCK)
    total = tl.where(exact, 1.5 * first - 0.5 * tl.sum(third, 0), first)
    square = error * error
    return tl.where(error == error, total, error), tl.where(exact, 35 / 128 * square * square, error)


@triton.jit
def _root_kernel(p_a, p_inverse, p_trace, p_error, p_work, m, N: tl.constexpr, BLOCK: tl.constexpr):
    i_set = tl.program_id(0).to(tl.int64)
    p_work += i_set * 6 * N * N
    p_a += i_set * m * m
    for I in range(0, N, BLOCK):
        for J in range(0, I + 1, BLOCK):
            i, j = I + tl.arange(0, BLOCK), J + tl.arange(0, BLOCK)
            inside = (i < m)[:, None] & (j < m)[None, :]
            a = tl.load(p_a + i[:, None] * m + j[None, :], mask=inside, other=0.0).to(tl.float64)
            mirrored = tl.load(p_a + j[None, :] * m + i[:, None], mask=inside, other=0.0).to(tl.float64)
            store_symmetric(p_work + 4 * N * N, 0.5 * a + 0.5 * mirrored, i, j, I, J, N)

    total, error = root(p_work, m, N, BLOCK)

    dtype: tl.constexpr = tl.float64 if p_trace.dtype.element_ty == tl.float64 else tl.float32
    for I in range(0, N, BLOCK):
        for J in range(0, N, BLOCK):
            i, j = I + tl.arange(0, BLOCK), J + tl.arange(0, BLOCK)
            X = load_tile(p_work + 5 * N * N, i, j, N).to(dtype)
            inside = (i < m)[:, None] & (j < m)[None, :]
            tl.store(p_inverse + i_set * m * m + i[:, None] * m + j[None, :], X, mask=inside)
    tl.store(p_trace + i_set, total.to(dtype))
    tl.store(p_error + i_set, error.to(tl.float32))


def shape_of(op: str, x: torch.Tensor, m: int) -> tuple[tuple[int, int], dict]:
    """N and BLOCK for matrices of m rows, and the options of their programs on x's card."""
    if not 1 <= m <= MOST:
        raise RuntimeError(f"{op} in Triton takes matrices of 1 to {MOST} rows, got {m}")
    if x.dtype not in ACCEPTED:
        raise TypeError(f"{op} in Triton takes float32, float64, bfloat16 or float16, got {x.dtype}")
    N = max(16, triton.next_power_of_2(m))
    # fusion is explicit, because its default differs between Triton versions
    options = {"num_warps": 8 if N > 32 else 4, "num_stages": 2, "enable_fp_fusion": True}
    return (N, min(N, 64)), on(x, options)


def forward(a):
    """a^−½ `[..., d, d]`, Σ √λ `[...]` and the iteration's error `[...]` in float32."""
    m, batch = a.shape[-1], a.shape[:-2]
    (N, block), options = shape_of("inverse_root", a, m)
    inverse = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    total = torch.empty(batch, dtype=a.dtype, device=a.device)
    error = torch.empty(batch, dtype=torch.float32, device=a.device)
    sets = batch.numel()
    if sets:
        work = torch.empty(sets, BUFFERS, N, N, dtype=torch.float64, device=a.device)
        _root_kernel[sets,](a.contiguous(), inverse, total, error, work, m, N, block, **options)
    return inverse, total, error
