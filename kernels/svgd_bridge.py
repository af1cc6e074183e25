"""The SVGD bridge in Triton. For small particle sets one launch, with one program per set, does all iterations and
their medians. Larger sets, and backward, run the kernels of median.py and svgd.py, one iteration after another.

z ← z + step_size φ(z) + noise ε,  h = scale·med²/log n,  towards N(0, I): s = −z. The formulas are those of svgd.py.
"""

import torch
import triton
import triton.language as tl

from ..ops.median import heuristic
from . import median, svgd
from .card import Card, card, on
from .far import CUT, is_far
from .particles import (
    OPTIONS,
    as_operand,
    check_dtype,
    exact,
    factors,
    half_diagonal,
    half_distances,
    mark_of,
    mean_of_rows,
    padded,
    positive_or_nan,
    precision,
    within,
)
from .selection import Ranks, bits_of_pairs, shows

# largest n and d of a set that one program holds without spills (tests/test_cubins.py); not measured yet
SMALL_N, SMALL_D = 64, 16
SMALL_N_IN_TENSOR_MEMORY = 32  # Triton 3.6 does not compile 64 there
ELEMENTS = 1024


@triton.jit
def _distances(x, n, d, D: tl.constexpr, PRECISION: tl.constexpr):
    """For rows x that are 0 outside n and d: X, the centred x, its q and marks, and the half squared distances u."""
    i, c = tl.arange(0, x.shape[0]), tl.arange(0, D)
    inside = (i < n)[:, None] & (c < d)[None, :]
    X = as_operand(within(tl.where(inside, x - mean_of_rows(x, n)[None, :], 0.0), -CUT, CUT), PRECISION)
    xx = tl.dot(X, tl.trans(X), input_precision=PRECISION)
    q, mark = tl.where(i < n, half_diagonal(xx), float("inf")), mark_of(X, c)
    return X, q, mark, half_distances(xx, q, q, mark, mark)


@triton.jit
def _column(x, c, D: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, D)[None, :] == c, x, 0.0), 1)


@triton.jit
def _direct_distances(x, n, d, D: tl.constexpr):
    """u from differences, infinite in the padding."""
    i, u = tl.arange(0, x.shape[0]), tl.zeros([x.shape[0], x.shape[0]], tl.float32)
    for c in range(d):
        x_c = _column(x, c, D)
        apart = x_c[:, None] - x_c[None, :]
        u += 0.5 * apart * apart
    return tl.where((i < n)[:, None] & (i < n)[None, :], u, float("inf"))


@triton.jit
def _direct_sums(x, k, alpha, beta, d, D: tl.constexpr):
    """Σ_j k_ij (α s_j + β (x_i − x_j)), s = −x."""
    sums = tl.zeros(x.shape, tl.float32)
    for c in range(d):
        x_c = _column(x, c, D)
        term = k * (beta * (x_c[:, None] - x_c[None, :]) - alpha * x_c[None, :])
        sums += tl.where(tl.arange(0, D)[None, :] == c, tl.sum(tl.where(k == 0, 0.0, term), 1)[:, None], 0.0)
    return sums


@triton.jit(do_not_specialize=["n", "t", "iterations", "rank_0", "rank_1"])
def _forward_kernel(
    p_z,
    p_draws,
    p_bridges,
    p_states,
    p_bandwidths,
    p_row_sums,
    n,
    d,
    t,
    iterations,
    step_size,
    scale,
    noise,
    rank_0,
    rank_1,
    divisor,
    D: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
):
    i_set = tl.program_id(0).to(tl.int64)
    i, c = tl.arange(0, N), tl.arange(0, D)
    inside = (i < n)[:, None] & (c < d)[None, :]
    at = i_set * n * d + i[:, None] * d + c[None, :]
    size = tl.num_programs(0).to(tl.int64) * n * d
    x = tl.load(p_z + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(p_bridges + at, x, mask=inside)

    for bridge in range(1, t):
        for step in range((bridge - 1) * iterations, bridge * iterations):
            now = size * step
            _X, q, mark, u = _distances(x, n, d, D, EXACT)
            pair = (i[None, :] < i[:, None]) & (i < n)[:, None]
            if shows(u, q[:, None] + q[None, :], pair, 0.0):
                u = _direct_distances(x, n, d, D)
            m_0, m_1 = median.small_middles(
                tl.where(pair, bits_of_pairs(u, mark[:, None] != mark[None, :]), 0x7FFFFFFF), rank_0, rank_1
            )
            spread = tl.sum(tl.ravel(tl.where(pair & (i == 0)[None, :], 2 * u, 0.0)), 0) / n
            h = scale * median.bandwidth(m_0, m_1, spread, divisor, False)

            # φ = (1/n) [s + γ (K'V + β r'∘X)],  V = αs − βX,  s = −x
            b_h = positive_or_nan(h)
            alpha, beta, gamma, exponent = factors(b_h)
            if tl.max(is_far(q, b_h).to(tl.int32), 0) > 0:
                k = svgd.kernel_tile(_direct_distances(x, n, d, D), i, i, exponent)
                r = tl.sum(k, 1)
                sums = _direct_sums(x, k, alpha, beta, d, D)
            else:
                X, _q, _mark, near = _distances(x, n, d, D, PRECISION)
                k = as_operand(svgd.kernel_tile(near, i, i, exponent), PRECISION)
                r = tl.sum(k, 1)
                KV = tl.dot(k, as_operand(-alpha * x - beta * X, PRECISION), input_precision=PRECISION)
                sums = KV + beta * r[:, None] * X
            phi = (gamma * sums - x) / n

            tl.store(p_states + now + at, x, mask=inside)
            tl.store(p_bandwidths + tl.num_programs(0) * step + i_set, h)
            tl.store(p_row_sums + (tl.num_programs(0).to(tl.int64) * step + i_set) * n + i, 1 + r, mask=i < n)
            x += step_size * phi + noise * tl.load(p_draws + now + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(p_bridges + size * bridge + at, x, mask=inside)

    prior = tl.load(p_draws + size * ((t - 1) * iterations) + at, mask=inside, other=0.0)
    tl.store(p_bridges + size * t + at, prior, mask=inside)


@triton.jit(do_not_specialize=["size"])
def _step_kernel(p_x, p_phi, p_draw, p_next, p_bridge, size, step_size, noise, ELEMENTS: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    x = tl.load(p_x + at, mask=at < size) + step_size * tl.load(p_phi + at, mask=at < size)
    x += noise * tl.load(p_draw + at, mask=at < size).to(tl.float32)
    if p_next is not None:
        tl.store(p_next + at, x, mask=at < size)
    if p_bridge is not None:
        tl.store(p_bridge + at, x, mask=at < size)


def _one_program(n: int, d: int, card: Card) -> tuple[tuple[int, int], dict] | None:
    """D, N and options of the program that holds a whole set, or None if none can."""
    if n > (SMALL_N_IN_TENSOR_MEMORY if card.tensor_memory else SMALL_N) or d > SMALL_D:
        return None
    N = max(16, triton.next_power_of_2(n))
    return (padded(d), N), OPTIONS


def forward(z, draws, t, iterations, step_size, scale, noise):
    """The bridge `[t+1, ..., n, d]` and, for backward, the sets `[L, ..., n, d]` at which φ was evaluated, their
    bandwidths `[L, ...]` and row sums `[L, ..., n]`, L = (t − 1)·iterations."""
    check_dtype("svgd_bridge", z)
    z, draws, steps = z.contiguous(), draws.contiguous(), (t - 1) * iterations
    (n, d), sets = z.shape[-2:], z.shape[:-2].numel()
    bridges = torch.empty(t + 1, *z.shape, dtype=z.dtype, device=z.device)
    states, bandwidths, row_sums = (
        torch.empty(steps, *shape, dtype=torch.float32, device=z.device)
        for shape in (z.shape, z.shape[:-2], z.shape[:-1])
    )
    full, squared, divisor = heuristic(n, "paper")
    if sets == 0:
        return bridges, states, bandwidths, row_sums
    if program := _one_program(n, d, card(z.device)):
        (shape, options), ranks = program, Ranks.of(n, full)
        _forward_kernel[sets,](
            *(z, draws, bridges, states, bandwidths, row_sums, n, d, t, iterations),
            *(step_size, scale, noise, ranks.first, ranks.second, divisor),
            *(*shape, precision(z.device), exact(z.device)),
            **on(z, options),
        )
        return bridges, states, bandwidths, row_sums

    bridges[0].copy_(z)
    bridges[t].copy_(draws[steps])
    if steps:
        states[0].copy_(z)
    for step in range(steps):
        torch.mul(median.forward(states[step], full, squared, divisor)[0], scale, out=bandwidths[step])
        phi, row_sum = svgd.forward(states[step], None, bandwidths[step])
        row_sums[step].copy_(row_sum)
        following = states[step + 1] if step + 1 < steps else None
        kept = bridges[(step + 1) // iterations] if (step + 1) % iterations == 0 else None
        _step_kernel[triton.cdiv(z.numel(), ELEMENTS),](
            *(states[step], phi, draws[step], following, kept, z.numel(), step_size, noise, ELEMENTS),
            **on(z, OPTIONS),
        )
    return bridges, states, bandwidths, row_sums


def backward(grad, states, bandwidths, row_sums, iterations, step_size):
    """∂L/∂z, given grad = ∂L/∂bridges `[t+1, ..., n, d]`."""
    check_dtype("svgd_bridge_backward", grad)
    g = torch.zeros(grad.shape[1:], dtype=torch.float32, device=grad.device)
    for step in reversed(range(states.shape[0])):
        if (step + 1) % iterations == 0:
            g += grad[(step + 1) // iterations]
        g += svgd.backward(step_size * g, states[step], None, bandwidths[step], row_sums[step], False)[0]
    return (g + grad[0]).to(grad.dtype)
