"""Diagonal Gaussian posteriors N(μ, diag e^logvar): their KL to the prior N(0, I), and samples of them."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _check
from .._registry import register
from ._derivatives import differentiable
from ._draws import prior_draws
from ._pairwise import arithmetic, few_in_cuda


def gaussian_kl(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(μ, diag e^logvar) ‖ N(0, I)) = ½ Σ_d (μ² + e^logvar − 1 − logvar), one value per sample.

    Args:
        mu: means `[..., d]`.
        logvar: log-variances `[..., d]`.

    Returns:
        KL in nats `[...]`, float32 for half precision. Differentiable in both inputs.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that differ.

    Source: Kingma & Welling 2014, appendix B; S3 section 2, S5 Eq. 2.
    """
    mu, logvar = _check.promoted(mu, logvar)
    _check_posteriors(mu, logvar)
    return _gaussian_kl(mu, logvar)


class Reparameterized(NamedTuple):
    z: Tensor  # [..., d]
    kl: Tensor  # [...]


def reparameterize(
    mu: Tensor, logvar: Tensor, *, draws: Tensor | None = None, generator: torch.Generator | None = None
) -> Reparameterized:
    """z = μ + e^{logvar/2} ε with ε ~ N(0, I), and KL(N(μ, diag e^logvar) ‖ N(0, I)), in one pass.

    Args:
        mu: means `[..., d]`.
        logvar: log-variances `[..., d]`.
        draws: ε `[..., d]`, taken as a constant; None draws it.
        generator: random generator for `draws`.

    Returns:
        z `[..., d]` in mu's dtype, and kl `[...]` in nats, float32 for half precision. Differentiable in mu and
        logvar.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that differ.

    Source: Kingma & Welling 2014, section 2.4 and appendix B.
    """
    mu, logvar, draws = _check.promoted(mu, logvar, draws)
    _check_posteriors(mu, logvar)
    draws = prior_draws(mu, draws, generator)
    return Reparameterized(*_reparameterized(mu, logvar, draws))


def _check_posteriors(mu: Tensor, logvar: Tensor) -> None:
    _check.floating("mu", mu)
    _check.same("logvar", logvar, "mu", mu)
    if mu.dim() < 1:
        raise ValueError(f"mu must have shape [..., d], got {tuple(mu.shape)}")


def gaussian_kl_reference(mu: Tensor, logvar: Tensor) -> Tensor:
    mu, logvar = arithmetic(mu), arithmetic(logvar)
    return 0.5 * (mu.square() + _expm1_minus(logvar)).sum(-1)


def _expm1_minus(x: Tensor) -> Tensor:
    """e^x − 1 − x; near 0, where the difference would cancel, by its series Σ_{k>=2} x^k/k!."""
    series = torch.full_like(x, 1 / 5040)
    for coefficient in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2):
        series = series * x + coefficient
    return torch.where(x.abs() < 0.03, series * x.square(), x.expm1() - x)


def _backward_reference(grad, mu, logvar):
    # ∂μ = μ,  ∂logvar = ½ (e^logvar − 1)
    g = grad.unsqueeze(-1)
    return (g * arithmetic(mu)).to(mu.dtype), (0.5 * g * arithmetic(logvar).expm1()).to(mu.dtype)


def reparameterize_reference(mu: Tensor, logvar: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    z = arithmetic(mu) + (0.5 * arithmetic(logvar)).exp() * arithmetic(draws)
    return z.to(mu.dtype), gaussian_kl_reference(mu, logvar)


def _reparameterize_backward_reference(dz, dkl, mu, logvar, draws):
    # ∂μ = ∂z + ∂kl μ,  ∂logvar = ½ (∂z ε e^{logvar/2} + ∂kl (e^logvar − 1))
    dmu, dlogvar = torch.zeros_like(arithmetic(mu)), torch.zeros_like(arithmetic(mu))
    if dz is not None:
        dmu = arithmetic(dz)
        dlogvar = 0.5 * dmu * arithmetic(draws) * (0.5 * arithmetic(logvar)).exp()
    if dkl is not None:
        g = dkl.unsqueeze(-1)
        dmu = dmu + g * arithmetic(mu)
        dlogvar = dlogvar + 0.5 * g * arithmetic(logvar).expm1()
    # a copy: the result must not alias dz
    return dmu.to(mu.dtype, copy=True), dlogvar.to(mu.dtype)


_forward = register(
    "gaussian_kl(Tensor mu, Tensor logvar) -> Tensor",
    reference=gaussian_kl_reference,
    triton="gaussian.kl",
    cuda=True,
    prefer=lambda mu, *_: few_in_cuda(mu),
)
_backward = register(
    "gaussian_kl_backward(Tensor grad, Tensor mu, Tensor logvar) -> (Tensor dmu, Tensor dlogvar)",
    reference=_backward_reference,
    triton="gaussian.kl_backward",
    cuda=True,
    prefer=lambda grad, mu, *_: few_in_cuda(mu),
)
_reparameterize = register(
    "reparameterize(Tensor mu, Tensor logvar, Tensor draws) -> (Tensor z, Tensor kl)",
    reference=reparameterize_reference,
    triton="gaussian.reparameterize",
    cuda=True,
    prefer=lambda mu, *_: few_in_cuda(mu),
)
_reparameterize_backward = register(
    "reparameterize_backward(Tensor? dz, Tensor? dkl, Tensor mu, Tensor logvar, Tensor draws)"
    " -> (Tensor dmu, Tensor dlogvar)",
    reference=_reparameterize_backward_reference,
    triton="gaussian.reparameterize_backward",
    cuda=True,
    prefer=lambda dz, dkl, mu, *_: few_in_cuda(mu),
)
_gaussian_kl = differentiable(
    _forward,
    lambda backward, grads, inputs, outputs, needed: backward(*grads, *inputs),
    backward=_backward,
    tensors=2,
)
_reparameterized = differentiable(
    _reparameterize,
    lambda backward, grads, inputs, outputs, needed: (*backward(*grads, *inputs), None),
    backward=_reparameterize_backward,
    tensors=3,
    outputs=2,
    values=2,
)
