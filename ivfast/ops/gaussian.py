"""KL(N(μ, diag e^logvar) ‖ N(0, I)), the regulariser of the VAE family."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _check
from .._registry import register
from ._pairwise import arithmetic


def gaussian_kl(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(μ, diag e^logvar) ‖ N(0, I)) = ½ Σ_d (μ² + e^logvar − 1 − logvar), one value per sample.

    Args:
        mu: means `[..., d]`.
        logvar: log-variances `[..., d]`.

    Returns:
        KL in nats `[...]`, float32 for half precision. Differentiable once, in both.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that differ.

    Source: Kingma & Welling 2014, appendix B; S3 section 2, S5 Eq. 2.
    """
    _check.floating("mu", mu)
    _check.same("logvar", logvar, "mu", mu)
    if mu.dim() < 1:
        raise ValueError(f"mu must have shape [..., d], got {tuple(mu.shape)}")
    return _GaussianKl.apply(mu, logvar)


def gaussian_kl_reference(mu: Tensor, logvar: Tensor) -> Tensor:
    mu, logvar = arithmetic(mu), arithmetic(logvar)
    return 0.5 * (mu.square() + _expm1_minus(logvar)).sum(-1)


def _expm1_minus(x: Tensor) -> Tensor:
    """e^x − 1 − x, by its series near 0, where the difference would lose the digits: Σ_{k>=2} x^k/k!."""
    series = torch.full_like(x, 1 / 5040)
    for coefficient in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2):
        series = series * x + coefficient
    return torch.where(x.abs() < 0.03, series * x.square(), x.expm1() - x)


def _backward_reference(grad, mu, logvar):
    # ∂μ = μ,  ∂logvar = ½ (e^logvar − 1)
    g = grad.unsqueeze(-1)
    return (g * arithmetic(mu)).to(mu.dtype), (0.5 * g * arithmetic(logvar).expm1()).to(mu.dtype)


class _GaussianKl(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mu, logvar):
        ctx.save_for_backward(mu, logvar)
        return _forward(mu, logvar)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _backward(grad, *ctx.saved_tensors)


_forward = register("gaussian_kl(Tensor mu, Tensor logvar) -> Tensor", reference=gaussian_kl_reference)
_backward = register(
    "gaussian_kl_backward(Tensor grad, Tensor mu, Tensor logvar) -> (Tensor dmu, Tensor dlogvar)",
    reference=_backward_reference,
)
