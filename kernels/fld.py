"""The latent distance ‖μ‖² + Tr(Σ + I) − 2 Tr √Σ of small codes and its gradient in Triton, in float64: three launches.

For n > d the matrix is Σ, computed over chunks of samples, each about its own mean, and combined by Chan's formula. For
n <= d it is CCᵀ, computed over chunks of dimensions, which only need their own means. In both cases the matrix has rows
i, min(n, d) of them, and its elements are sums over an axis l of the codes.
"""

import torch
import triton
import triton.language as tl

from ..ops._pairwise import arithmetic
from .card import card
from .inverse_root import BUFFERS, WIDTH, load_tile, root, shape_of, store_symmetric, trace, unit

ROWS = 32  # of the axis l, at a time
CHUNKS = 32  # per set at most; one program merges them
BLOCKS = 2  # programs per SM that fill a GPU


@triton.jit
def _load(p_z, l, i, count, m, d, WIDE: tl.constexpr):
    """z at l and rows i in float64, 0 beyond `count` and m."""
    at = i.to(tl.int64)[None, :] * d + l[:, None] if WIDE else l.to(tl.int64)[:, None] * d + i[None, :]
    return tl.load(p_z + at, mask=(l < count)[:, None] & (i < m)[None, :], other=0.0).to(tl.float64)


@triton.jit
def _centred(x, mean, l, i, count, m):
    return tl.where((l < count)[:, None] & (i < m)[None, :], x - mean, 0.0)


@triton.jit(do_not_specialize=["n", "m", "span", "chunks"])
def _scatter_kernel(
    p_z, p_parts, p_means, n, d, m, span, chunks,
    WIDE: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    i_part = tl.program_id(0).to(tl.int64)  # set and chunk
    tile = tl.program_id(1)  # 0, 1, 2: (0, 0), (1, 0), (1, 1)
    I, J = (tile + 1) // 2 * BLOCK, tile // 2 * BLOCK
    i, j, every = I + tl.arange(0, BLOCK), J + tl.arange(0, BLOCK), tl.arange(0, N)
    begin = i_part % chunks * span
    length = d if WIDE else n
    end = tl.minimum(begin + span, length)
    p_z += i_part // chunks * n * d
    p_means += i_part * N

    mean_i = tl.zeros([BLOCK], tl.float64)
    mean_j = tl.zeros([BLOCK], tl.float64)
    if not WIDE:
        for first in range(begin, end, ROWS):
            l = first + tl.arange(0, ROWS)
            mean_i += tl.sum(_load(p_z, l, i, end, m, d, WIDE), 0)
            mean_j += tl.sum(_load(p_z, l, j, end, m, d, WIDE), 0)
        mean_i /= end - begin
        mean_j /= end - begin
        if I == J:
            tl.store(p_means + i, mean_i)

    c = tl.zeros([BLOCK, BLOCK], tl.float64)
    square = tl.zeros([ROWS], tl.float64)
    for first in range(begin, end, ROWS):
        l = first + tl.arange(0, ROWS)
        x_i, x_j = _load(p_z, l, i, end, m, d, WIDE), _load(p_z, l, j, end, m, d, WIDE)
        if WIDE:
            mean = tl.sum(_load(p_z, l, every, end, m, d, WIDE), 1) / m
            square += mean * mean
            x_i, x_j = _centred(x_i, mean[:, None], l, i, end, m), _centred(x_j, mean[:, None], l, j, end, m)
        else:
            x_i, x_j = _centred(x_i, mean_i[None, :], l, i, end, m), _centred(x_j, mean_j[None, :], l, j, end, m)
        c = tl.dot(tl.trans(x_i), x_j, c, input_precision="ieee", out_dtype=tl.float64)

    tl.store(p_parts + i_part * N * N + i[:, None] * N + j[None, :], c)
    if WIDE:  # the same for every tile
        tl.store(p_means, tl.sum(square, 0))


@triton.jit
def _merge(p_parts, p_means, p_mu, p_a, n, m, span, chunks, WIDE: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    """Return ‖μ‖²; write the matrix to p_a and, for tall codes, the mean to p_mu."""
    if WIDE:
        square = tl.load(p_means)
        for chunk in range(1, chunks):
            square += tl.load(p_means + chunk * N)
    else:
        squares = tl.zeros([BLOCK], tl.float64)
        for I in range(0, N, BLOCK):
            i = I + tl.arange(0, BLOCK)
            mu = tl.zeros([BLOCK], tl.float64)
            for chunk in range(0, chunks):
                # μ = Σ_c n_c μ_c / n
                count = tl.minimum(span, n - chunk * span).to(tl.float64)
                mu += count / n * tl.load(p_means + chunk * N + i)
            tl.store(p_mu + i, mu)
            squares += mu * mu
        square = tl.sum(squares, 0)
    tl.debug_barrier()
    for I in range(0, N, BLOCK):
        for J in range(0, I + 1, BLOCK):
            i, j = I + tl.arange(0, BLOCK), J + tl.arange(0, BLOCK)
            a = tl.zeros([BLOCK, BLOCK], tl.float64)
            for chunk in range(0, chunks):
                a += load_tile(p_parts + chunk * N * N, i, j, N)
                if not WIDE:  # n_c (μ_c − μ)(μ_c − μ)ᵀ
                    count = tl.minimum(span, n - chunk * span).to(tl.float64)
                    u = tl.load(p_means + chunk * N + i) - tl.load(p_mu + i)
                    v = tl.load(p_means + chunk * N + j) - tl.load(p_mu + j)
                    a += count * u[:, None] * v[None, :]
            store_symmetric(p_a, a / (n - 1), i, j, I, J, N)
    tl.debug_barrier()
    return square


@triton.jit(do_not_specialize=["n", "d", "m", "span", "chunks"])
def _root_kernel(
    p_parts, p_means, p_mu, p_work, p_distance, p_error, n, d, m, span, chunks,
    WIDE: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_set = tl.program_id(0).to(tl.int64)
    p_work += i_set * 6 * N * N
    p_a = p_work + 4 * N * N

    p_means += i_set * chunks * N
    p_parts += i_set * chunks * N * N
    square = _merge(p_parts, p_means, p_mu + i_set * N, p_a, n, m, span, chunks, WIDE, N, BLOCK)
    size = trace(p_a, N, BLOCK)
    filled = size * 0
    if WIDE:  # 11ᵀ replaces the zero eigenvalue that centring leaves
        filled = size / (n - 1)
        tl.debug_barrier()
        for I in range(0, N, BLOCK):
            for J in range(0, N, BLOCK):
                i, j = I + tl.arange(0, BLOCK), J + tl.arange(0, BLOCK)
                inside = (i < m)[:, None] & (j < m)[None, :]
                tl.store(p_a + i[:, None] * N + j[None, :], load_tile(p_a, i, j, N) + filled / n, mask=inside)

    total, error = root(p_work, m, N, BLOCK)

    distance = square + size + d - 2 * (total - tl.sqrt(filled))
    tl.store(p_distance + i_set, distance.to(p_distance.dtype.element_ty))
    tl.store(p_error + i_set, error.to(tl.float32))


@triton.jit(do_not_specialize=["n", "m", "blocks"])
def _gradient_kernel(
    p_z, p_mu, p_work, p_gradient, n, d, m, blocks,
    WIDE: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    i_block = tl.program_id(0).to(tl.int64)
    i_set, start = i_block // blocks, i_block % blocks * ROWS
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    every = tl.arange(0, N)
    length = d if WIDE else n
    p_z += i_set * n * d
    p_gradient += i_set * n * d
    p_mu += i_set * N
    p_X = p_work + (i_set * 6 + 5) * N * N

    dtype: tl.constexpr = tl.float64 if p_gradient.dtype.element_ty == tl.float64 else tl.float32
    for first in range(start, length, blocks * ROWS):
        l = first + tl.arange(0, ROWS)
        if WIDE:
            mean = tl.sum(_load(p_z, l, every, length, m, d, WIDE), 1)[:, None] / m
        # (x − μ)(I − a^−½)
        c = tl.zeros([ROWS, BLOCK], tl.float64)
        for column in range(0, N, WIDTH):
            k = column + tl.arange(0, WIDTH)
            x = _load(p_z, l, k, length, m, d, WIDE)
            x = _centred(x, mean if WIDE else tl.load(p_mu + k)[None, :], l, k, length, m)
            c = tl.dot(x, unit(k, i) - load_tile(p_X, k, i, N), c, input_precision="ieee", out_dtype=tl.float64)
        mu = mean if WIDE else tl.load(p_mu + i)[None, :]
        gradient = ((2 * mu) / n + (2 * c) / (n - 1)).to(dtype)
        at = i.to(tl.int64)[None, :] * d + l[:, None] if WIDE else l.to(tl.int64)[:, None] * d + i[None, :]
        tl.store(p_gradient + at, gradient, mask=(l < length)[:, None] & (i < m)[None, :])


def forward(z, gradient):
    """The distance `[...]`, its gradient in z's dtype (empty unless requested) and the iteration's error `[...]`."""
    (n, d), batch = z.shape[-2:], z.shape[:-2]
    wide, m, length, sets = n <= d, min(n, d), max(n, d), batch.numel()
    (N, block), options = shape_of("fld_gram", z, m)
    out = torch.empty(z.shape if gradient else 0, dtype=z.dtype, device=z.device)
    z = arithmetic(z).contiguous()  # Triton 3.8 aborts if a float64 product reads values loaded in half precision
    distance = torch.empty(batch, dtype=z.dtype, device=z.device)
    error = torch.empty(batch, dtype=torch.float32, device=z.device)
    if sets == 0:
        return distance, out, error

    programs = card(z.device).programs(BLOCKS)
    span = max(2 * ROWS, triton.cdiv(length, max(1, min(CHUNKS, programs // sets))))
    chunks, blocks = triton.cdiv(length, span), min(triton.cdiv(length, ROWS), 16 * programs)
    parts, means, mu, work = (
        torch.empty(sets, *shape, dtype=torch.float64, device=z.device)
        for shape in ((chunks, N, N), (chunks, N), (N,), (BUFFERS, N, N))
    )
    tiles = 3 if block < N else 1
    _scatter_kernel[sets * chunks, tiles](z, parts, means, n, d, m, span, chunks, wide, N, block, ROWS, **options)
    _root_kernel[sets,](parts, means, mu, work, distance, error, n, d, m, span, chunks, wide, N, block, **options)
    if gradient:
        _gradient_kernel[sets * blocks, N // block](z, mu, work, out, n, d, m, blocks, wide, N, block, ROWS, **options)
    return distance, out, error
