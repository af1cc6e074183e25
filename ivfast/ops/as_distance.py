"""Adversarial Similarity Distance between two batches of diagonal Gaussians q(z|x) = N(u, diag l).

Per dimension, with s = l_i + l_j and δ = u_i − u_j, the integral of the product of two Gaussians is
ℓ = −½ [log 2πs + δ²/s]  (Lebesgue measure), and weighted by the prior N(0, 1), whose product with them is Gaussian too,
ℓ − ½ [log 2πp + m²/p],  p = 1 + l_i l_j/s,  m = (u_i l_j + u_j l_i)/s.
The kernel is exp Σ_d ℓ_d ("product", S5 Eq. 8) or mean_d exp ℓ_d ("additive", the per-dimension form in circulation).
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _check
from .._registry import register
from ._pairwise import arithmetic

KERNELS = ("product", "additive")
MEASURES = ("lebesgue", "prior")


def as_distance(
    mu_r: Tensor,
    logvar_r: Tensor,
    mu_g: Tensor,
    logvar_g: Tensor,
    *,
    kernel: str = "product",
    measure: str = "lebesgue",
    log: bool = False,
    unbiased: bool = False,
) -> Tensor:
    """D = mean k(r, r') + mean k(g, g') − 2 mean k(r, g), the squared distance between the mean posteriors.

    Args:
        mu_r, logvar_r: means and log-variances of the posteriors of real samples, `[..., n, d]`.
        mu_g, logvar_g: those of generated samples, `[..., m, d]`.
        kernel: "product", the integral over all d dimensions, or "additive", its mean over single dimensions.
        measure: "lebesgue" integrates over dz, "prior" over N(0, I), the literal E_{z~p(z)} of the paper.
        log: the scale-free form log mean k(r, r') + log mean k(g, g') − 2 log mean k(r, g), the Cauchy–Schwarz
            divergence of the two mean posteriors. D itself is below float32's range from d ≈ 64 on; this is not.
        unbiased: leave out the pairs of a sample with itself.

    Returns:
        D `[...]`, float32 for half precision; >= 0 for the biased form. Differentiable once, in all four.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit, an unknown kernel or measure, fewer than 2
            samples for the unbiased form (it has no pairs then).

    Source: S5 (AS-IntroVAE) Eqs. 5, 7, 8 with the exponential that Eq. 8 lost.
    """
    sums = log_gaussian_kernel_sums(mu_r, logvar_r, mu_g, logvar_g, kernel=kernel, measure=measure, unbiased=unbiased)
    n, m = mu_r.shape[-2], mu_g.shape[-2]
    pairs = (n * (n - 1), m * (m - 1), n * m) if unbiased else (n * n, m * m, n * m)
    rr, gg, rg = (s - math.log(p) for s, p in zip(sums.unbind(-1), pairs, strict=True))
    if log:
        return rr + gg - 2 * rg
    return rr.exp() + gg.exp() - 2 * rg.exp()


def log_gaussian_kernel_sums(
    mu_r: Tensor,
    logvar_r: Tensor,
    mu_g: Tensor,
    logvar_g: Tensor,
    *,
    kernel: str = "product",
    measure: str = "lebesgue",
    unbiased: bool = False,
) -> Tensor:
    """log Σ k over the pairs (r, r'), (g, g') and (r, g), which never underflow.

    Arguments, errors and derivative order are `as_distance`'s; with `unbiased` the sums within a batch leave out i = j.

    Returns:
        `[..., 3]`, float32 for half precision.

    Source: S5 (AS-IntroVAE) Eq. 8.
    """
    _check.two_samples("mu_r", mu_r, "mu_g", mu_g)
    _check.same("logvar_r", logvar_r, "mu_r", mu_r)
    _check.same("logvar_g", logvar_g, "mu_g", mu_g)
    _check.choice("kernel", kernel, KERNELS)
    _check.choice("measure", measure, MEASURES)
    if unbiased:
        for name, mu in (("mu_r", mu_r), ("mu_g", mu_g)):
            if mu.shape[-2] < 2:
                raise ValueError(
                    f"{name} must hold n >= 2 samples for unbiased=True, which leaves out pairs of a sample with "
                    f"itself and so has no pair left, got {tuple(mu.shape)}"
                )
    return _LogKernelSums.apply(mu_r, logvar_r, mu_g, logvar_g, kernel == "additive", measure == "prior", unbiased)


def log_gaussian_kernel_sums_reference(mu_r, logvar_r, mu_g, logvar_g, additive, prior, unbiased):
    r, g = (arithmetic(mu_r), arithmetic(logvar_r)), (arithmetic(mu_g), arithmetic(logvar_g))
    sums = [
        _log_kernel(a, b, additive, prior, without_diagonal=unbiased and a is b).flatten(-2).logsumexp(-1)
        for a, b in ((r, r), (g, g), (r, g))
    ]
    return torch.stack(sums, -1)


def _log_kernel(a, b, additive, prior, *, without_diagonal):
    """log k_ij `[..., n, m]`; −∞ on a diagonal left out."""
    l = _log_integral(a, b, prior)
    log_k = l.logsumexp(-1) - math.log(l.shape[-1]) if additive else l.sum(-1)
    if without_diagonal:
        eye = torch.eye(log_k.shape[-1], dtype=torch.bool, device=log_k.device)
        log_k = log_k.masked_fill(eye, -math.inf)
    return log_k


def _pairs(a, b):
    """u, l of both sides, broadcast to `[..., n, m, d]`."""
    (u_a, logvar_a), (u_b, logvar_b) = a, b
    return u_a.unsqueeze(-2), logvar_a.exp().unsqueeze(-2), u_b.unsqueeze(-3), logvar_b.exp().unsqueeze(-3)


def _log_integral(a, b, prior):
    """ℓ per pair and dimension `[..., n, m, d]`."""
    u_i, l_i, u_j, l_j = _pairs(a, b)
    s = l_i + l_j
    l = -0.5 * (torch.log(2 * math.pi * s) + (u_i - u_j).square() / s)
    if prior:
        p, m = 1 + l_i * l_j / s, (u_i * l_j + u_j * l_i) / s
        l = l - 0.5 * (torch.log(2 * math.pi * p) + m.square() / p)
    return l


def _backward_reference(grad, mu_r, logvar_r, mu_g, logvar_g, sums, additive, prior, unbiased):
    r, g = (arithmetic(mu_r), arithmetic(logvar_r)), (arithmetic(mu_g), arithmetic(logvar_g))
    form = additive, prior

    def within(a, k):
        # each pair (i, j) stands there twice, and so does the diagonal's one sample
        du, dl = _pull(a, a, sums[..., k], *form, without_diagonal=unbiased)
        weight = 2 * grad[..., k, None, None]
        return weight * du, weight * dl

    du_r, dl_r = within(r, 0)
    du_g, dl_g = within(g, 1)
    between = grad[..., 2, None, None]
    du_rg, dl_rg = _pull(r, g, sums[..., 2], *form, without_diagonal=False)
    du_gr, dl_gr = _pull(g, r, sums[..., 2], *form, without_diagonal=False)
    return (
        (du_r + between * du_rg).to(mu_r.dtype),
        (dl_r + between * dl_rg).to(mu_r.dtype),
        (du_g + between * du_gr).to(mu_g.dtype),
        (dl_g + between * dl_gr).to(mu_g.dtype),
    )


def _pull(a, b, log_sum, additive, prior, *, without_diagonal):
    """Gradient of log Σ_ij k_ij through a alone: Σ_j w_ij ∂ℓ_ij/∂(u_i, log l_i), w the share of each term."""
    log_k = _log_kernel(a, b, additive, prior, without_diagonal=without_diagonal)
    w = torch.exp(log_k - log_sum[..., None, None]).unsqueeze(-1)
    if additive:
        w = w * _log_integral(a, b, prior).softmax(-1)
    u_i, l_i, u_j, l_j = _pairs(a, b)
    s, delta = l_i + l_j, u_i - u_j
    du = -delta / s
    dl = 0.5 * (delta.square() / s - 1) / s
    if prior:
        p, m = 1 + l_i * l_j / s, (u_i * l_j + u_j * l_i) / s
        share = l_j / s
        du = du - m / p * share
        # ∂p/∂l_i = (l_j/s)², ∂m/∂l_i = −δ l_j/s²
        dl = dl - 0.5 * (1 - m.square() / p) / p * share.square() + m / p * share * delta / s
    return (w * du).sum(-2), (w * dl * l_i).sum(-2)


class _LogKernelSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mu_r, logvar_r, mu_g, logvar_g, additive, prior, unbiased):
        sums = _forward(mu_r, logvar_r, mu_g, logvar_g, additive, prior, unbiased)
        ctx.save_for_backward(mu_r, logvar_r, mu_g, logvar_g, sums)
        ctx.form = additive, prior, unbiased
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *_backward(grad, *ctx.saved_tensors, *ctx.form), None, None, None


_forward = register(
    "log_gaussian_kernel_sums(Tensor mu_r, Tensor logvar_r, Tensor mu_g, Tensor logvar_g, bool additive, bool prior,"
    " bool unbiased) -> Tensor",
    reference=log_gaussian_kernel_sums_reference,
)
_backward = register(
    "log_gaussian_kernel_sums_backward(Tensor grad, Tensor mu_r, Tensor logvar_r, Tensor mu_g, Tensor logvar_g,"
    " Tensor sums, bool additive, bool prior, bool unbiased)"
    " -> (Tensor dmu_r, Tensor dlogvar_r, Tensor dmu_g, Tensor dlogvar_g)",
    reference=_backward_reference,
)
