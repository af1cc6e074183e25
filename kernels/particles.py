"""Particle sets in the layout of the pairwise kernels, and the building blocks that these share.

Every product in a pairwise kernel multiplies rows of d numbers with rows of d numbers, tile by tile. One pass writes
the rows centred, in float32 and padded to whole tiles with zeros, so that no inner loop deals with dtypes, strides or
edges. With q_i = ‖x_i‖²/2,

  u_ij = q_i + q_j − x_i·x_j = ‖x_i − x_j‖²/2 >= 0,

where q_i is half the diagonal of the same product. q is infinite in the padding, so that k = exp(−2u/h) is 0 there.
The rounding of a product may depend on a row's position, so equal rows, whose distance is 0, are recognised by a mark,
a hash of their bits. Rows far from the centre need more (far.py).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import far
from .card import card, on
from .far import CUT

# fusion is explicit, because its default differs between Triton versions
OPTIONS = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
ROWS = 64  # per packing program; n is padded to a multiple of twice as many
WIDE = 128  # up to this many dimensions, d is padded to a power of two

HALF = (torch.bfloat16, torch.float16)
LARGEST, SMALLEST = tl.constexpr(3.4028234e38), tl.constexpr(1.1754944e-38)  # normal float32
# More than the share of q_i + q_j that products of up to 8192 dimensions lose to rounding. Rows farther apart are not
# equal, whatever their marks; one in 2³² pairs of nearer rows has equal marks by chance.
LOST = tl.constexpr(2.0**-10)


@triton.jit
def as_operand(x, PRECISION: tl.constexpr):
    """x as a product in PRECISION reads it. TF32 keeps 10 of 23 bits: x is rounded here rather than truncated in the
    product, so that sums outside the product use the same number."""
    if PRECISION == "tf32":
        bits = x.to(tl.int32, bitcast=True)
        finite = (bits & 0x7F800000) != 0x7F800000
        x = tl.where(finite, (bits + 0x1000) & -0x2000, bits).to(tl.float32, bitcast=True)
    return x


@triton.jit
def tile(p, ld, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] at p, rows ld apart."""
    return tl.load(p + tl.arange(0, ROWS)[:, None] * ld + tl.arange(0, COLUMNS)[None, :])


@triton.jit
def add_product(c, p_a, p_b, D: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr):
    """c + A Bᵀ for packed rows A at p_a and B at p_b, as many as c has rows and columns respectively."""
    for k in range(0, D, WIDTH):
        b_a, b_b = tile(p_a + k, D, c.shape[0], WIDTH), tile(p_b + k, D, c.shape[1], WIDTH)
        c = tl.dot(b_a, tl.trans(b_b), c, input_precision=PRECISION)
    return c


@triton.jit
def half_diagonal(c):
    i = tl.arange(0, c.shape[0])
    return 0.5 * tl.sum(tl.where(i[:, None] == i[None, :], c, 0.0), 1)


@triton.jit
def mark_of(x, column):
    """Σ_k c_k bits(x_k) mod 2³² over these columns of rows [ROWS, WIDTH], c_k odd; the sum over all columns is the
    row's mark."""
    c = (column + 1) * 0x61C88647
    c = ((c ^ (c >> 15)) * 0x2C1B3C6D) | 1
    return tl.sum(tl.where(x == 0, 0, x.to(tl.int32, bitcast=True)) * c[None, :], 1)


@triton.jit
def half_distances(xx, q_i, q_j, mark_i, mark_j):
    """u_ij of rows i and j from their products; exactly 0 where the rows are equal."""
    norms = q_i[:, None] + q_j[None, :]
    u = tl.maximum(norms - xx, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.where((mark_i[:, None] == mark_j[None, :]) & (u < norms * LOST), 0.0, u)


@triton.jit
def positive_or_nan(h):
    """h, or NaN where it is not positive and finite."""
    return tl.where((h > 0) & (h < float("inf")), h, float("nan"))


@triton.jit
def bandwidth_at(p):
    return positive_or_nan(tl.load(p))


@triton.jit
def within(x, low, high):
    """x, no less than low and no more than high; NaN stays."""
    return tl.minimum(tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL), high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def mean_of_rows(x, n):
    """The mean of n rows of x, whose others are 0: Σx/n, exact where Σx is, so that equal distances stay equal; where
    float32 does not hold Σx, Σ(x/n), and a little less, so that no rounding overflows either."""
    mean = tl.div_rn(tl.sum(x, 0), n.to(tl.float32))  # `/` is off by an ulp or two on a GPU
    return tl.where(tl.abs(mean) < float("inf"), mean, tl.sum(x * (0.99999 / n), 0))


@triton.jit
def factors(h):
    """α, β, γ with γα = 1 and γβ = 2/h, and the factor 2 log2(e)/h of −u in k = 2^(…): finite for any h > 0. If h is
    NaN, so are α, γ and the factor, and with them all k'_ij for j ≠ i, also those of the padding."""
    two_over_h = within(2 / h, 0.0, LARGEST)
    exponent = within(2.8853900817779268 / h, SMALLEST, LARGEST)
    wide = h >= 1
    alpha = tl.where(wide, 1.0, 0.5 * h)
    return alpha, tl.where(wide, two_over_h, 1.0), tl.where(wide, 1.0, two_over_h), exponent


@triton.jit(do_not_specialize=["n"])
def _pack_kernel(
    p_x,
    p_centre,
    p_score,
    p_grad,
    p_bandwidth,
    p_X,
    p_V,
    p_G,
    p_q,
    p_mark,
    p_reach,
    p_p,
    n,
    d,
    N,
    WITH_V: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_set, i_tile = (tl.program_id(0) // (N // ROWS)).to(tl.int64), tl.program_id(0) % (N // ROWS)
    row = i_tile * ROWS + tl.arange(0, ROWS)
    inside = row < n
    if WITH_V:
        alpha, beta, _, _ = factors(bandwidth_at(p_bandwidth + i_set))

    xx = tl.zeros([ROWS, ROWS], tl.float32)
    mark = tl.zeros([ROWS], tl.int32)
    norm, gx = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for start in range(0, D, WIDTH):
        column = start + tl.arange(0, WIDTH)
        mask = inside[:, None] & (column < d)[None, :]
        given = (i_set * n + row)[:, None] * d + column[None, :]
        packed = (i_set * N + row)[:, None] * D + column[None, :]
        b_raw = tl.load(p_x + given, mask=mask, other=0.0).to(tl.float32)
        b_centre = tl.load(p_centre + i_set * d + column, mask=column < d, other=0.0)
        b_x = as_operand(within(tl.where(mask, b_raw - b_centre[None, :], 0.0), -CUT, CUT), PRECISION)
        xx = tl.dot(b_x, tl.trans(b_x), xx, input_precision=PRECISION)
        mark += mark_of(b_x, column)
        norm += tl.sum(b_x * b_x, 1)
        tl.store(p_X + packed, b_x)
        if WITH_V:
            # V = αS − βX; without a score S = −x
            b_s = -b_raw
            if p_score is not None:
                b_s = tl.load(p_score + given, mask=mask, other=0.0).to(tl.float32)
            tl.store(p_V + packed, as_operand(alpha * b_s - beta * b_x, PRECISION))
        if p_grad is not None:
            b_g = as_operand(tl.load(p_grad + given, mask=mask, other=0.0).to(tl.float32), PRECISION)
            gx += tl.sum(b_g * b_x, 1)
            tl.store(p_G + packed, b_g)

    tl.store(p_q + i_set * N + row, tl.where(inside, half_diagonal(xx), float("inf")))
    # not of q: Triton 3.6 cannot reduce the diagonal of a product again on sm_100
    tl.store(p_reach + tl.program_id(0), 0.5 * tl.max(norm, 0))
    tl.store(p_mark + i_set * N + row, mark)
    if p_grad is not None:
        tl.store(p_p + i_set * N + row, beta * gx)  # β g_i·x_i


class Packed(NamedTuple):
    """Centred X and its companions, `[sets, N, D]` and `[sets, N]`, zero beyond n and d; and x as it was given."""

    sets: int
    n: int
    d: int
    N: int
    D: int
    X: Tensor
    V: Tensor | None  # αS − βX
    G: Tensor | None  # the incoming gradient
    q: Tensor  # ‖x_i‖²/2
    mark: Tensor  # int32, the same for equal rows
    reach: Tensor  # the largest ‖x_i‖²/2 of every ROWS rows
    p: Tensor | None  # β g_i·x_i
    x: Tensor  # contiguous


def padded(d: int) -> int:
    """Dimensions of a packed row: a power of two or a multiple of WIDE."""
    return max(16, triton.next_power_of_2(d)) if d <= WIDE else triton.cdiv(d, WIDE) * WIDE


def shares(tiles: int, programs: int, device: torch.device, blocks: int) -> tuple[int, int]:
    """How many parts `tiles` are split into to fill a GPU that holds `blocks` programs per multiprocessor, if each part
    has `programs` programs; and tiles per part.

    Depends only on shapes and the GPU's size, which therefore determine the order of every sum.
    """
    share = triton.cdiv(tiles, max(1, min(tiles, card(device).programs(blocks) // max(1, programs))))
    return triton.cdiv(tiles, share), share


def check_dtype(op: str, x: Tensor) -> None:
    if x.dtype != torch.float32 and x.dtype not in HALF:
        raise TypeError(f"{op} in Triton takes float32, bfloat16 or float16, got {x.dtype}")


def precision(device: torch.device) -> str:
    """Precision of float32 products on this card, following PyTorch's setting.

    This is the setting that torch.backends.fp32_precision and torch.set_float32_matmul_precision also change;
    torch.get_float32_matmul_precision raises once the former was used.
    """
    return card(device).precision("tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3")


def exact(device: torch.device) -> str:
    """Precision of products on this card that are accurate to float32, whatever PyTorch's setting."""
    return card(device).precision("tf32x3")


def pack(x: Tensor, precision: str, width: int, *, score=None, bandwidth=None, grad=None, centre=None) -> Packed:
    """x `[..., n, d]` packed for products of `width` dimensions at a time, which q must also use; a bandwidth adds V, a
    gradient adds G and p. `centre` `[..., d]` if it is not x's own, its columns' medians."""
    sets, (n, d) = x.shape[:-2].numel(), x.shape[-2:]
    N, D = triton.cdiv(n, 2 * ROWS) * 2 * ROWS, padded(d)

    def empty(*shape, dtype=torch.float32):
        return torch.empty(sets, N, *shape, dtype=dtype, device=x.device)

    V, G, p = (
        empty(*shape) if wanted else None
        for shape, wanted in (
            ((D,), bandwidth is not None),
            ((D,), grad is not None),
            ((), grad is not None),
        )
    )
    x, reach = x.contiguous(), torch.empty(sets, N // ROWS, dtype=torch.float32, device=x.device)
    packed = Packed(sets, n, d, N, D, empty(D), V, G, empty(), empty(dtype=torch.int32), reach, p, x)
    if sets == 0:
        return packed
    centre = (far.centre(x) if centre is None else centre).contiguous()
    tensors = (t if t is None else t.contiguous() for t in (score, grad, bandwidth))
    _pack_kernel[sets * (N // ROWS),](
        *(x, centre, *tensors, packed.X, V, G, packed.q, packed.mark, reach, p, n, d, N),
        *(bandwidth is not None, D, ROWS, width, precision),
        **on(x, OPTIONS),
    )
    return packed
