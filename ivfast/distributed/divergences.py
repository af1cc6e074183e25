"""Losses over the samples of all ranks; every rank gets the same scalar. The algebra is that of the ops of the same
names."""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _check
from .._registry import exact
from ..ops import _collectives, frechet, importance
from ..ops import as_distance as one_as
from ..ops import fld as one_fld
from ..ops import mmd as one_mmd
from ..ops import multi_js as one_js
from ..ops._once import once_differentiable
from ..ops._pairwise import positive_or_nan
from .exchange import Rows, diagonal, distances, gather_rows, gathers, points, ring, rows_of, summed, tiles, total
from .stein import squared_median


def mmd(
    x: Tensor,
    y: Tensor,
    group=None,
    *,
    kernel: str = "imq",
    scales: tuple[float, ...] | None = None,
    bandwidth: float | Tensor | str | None = None,
    unbiased: bool = True,
    exchange: str = "auto",
    even: bool = False,
) -> Tensor:
    """MMD² between the samples x and y, whose rows are spread over the ranks; see `ivfast.mmd`.

    The ring compares a rank's rows with all others, n²/ranks kernel values, and adds the sums over the ranks.
    """
    x, y = _check.promoted(x, y)
    rows = rows_of(group, even, 2 if unbiased else 1, x=x, y=y)
    _check.alike("y", y, "x", x)
    if gathers(exchange, *rows):
        whole = (gather_rows(z, its) for z, its in zip((x, y), rows, strict=True))
        return one_mmd.mmd(*whole, kernel=kernel, scales=scales, bandwidth=bandwidth, unbiased=unbiased)
    _check.choice("kernel", kernel, one_mmd.KERNELS)
    factors = list(one_mmd.SCALES[kernel]) if scales is None else one_mmd._checked(scales)
    if bandwidth is None:
        bandwidth = 2.0 * x.shape[-1] if kernel == "imq" else "median"
    if isinstance(bandwidth, str):
        _check.choice("bandwidth", bandwidth, ("median",))
        b = squared_median(x, y, *rows)
    elif isinstance(bandwidth, Tensor):
        b = one_mmd._bandwidth(x, y, bandwidth)
    else:
        bandwidth = _check.number("bandwidth", bandwidth, positive=True)
        b = torch.full(x.shape[:-2], bandwidth, dtype=torch.float64, device=x.device)
    return _Mmd.apply(x, y, b, kernel == "imq", factors, unbiased, *rows)


def as_distance(
    mu_r: Tensor,
    logvar_r: Tensor,
    mu_g: Tensor,
    logvar_g: Tensor,
    group=None,
    *,
    kernel: str = "product",
    measure: str = "lebesgue",
    log: bool = False,
    unbiased: bool = False,
    exchange: str = "auto",
    even: bool = False,
) -> Tensor:
    """AS-Distance between posteriors whose rows are spread over the ranks; see `ivfast.as_distance`.

    The ring holds one tile of pairs, in all dimensions, in memory, and takes a second round for the gradient.
    """
    mu_r, logvar_r, mu_g, logvar_g = _check.promoted(mu_r, logvar_r, mu_g, logvar_g)
    rows = rows_of(group, even, 2 if unbiased else 1, mu_r=mu_r, mu_g=mu_g)
    _check.alike("mu_g", mu_g, "mu_r", mu_r)
    _check.same("logvar_r", logvar_r, "mu_r", mu_r)
    _check.same("logvar_g", logvar_g, "mu_g", mu_g)
    _check.choice("kernel", kernel, one_as.KERNELS)
    _check.choice("measure", measure, one_as.MEASURES)
    if gathers(exchange, *rows):
        whole: list[Tensor] = []
        for mu, logvar, its in ((mu_r, logvar_r, rows[0]), (mu_g, logvar_g, rows[1])):
            whole += gather_rows(torch.cat((mu, logvar), -1), its).chunk(2, -1)
        return one_as.as_distance(*whole, kernel=kernel, measure=measure, log=log, unbiased=unbiased)
    form = kernel == "additive", measure == "prior", log, unbiased
    return _AsDistance.apply(mu_r, logvar_r, mu_g, logvar_g, *form, *rows)


def multi_js_loss(
    logits: Tensor,
    group=None,
    *,
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    even: bool = False,
) -> Tensor:
    """The multi-class Jensen–Shannon loss over the rows of all ranks, each of which holds some rows of every block; see
    `ivfast.multi_js_loss`. Only a scalar is exchanged."""
    loss = one_js.multi_js_loss(logits, weights=weights, label_smoothing=label_smoothing)
    (rows,) = rows_of(group, even, logits=one_js._blocks(logits))
    return total(loss * (rows.counts[rows.rank] / rows.total), group)


def importance_weighted_loss(logits: Tensor, group=None, *, even: bool = False) -> Tensor:
    """IWGAN's generator loss, its weights normalised over the samples of all ranks; see
    `ivfast.importance_weighted_loss`. Every rank gathers all logits `[..., n_rank]`."""
    _check.floating("logits", logits)
    if logits.dim() < 1:
        raise ValueError(f"logits must have shape [..., n_rank], got {tuple(logits.shape)}")
    column = logits.unsqueeze(-1)
    (rows,) = rows_of(group, even, logits=column)
    return importance.importance_weighted_loss(gather_rows(column, rows).squeeze(-1))


def fld(z: Tensor, group=None, *, exchange: str = "auto", even: bool = False) -> Tensor:
    """Fréchet latent distance of the codes of all ranks to N(0, I); see `ivfast.fld`.

    With exchange "reduce", which "auto" chooses for many codes, means and covariances are summed over the ranks: d²
    numbers instead of n·d. The roots of eigenvalues below 1e-16 of the largest are then lost in rounding.
    """
    (rows,) = rows_of(group, even, 2, z=z)
    if gathers(exchange, rows, choices=("auto", "gather", "reduce")):
        return one_fld.fld(gather_rows(z, rows))
    x, n, d = z.double(), rows.total, z.shape[-1]
    mu = total(x.sum(-2), group) / n
    x = x - mu.unsqueeze(-2)
    sigma = total(x.mT @ x, group) / (n - 1)
    identity = torch.eye(d, dtype=x.dtype, device=x.device).expand_as(sigma)
    distance = frechet.frechet_distance(mu, sigma, torch.zeros_like(mu), identity)
    return distance.to(torch.promote_types(z.dtype, torch.float32))


class _Mmd(torch.autograd.Function):
    """The value and, in the same round of the ring, its gradient with respect to this rank's rows."""

    @staticmethod
    @exact
    def forward(ctx, x, y, bandwidth, imq, scales, unbiased, x_rows, y_rows):
        of_x, of_y = ctx.needs_input_grad[:2]
        sizes = torch.stack([s * bandwidth.double() for s in scales], -1)
        (X, Y), _, apart = points(x_rows.group, sizes, (x, x_rows), (y, y_rows))
        b, n, m = positive_or_nan(bandwidth.to(X.dtype))[..., None, None], x_rows.total, y_rows.total
        less = 1 if unbiased else 0
        w_xx, w_yy, w_xy = 1 / (n * (n - less)), 1 / (m * (m - less)), 1 / (n * m)
        value, dx, dy = torch.zeros(X.shape[:-2], dtype=torch.float64, device=X.device), None, None
        dx, dy = (torch.zeros_like(Z) if wanted else None for Z, wanted in ((X, of_x), (Y, of_y)))
        for owner, (A, B) in ring([X, Y], [x_rows, y_rows]):
            own = owner == x_rows.rank
            terms = [
                (X, A, own, w_xx, 4 * w_xx, dx),
                (Y, B, own, w_yy, 4 * w_yy, dy),
                (X, B, False, -2 * w_xy, -4 * w_xy, dx),
            ]
            if of_y:
                terms.append((Y, A, False, 0, -4 * w_xy, dy))
            for mine, theirs, same, weight, pull, gradient in terms:
                for i, j in tiles(mine, theirs):
                    d2 = distances(mine, theirs, i, j, same, apart)
                    k, slope = one_mmd._kernel(d2, b, imq, scales, gradient is not None)
                    if same and unbiased:
                        diagonal(k, i, j).zero_()
                    if weight:
                        value += weight * k.sum((-2, -1), dtype=torch.float64)
                    if gradient is not None:
                        if same:  # a pair of a sample with itself would cancel in exact arithmetic only
                            diagonal(slope, i, j).zero_()
                        gradient[..., i, :] += pull * one_mmd._pull(slope, mine[..., i, :], theirs[..., j, :])
        ctx.save_for_backward(dx, dy)
        ctx.group, ctx.dtype = x_rows.group, x.dtype
        return summed(value, x_rows.group).to(torch.promote_types(x.dtype, torch.float32))

    @staticmethod
    @once_differentiable
    @exact
    def backward(ctx, grad):
        grad = summed(grad, ctx.group)[..., None, None]
        return *(None if g is None else (grad * g).to(ctx.dtype) for g in ctx.saved_tensors), *[None] * 6


class _AsDistance(torch.autograd.Function):
    """In float64, like the reference: log k of far-apart posteriors is large, and shares of the sums are off by its
    rounding. What travels is as given."""

    @staticmethod
    @exact
    def forward(ctx, mu_r, logvar_r, mu_g, logvar_g, additive, prior, log, unbiased, r_rows, g_rows):
        given = mu_r, logvar_r, mu_g, logvar_g
        r, g = _wide(given[:2]), _wide(given[2:])
        sums = [r[0].new_full(mu_r.shape[:-2], -math.inf) for _ in range(3)]
        for owner, block in ring(given, (r_rows, r_rows, g_rows, g_rows)):
            own, block = owner == r_rows.rank, _wide(block)
            for k, (mine, theirs, same) in enumerate(((r, block[:2], own), (g, block[2:], own), (r, block[2:], False))):
                for log_k, _, _ in _log_kernels(mine, theirs, additive, prior, without_diagonal=same and unbiased):
                    sums[k] = torch.logaddexp(sums[k], log_k.flatten(-2).logsumexp(-1))
        sums = _log_total(torch.stack(sums, -1), r_rows.group)
        ctx.save_for_backward(*given, sums)
        ctx.form, ctx.rows = (additive, prior, log, unbiased), (r_rows, g_rows)
        rr, gg, rg = _log_means(sums, r_rows, g_rows, unbiased)
        value = rr + gg - 2 * rg if log else rr.exp() + gg.exp() - 2 * rg.exp()
        return value.to(torch.promote_types(mu_r.dtype, torch.float32))

    @staticmethod
    @once_differentiable
    @exact
    def backward(ctx, grad):
        *given, sums = ctx.saved_tensors
        (additive, prior, log, unbiased), (r_rows, g_rows) = ctx.form, ctx.rows
        grad = summed(grad, r_rows.group)
        means = _log_means(sums, r_rows, g_rows, unbiased)
        # ∂D/∂log-sums; within a batch each pair occurs twice, and so does the sample of a diagonal entry
        w_rr, w_gg, w_rg = (grad * f * (1 if log else s.exp()) for f, s in zip((2, 2, -2), means, strict=True))
        r, g = _wide(given[:2]), _wide(given[2:])
        gradients = [torch.zeros_like(z) for z in (*r, *g)]
        for owner, block in ring(given, (r_rows, r_rows, g_rows, g_rows)):
            own, a, b = owner == r_rows.rank, _wide(block[:2]), _wide(block[2:])
            for mine, theirs, same, k, w, into in (
                (r, a, own, 0, w_rr, gradients[:2]),
                (g, b, own, 1, w_gg, gradients[2:]),
                (r, b, False, 2, w_rg, gradients[:2]),
                (g, a, False, 2, w_rg, gradients[2:]),
            ):
                _add_pull(mine, theirs, sums[..., k], w, additive, prior, same and unbiased, into)
        return *(x.to(z.dtype) for x, z in zip(gradients, given, strict=True)), *[None] * 6


def _wide(tensors):
    return [x.detach().double() for x in tensors]


def _log_kernels(a, b, additive, prior, *, without_diagonal):
    """log k_ij in tiles `[..., R, C]`, each with its rows and columns; −∞ on the diagonal if it is left out."""
    for i, j in tiles(a[0], b[0], each=a[0].shape[-1]):
        mine, theirs = [x[..., i, :] for x in a], [x[..., j, :] for x in b]
        log_k = one_as._log_kernel(mine, theirs, additive, prior, without_diagonal=False)
        if without_diagonal:
            diagonal(log_k, i, j).fill_(-math.inf)
        yield log_k, i, j


def _add_pull(a, b, log_sum, weight, additive, prior, without_diagonal, into):
    """Add weight·Σ_j w_ij ∂log k_ij/∂a_i, where w_ij is the share of each pair in the sum."""
    for i, j in tiles(a[0], b[0], each=a[0].shape[-1]):
        with torch.enable_grad():
            mine = [x[..., i, :].detach().requires_grad_() for x in a]
            log_k = one_as._log_kernel(mine, [x[..., j, :] for x in b], additive, prior, without_diagonal=False)
        share = torch.exp(log_k.detach() - log_sum[..., None, None]) * weight[..., None, None]
        if without_diagonal:
            diagonal(share, i, j).zero_()
        for own, x in zip(into, torch.autograd.grad(log_k, mine, share), strict=True):
            own[..., i, :] += x


def _log_means(sums: Tensor, r_rows: Rows, g_rows: Rows, unbiased: bool) -> list[Tensor]:
    n, m, less = r_rows.total, g_rows.total, int(unbiased)
    pairs = n * (n - less), m * (m - less), n * m
    return [s - math.log(p) for s, p in zip(sums.unbind(-1), pairs, strict=True)]


def _log_total(sums: Tensor, group) -> Tensor:
    """log of the sum over the ranks of exp(sums)."""
    table = sums.new_empty(dist.get_world_size(group), *sums.shape)
    _collectives.all_gather(table.view(-1), sums.reshape(-1), group)
    return table.logsumexp(0)
