"""Stein variational gradient descent for particles spread over ranks. The algebra is that of ops/svgd.py."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import _check
from .._registry import exact
from ..ops import median, svgd
from ..ops import mmd as one_mmd
from ..ops._draws import prior_draws
from ..ops._once import once_differentiable
from ..ops._pairwise import arithmetic, pooled, positive_or_nan
from ..ops.svgd_bridge import svgd_bridge as _bridge_of_one
from .exchange import (
    Points,
    Rows,
    centred,
    diagonal,
    distances,
    gather_rows,
    gathers,
    lost,
    points,
    ring,
    rows_of,
    summed,
    tiles,
    uncentred,
)


def svgd_direction(
    x: Tensor,
    group=None,
    *,
    score: Tensor | None = None,
    bandwidth: float | Tensor | str = "median",
    scale: float = 1.0,
    convention: str = "liu-wang",
    exchange: str = "auto",
    even: bool = False,
) -> Tensor:
    """This rank's rows of the SVGD direction φ for the particles of all ranks.

    Arguments are those of `ivfast.svgd_direction`; x and score `[..., n_rank, d]` hold this rank's particles. A tensor
    bandwidth must have the same values on every rank, and gets the gradient of this rank's rows.

    The ring computes n_rank·n pairs on each rank, in O(n_rank d) memory. The exact median needs three more such passes
    (six in float64, and six more for far-apart particles) first; pass a bandwidth if that takes too long.
    """
    x, score = _check.promoted(x, score)
    (rows,) = rows_of(group, even, x=x)
    if score is not None:
        _check.same("score", score, "x", x)
    scale = _check.number("scale", scale, positive=True)
    if gathers(exchange, rows):
        whole = gather_rows(x, rows)
        target = None if score is None else gather_rows(score, rows)
        phi = svgd.svgd_direction(whole, target, bandwidth=bandwidth, scale=scale, convention=convention)
        return rows.own(phi)
    if isinstance(bandwidth, str):
        _check.choice("bandwidth", bandwidth, ("median",))
        _check.choice("convention", convention, median.CONVENTIONS)
        h = _Median.apply(x.detach(), rows, rows, *median.heuristic(rows.total, convention)) * scale
    else:
        h = svgd._bandwidth(x, bandwidth, scale, convention)
    return _Direction.apply(x, score, h, rows)


def median_bandwidth(
    x: Tensor, group=None, *, convention: str = "liu-wang", exchange: str = "auto", even: bool = False
) -> Tensor:
    """The median heuristic over the particles of all ranks, the same on each; see `ivfast.median_bandwidth`.

    The ring selects 11 bits at a time: three passes over the pairs (six in float64, and six more for particles far
    apart beside the median), and one for the gradient.
    """
    (rows,) = rows_of(group, even, x=x)
    _check.choice("convention", convention, median.CONVENTIONS)
    if gathers(exchange, rows):
        return median.median_bandwidth(gather_rows(x, rows), convention=convention)
    h = _Median.apply(x, rows, rows, *median.heuristic(rows.total, convention))
    return h.to(torch.promote_types(x.dtype, torch.float32))


def squared_median(x: Tensor, y: Tensor, x_rows: Rows, y_rows: Rows) -> Tensor:
    """The squared median distance of the pooled samples `[...]` by the ring, in the dtype of its arithmetic; see
    `ops.median.squared_median`."""
    counts = [n + m for n, m in zip(x_rows.counts, y_rows.counts, strict=True)]
    full, squared, _ = median.heuristic(sum(counts), "paper")
    return _Median.apply(pooled(x, y), x_rows._replace(counts=tuple(counts)), x_rows, full, squared, 1.0)


def svgd_bridge(
    z: Tensor,
    t: int,
    group=None,
    *,
    iterations: int = 2,
    step_size: float = 1.0,
    scale: float = 100.0,
    noise: float = 0.1,
    draws: Tensor | None = None,
    generator=None,
    exchange: str = "auto",
    even: bool = False,
) -> Tensor:
    """This rank's rows `[t+1, ..., n_rank, d]` of S1's SVGD bridge for the codes of all ranks.

    Arguments are those of `ivfast.svgd_bridge`. `draws` are for this rank's rows; None draws them from this rank's
    generator, whose seed must differ from that of every other rank.
    """
    t = _check.count("t", t)
    iterations = _check.count("iterations", iterations)
    step_size = _check.number("step_size", step_size)
    scale = _check.number("scale", scale, positive=True)
    noise = _check.number("noise", noise, non_negative=True)
    z, draws = _check.promoted(z, draws)
    (rows,) = rows_of(group, even, z=z)
    draws = prior_draws(z, draws, generator, leading=((t - 1) * iterations + 1,))
    if gathers(exchange, rows):
        whole, drawn = gather_rows(z, rows), gather_rows(draws, rows)
        return rows.own(
            _bridge_of_one(whole, t, iterations=iterations, step_size=step_size, scale=scale, noise=noise, draws=drawn)
        )
    x, bridges = arithmetic(z), [z]
    for step, draw in enumerate(draws[:-1].unbind(0)):
        h = scale * _Median.apply(x.detach(), rows, rows, *median.heuristic(rows.total, "paper"))
        x = x + step_size * _Direction.apply(x, None, h, rows) + noise * arithmetic(draw)
        if (step + 1) % iterations == 0:
            bridges.append(x.to(z.dtype))
    return torch.stack([*bridges, draws[-1]])


class _Direction(torch.autograd.Function):
    """φ in one round of the ring and its gradient in a second, in which blocks travel with the gradient of their rows.

    With K' = K − I and r' = K'1, a particle's own term is added separately and exactly, however narrow the kernel:
    φ_i = (1/n) [s_i + (K'V)_i + (2/h) r'_i x_i], V = S − (2/h) X.
    """

    @staticmethod
    @exact
    def forward(ctx, x, score, bandwidth, rows):
        (X,), centre, apart = points(rows.group, bandwidth.unsqueeze(-1), (x, rows))
        h = positive_or_nan(bandwidth.to(X.dtype))[..., None, None]
        pull, r = torch.zeros_like(X), torch.zeros_like(X[..., :1])
        travelling = [X] if score is None else [X, score.to(X.dtype)]
        for owner, block in ring(travelling, [rows] * len(travelling)):
            own = owner == rows.rank
            Y, V = block[0], _values(block, centre, h)
            for i, j in tiles(X, Y):
                kernel = _others(distances(X, Y, i, j, own, apart).div_(-h).exp_(), i, j, own)
                pull[..., i, :] += kernel @ V[..., j, :]
                r[..., i, :] += kernel.sum(-1, keepdim=True)
        ctx.save_for_backward(X, score, bandwidth, centre, r)
        ctx.rows, ctx.apart, ctx.dtype = rows, apart, x.dtype
        S = -(X + centre) if score is None else travelling[1]
        return ((S + pull + (2 / h) * r * X) / rows.total).to(x.dtype)

    @staticmethod
    @once_differentiable
    @exact
    def backward(ctx, grad):
        X, score, bandwidth, centre, r = ctx.saved_tensors
        rows, n, h = ctx.rows, ctx.rows.total, positive_or_nan(bandwidth.to(X.dtype))[..., None, None]
        G = grad.to(X.dtype)
        own_block = [X] if score is None else [X, score.to(X.dtype)]
        V, gx = _values(own_block, centre, h), (G * X).sum(-1, keepdim=True)
        BX, dS, KX, b = torch.zeros_like(X), torch.zeros_like(X), torch.zeros_like(X), torch.zeros_like(r)
        stretch = torch.zeros_like(h)  # Σ W∘d² over this rank's rows
        by_bandwidth = ctx.needs_input_grad[2]
        for owner, block in ring([*own_block, G], [rows] * (len(own_block) + 1)):
            own = owner == rows.rank
            *block, H = block
            Y, U = block[0], _values(block, centre, h)
            hy = (H * Y).sum(-1, keepdim=True)
            for i, j in tiles(X, Y):
                d2 = distances(X, Y, i, j, own, ctx.apart)
                kernel = _others(torch.exp(-d2 / h), i, j, own) / n
                # W_ij = (g_i·v_j + (2/h) g_i·x_i) k'_ij/n, B = W + Wᵀ
                W = (G[..., i, :] @ U[..., j, :].mT + (2 / h) * gx[..., i, :]) * kernel
                B = W + (V[..., i, :] @ H[..., j, :].mT + (2 / h) * hy[..., j, :].mT) * kernel
                BX[..., i, :] += B @ Y[..., j, :]
                b[..., i, :] += B.sum(-1, keepdim=True)
                dS[..., i, :] += kernel @ H[..., j, :]
                if by_bandwidth:
                    stretch += (W * d2).sum((-2, -1), keepdim=True)
                    KX[..., i, :] += kernel @ Y[..., j, :]
        # ∂X = −(2/h)[(B1)∘X − B X] + (2/(hn)) r'∘G − (2/h) K'G/n,  ∂S = (G + K'G)/n
        dX = (2 / h) * (BX - b * X + r * G / n - dS)
        dS += G / n
        dh = None
        if by_bandwidth:
            rest = 2 * (G * KX).sum((-2, -1)) - 2 / n * (r * gx).sum((-2, -1))
            dh = ((stretch[..., 0, 0] + rest) / h[..., 0, 0].square()).to(bandwidth.dtype)
        if score is None:
            return (dX - dS).to(ctx.dtype), None, dh, None
        return dX.to(ctx.dtype), dS.to(score.dtype), dh, None


def _others(kernel: Tensor, i: slice, j: slice, own: bool) -> Tensor:
    """A tile of K' = K − I."""
    if own:
        diagonal(kernel, i, j).zero_()
    return kernel


def _values(block: list[Tensor], centre: Tensor, h: Tensor) -> Tensor:
    """V = S − (2/h) X; for the standard normal, S = −(X + centre) is computed instead of sent."""
    X, *S = block
    return (S[0] if S else -(X + centre)) - (2 / h) * X


class _Median(torch.autograd.Function):
    """h, in the dtype of its arithmetic, by radix selection of the middle squared distances: one round of the ring per
    digit, with counts summed over the ranks. The first particle is that of the rows of `first`."""

    @staticmethod
    @exact
    def forward(ctx, x, rows, first, full, squared, divisor):
        its = centred(rows.group, (x, rows))
        middles = _middles(its, rows, full)
        if lost(rows.group, middles, its):
            its = uncentred((x, rows))
            middles = _middles(its, rows, full)
        (X,) = its.rows
        spread = summed(median.squares_about(X, _first(X, first)), rows.group) / rows.total
        h, middles = median.from_middles(middles, spread.to(X.dtype), squared, divisor)
        ctx.save_for_backward(X, middles)
        ctx.rows, ctx.apart, ctx.heuristic, ctx.dtype = rows, its.apart, (squared, divisor), x.dtype
        return h

    @staticmethod
    @once_differentiable
    @exact
    def backward(ctx, grad):
        X, middles = ctx.saved_tensors
        rows, (squared, divisor) = ctx.rows, ctx.heuristic
        counts = torch.zeros_like(middles, dtype=torch.int64)
        pull = X.new_zeros(2, *X.shape)  # Σ_j (c_ij + c_ji)(x_i − x_j), where c_ij marks the middle pairs
        for owner, (Y,) in ring([X], [rows]):
            for i, j, d2 in _pairs(X, Y, rows, owner, ctx.apart):
                for a, middle in enumerate(middles.unbind(-1)):
                    c = (d2 == middle[..., None, None]).to(X.dtype)
                    counts[..., a] += c.sum((-2, -1), dtype=torch.int64)
                    own = owner == rows.rank  # otherwise the other rank finds the pair's mirror entry, bitwise equal
                    pull[a, ..., i, :] += (1 if own else 2) * one_mmd._pull(c, X[..., i, :], Y[..., j, :])
                    if own:
                        pull[a, ..., j, :] += one_mmd._pull(c.mT, X[..., j, :], X[..., i, :])
        share = median._slope(middles, squared) / summed(counts, rows.group)
        share = share * (summed(grad, rows.group) / divisor).unsqueeze(-1)
        dx = 2 * sum(s[..., None, None] * p for s, p in zip(share.unbind(-1), pull, strict=True))
        med2 = median._combine(middles, squared)[..., None, None]
        return torch.where(med2 == 0, 0, dx + 0 * med2).to(ctx.dtype), *[None] * 5


def _first(X: Tensor, rows: Rows) -> Tensor:
    """The first of all particles `[..., 1, d]`."""
    holder = next(rank for rank, count in enumerate(rows.counts) if count)
    return summed(X[..., :1, :] if rows.rank == holder else X.new_zeros(*X.shape[:-2], 1, X.shape[-1]), rows.group)


def _pairs(X: Tensor, Y: Tensor, rows: Rows, owner: int, apart: bool) -> Iterator[tuple[slice, slice, Tensor]]:
    """Tiles of squared distances, in the order of the ranks, so that two ranks get bitwise equal values for a pair they
    share."""
    own = owner == rows.rank
    if owner < rows.rank:
        yield from ((i, j, distances(Y, X, j, i, own, apart).mT) for j, i in tiles(Y, X, each=4))
    else:
        yield from ((i, j, distances(X, Y, i, j, own, apart)) for i, j in tiles(X, Y, each=4))


BITS = 11  # per digit


def _middles(its: Points, rows: Rows, full: bool) -> Tensor:
    """The two middle squared distances `[..., 2]`. Non-negative floats sort in the order of their bits.

    Without the diagonal each pair occurs twice in the matrix, so rank q among the pairs is rank 2q among the entries.
    """
    (X,) = its.rows
    n, sets = rows.total, X.shape[:-2].numel()
    full = full or n == 1
    count = n * n if full else n * (n - 1) // 2
    places = [(count - 1) // 2, count // 2] if full else [(count - 1) // 2 * 2, count // 2 * 2]
    rank = torch.tensor(places, device=X.device).expand(sets, 2).contiguous()
    integers, bits = (torch.int64, 63) if X.dtype == torch.float64 else (torch.int32, 31)
    prefix = torch.zeros(sets, 2, dtype=integers, device=X.device)
    base = torch.arange(2 * sets, device=X.device).view(sets, 2, 1, 1) << BITS
    while bits:
        width = min(BITS, bits)
        bits -= width
        counts = torch.zeros((2 * sets << BITS) + 1, dtype=torch.int64, device=X.device)
        for owner, (Y,) in ring([X], [rows]):
            for i, j, d2 in _pairs(X, Y, rows, owner, its.apart):
                if owner == rows.rank and not full:
                    diagonal(d2, i, j).fill_(torch.inf)
                digits = d2.view(integers).reshape(sets, 1, *d2.shape[-2:]) >> bits
                known = (digits >> width) == prefix[..., None, None]
                place = base + (digits & ((1 << width) - 1))
                counts += torch.bincount(torch.where(known, place, len(counts) - 1).flatten(), minlength=len(counts))
        below = summed(counts, rows.group)[:-1].view(sets, 2, 1 << BITS).cumsum(-1)
        digit = (below <= rank.unsqueeze(-1)).sum(-1)
        rank -= torch.where(digit > 0, below.gather(-1, (digit - 1).clamp_min(0).unsqueeze(-1)).squeeze(-1), 0)
        prefix = (prefix << width) | digit.to(integers)
    return prefix.view(X.dtype).view(*X.shape[:-2], 2)
