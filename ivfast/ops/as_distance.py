"""Adversarial Similarity Distance between two batches of diagonal Gaussians q(z|x) = N(u, diag l).

Let s = l_i + l_j and δ = u_i − u_j. In one dimension the integral of the product of two Gaussians is e^ℓ with
ℓ = −½ [log 2πs + δ²/s]  (Lebesgue measure), or, weighted by the prior N(0, 1),
ℓ = −½ [log 4π²P + (δ² + u_i² l_j + u_j² l_i)/P],  P = s + l_i l_j.
The kernel is exp Σ_d ℓ_d ("product", S5 Eq. 8) or mean_d exp ℓ_d ("additive", the per-dimension form found in
published code).
"""

import math

import torch
from torch import Tensor

from .. import _check
from .._registry import register
from ._derivatives import differentiable
from ._pairwise import small_in_cuda

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
        kernel: "product" integrates over all d dimensions; "additive" averages the integrals over single dimensions.
        measure: "lebesgue" integrates over dz; "prior" over N(0, I), the literal E_{z~p(z)} of the paper.
        log: return the scale-free form log mean k(r, r') + log mean k(g, g') − 2 log mean k(r, g), the
            Cauchy–Schwarz divergence of the two mean posteriors. D itself underflows float32 from d ≈ 64 on; this
            form does not.
        unbiased: leave out the pairs of a sample with itself.

    Returns:
        D `[...]`, float32 for half precision; >= 0 for the biased form. Differentiable in all four arguments;
        forward mode and higher orders take O(nmd) memory.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit, an unknown kernel or measure, or fewer than
            2 samples for the unbiased form, which then has no pairs.

    Source: S5 (AS-IntroVAE) Eqs. 5, 7 and 8, with the exponential that is missing from Eq. 8.
    """
    return _apply(mu_r, logvar_r, mu_g, logvar_g, kernel, measure, log, unbiased)[0]


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
    """log Σ k over the pairs (r, r'), (g, g') and (r, g); these logarithms never underflow.

    Arguments, errors and derivative order are those of `as_distance`. With `unbiased` the sums within a batch leave
    out i = j.

    Returns:
        `[..., 3]`, float32 for half precision.

    Source: S5 (AS-IntroVAE) Eq. 8.
    """
    value, sums = _apply(mu_r, logvar_r, mu_g, logvar_g, kernel, measure, True, unbiased)
    return sums.to(value.dtype)


def _apply(mu_r, logvar_r, mu_g, logvar_g, kernel, measure, log, unbiased):
    """D `[...]` and the log-sums `[..., 3]`, these in float64: gradients divide by the sums."""
    mu_r, logvar_r, mu_g, logvar_g = _check.promoted(mu_r, logvar_r, mu_g, logvar_g)
    _check.two_samples("mu_r", mu_r, "mu_g", mu_g)
    _check.same("logvar_r", logvar_r, "mu_r", mu_r)
    _check.same("logvar_g", logvar_g, "mu_g", mu_g)
    _check.choice("kernel", kernel, KERNELS)
    _check.choice("measure", measure, MEASURES)
    if unbiased:
        for name, mu in (("mu_r", mu_r), ("mu_g", mu_g)):
            if mu.shape[-2] < 2:
                raise ValueError(
                    f"{name} must hold n >= 2 samples for unbiased=True, which leaves out the pairs of a sample "
                    f"with itself, got {tuple(mu.shape)}"
                )
    return _distance(mu_r, logvar_r, mu_g, logvar_g, kernel == "additive", measure == "prior", log, unbiased)


def as_distance_reference(mu_r, logvar_r, mu_g, logvar_g, additive, prior, log, unbiased):
    r, g = (mu_r.double(), logvar_r.double()), (mu_g.double(), logvar_g.double())
    sums = torch.stack(
        [
            _log_kernel(a, b, additive, prior, without_diagonal=unbiased and a is b).flatten(-2).logsumexp(-1)
            for a, b in ((r, r), (g, g), (r, g))
        ],
        -1,
    )
    rr, gg, rg = _log_means(sums, mu_r, mu_g, unbiased)
    value = rr + gg - 2 * rg if log else rr.exp() + gg.exp() - 2 * rg.exp()
    wide = torch.promote_types(mu_r.dtype, torch.float32)
    return value.to(wide), sums


def _log_means(sums, mu_r, mu_g, unbiased):
    n, m = mu_r.shape[-2], mu_g.shape[-2]
    pairs = (n * (n - 1), m * (m - 1), n * m) if unbiased else (n * n, m * m, n * m)
    return [s - math.log(p) for s, p in zip(sums.unbind(-1), pairs, strict=True)]


BLOCK = 1 << 27  # bytes of an array over pairs and dimensions; about ten are held at once


def _blocks(a, b):
    """The samples of a in blocks of rows `(u, log l)`, with the pairs of a sample with itself, None between batches.

    Their arrays over pairs and dimensions stay within `BLOCK`, unless a single row is larger.
    """
    u, log_l = a
    n, m = u.shape[-2], b[0].shape[-2]
    index = torch.arange(m, device=u.device)
    size = max(1, BLOCK // max(1, u[..., :1, :].numel() * m * u.element_size()))
    for first in range(0, n, size):
        rows = slice(first, first + size)
        own = index[rows].unsqueeze(-1) == index if a is b else None
        yield (u[..., rows, :], log_l[..., rows, :]), own


def _differences(a, b, own):
    """u_i − u_j `[..., n, m, d]`, constant where i and j are the same sample: there the derivatives, up to 1/P, cancel
    in exact arithmetic only."""
    difference = a[0].unsqueeze(-2) - b[0].unsqueeze(-3)
    return difference if own is None else difference.masked_fill(own.unsqueeze(-1), 0)


def _log_kernel(a, b, additive, prior, *, without_diagonal):
    """log k_ij `[..., n, m]`; −∞ on the diagonal if it is left out."""
    blocks = []
    for block, own in _blocks(a, b):
        l = _log_integral(block, b, prior, own)
        log_k = l.logsumexp(-1) - math.log(l.shape[-1]) if additive else l.sum(-1)
        blocks.append(log_k.masked_fill(own, -math.inf) if without_diagonal else log_k)
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, -2)


def _pairs(a, b, prior):
    """u_i, log l_i, u_j, log l_j and log P, broadcast to `[..., n, m, d]`; a variance may overflow."""
    (u_i, log_i), (u_j, log_j) = a, b
    u_i, log_i, u_j, log_j = u_i.unsqueeze(-2), log_i.unsqueeze(-2), u_j.unsqueeze(-3), log_j.unsqueeze(-3)
    log_P = torch.logaddexp(log_i, log_j)
    return u_i, log_i, u_j, log_j, torch.logaddexp(log_P, log_i + log_j) if prior else log_P


def _log_integral(a, b, prior, own):
    """ℓ per pair and dimension `[..., n, m, d]`."""
    u_i, log_i, u_j, log_j, log_P = _pairs(a, b, prior)
    ratio = (_differences(a, b, own) * (-0.5 * log_P).exp()).square()
    if prior:
        ratio = ratio + (u_i * (0.5 * (log_j - log_P)).exp()).square() + (u_j * (0.5 * (log_i - log_P)).exp()).square()
    return -0.5 * (log_P + ratio) - (0.5 + 0.5 * prior) * math.log(2 * math.pi)


def _backward_reference(mu_r, logvar_r, mu_g, logvar_g, sums, dvalue, dsums, additive, prior, log, unbiased):
    """`dvalue` `[...]` and `dsums` `[..., 3]` are the gradients of forward's results; None means zeros."""
    r, g = (mu_r.double(), logvar_r.double()), (mu_g.double(), logvar_g.double())
    dsums = torch.zeros_like(sums) if dsums is None else dsums
    if dvalue is not None:
        terms = [torch.ones_like(dvalue)] * 3 if log else [s.exp() for s in _log_means(sums, mu_r, mu_g, unbiased)]
        rr, gg, rg = terms  # ∂D/∂log-sums, without the factor −2
        dsums = dsums + torch.stack((rr, gg, -2 * rg), -1) * dvalue.unsqueeze(-1)
    w_rr, w_gg, w_rg = dsums[..., None, None].unbind(-3)

    def pull(a, b, k):
        return _pull(a, b, additive, prior, without_diagonal=unbiased and k < 2)

    # within a batch each pair (i, j) occurs twice, and so does the sample of a diagonal entry
    du_r, dl_r = (2 * w_rr * x + w_rg * y for x, y in zip(pull(r, r, 0), pull(r, g, 2), strict=True))
    du_g, dl_g = (2 * w_gg * x + w_rg * y for x, y in zip(pull(g, g, 1), pull(g, r, 2), strict=True))
    return du_r.to(mu_r.dtype), dl_r.to(mu_r.dtype), du_g.to(mu_g.dtype), dl_g.to(mu_g.dtype)


def _pull(a, b, additive, prior, *, without_diagonal):
    """Gradient of log Σ_ij k_ij through a only: Σ_j w_ij ∂ℓ_ij/∂(u_i, log l_i), where w_ij is the share of k_ij."""
    log_k = _log_kernel(a, b, additive, prior, without_diagonal=without_diagonal)
    shares, first, found = log_k.flatten(-2).softmax(-1).view(log_k.shape), 0, []
    for block, own in _blocks(a, b):
        rows = block[0].shape[-2]
        found.append(_pull_rows(block, b, shares[..., first : first + rows, :], additive, prior, own))
        first += rows
    return found[0] if len(found) == 1 else tuple(torch.cat(x, -2) for x in zip(*found, strict=True))


def _pull_rows(a, b, shares, additive, prior, own):
    w = shares.unsqueeze(-1)
    if additive:
        w = w * _log_integral(a, b, prior, own).softmax(-1)
    u_i, log_i, _, log_j, log_P = _pairs(a, b, prior)
    # ∂ℓ/∂u_i = −A/P,  ∂ℓ/∂ log l_i = ½ (A² l_i/P² − c l_i/P)
    root, part = (-0.5 * log_P).exp(), (log_i - log_P).exp()  # 1/√P, l_i/P
    A, c_part = _differences(a, b, own) * root, part  # A/√P, c l_i/P
    if prior:
        A, c_part = A + u_i * (log_j - 0.5 * log_P).exp(), part + (log_i + log_j - log_P).exp()
    return -(w * A * root).sum(-2), (0.5 * w * (A.square() * part - c_part)).sum(-2)


def _shapes(mu_r: Tensor, *_) -> tuple[Tensor, Tensor]:
    """What forward returns for fake tensors; the reference takes the logarithm of numbers that n and m determine."""
    batch, wide = mu_r.shape[:-2], torch.promote_types(mu_r.dtype, torch.float32)
    return mu_r.new_empty(batch, dtype=wide), mu_r.new_empty(*batch, 3, dtype=torch.float64)


def _gradient_shapes(*inputs) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in inputs[:4])


_forward = register(
    "as_distance(Tensor mu_r, Tensor logvar_r, Tensor mu_g, Tensor logvar_g, bool additive, bool prior, bool log,"
    " bool unbiased) -> (Tensor value, Tensor sums)",
    reference=as_distance_reference,
    meta=_shapes,
    triton="as_distance.forward",
    cuda=True,
    prefer=lambda mu_r, logvar_r, mu_g, *_: small_in_cuda(mu_r, mu_g),
)
_backward = register(
    "as_distance_backward(Tensor mu_r, Tensor logvar_r, Tensor mu_g, Tensor logvar_g, Tensor sums, Tensor? dvalue,"
    " Tensor? dsums, bool additive, bool prior, bool log, bool unbiased)"
    " -> (Tensor dmu_r, Tensor dlogvar_r, Tensor dmu_g, Tensor dlogvar_g)",
    reference=_backward_reference,
    meta=_gradient_shapes,
    triton="as_distance_backward.backward",
    cuda=True,
    prefer=lambda mu_r, logvar_r, mu_g, *_: small_in_cuda(mu_r, mu_g),
)
_distance = differentiable(
    _forward,
    lambda backward, grads, inputs, outputs, needed: backward(*inputs[:4], *outputs, *grads, *inputs[4:]),
    backward=_backward,
    tensors=4,
    outputs=2,
    values=2,
    saved=slice(1, 2),
)
