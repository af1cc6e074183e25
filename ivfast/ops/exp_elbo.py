"""The exponential ELBO term with which a soft introspective VAE pushes generated samples away (S5)."""

import torch
from torch import Tensor

from .. import _check
from .._registry import register
from ._derivatives import differentiable
from ._pairwise import arithmetic


def exp_elbo_loss(
    reconstruction: Tensor,
    kl: Tensor,
    *,
    scale: float = 1.0,
    beta_reconstruction: float = 1.0,
    beta_kl: float = 1.0,
    alpha: float = 2.0,
) -> Tensor:
    """(1/α) mean_i exp(−α s (β_rec rec_i + β_kl KL_i)) over the n samples.

    Args:
        reconstruction: reconstruction loss of each sample, `[..., n]`, in nats.
        kl: KL of each sample's posterior to the prior, `[..., n]`, in nats.
        scale: s; published code uses 1 over the number of pixels.
        beta_reconstruction, beta_kl: β_rec and β_kl; a term with β = 0 is left out even if it is infinite.
        alpha: α > 0; 2 in the papers.

    Returns:
        the loss `[...]`, float32 for half precision. It lies in [0, 1/α] if both terms are >= 0: a sample far from
        the data, even infinitely far, adds 0 and gets gradient 0. The exponent is clamped at 80, so a negative loss
        does not overflow. Differentiable in both inputs.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that differ, n < 1, a number that is not finite, or
            alpha <= 0.

    Source: S5 (AS-IntroVAE) section 3; Daniel & Tamar 2021 (Soft-IntroVAE), Eq. 4.
    """
    reconstruction, kl = _check.promoted(reconstruction, kl)
    _check.floating("reconstruction", reconstruction)
    _check.same("kl", kl, "reconstruction", reconstruction)
    if reconstruction.dim() < 1 or reconstruction.shape[-1] < 1:
        raise ValueError(f"reconstruction must have shape [..., n] with n >= 1, got {tuple(reconstruction.shape)}")
    scale, beta_kl = _check.number("scale", scale), _check.number("beta_kl", beta_kl)
    beta_reconstruction = _check.number("beta_reconstruction", beta_reconstruction)
    alpha = _check.number("alpha", alpha, positive=True)
    factors = (-alpha * scale * beta_reconstruction, -alpha * scale * beta_kl, alpha)
    return _loss(reconstruction, kl, *factors)


MOST = 80.0  # e^80, and n times that, are finite in float32


def _exponent(reconstruction, kl, a, b):
    """a rec + b KL; a factor of 0 drops its term."""
    terms = [factor * arithmetic(x) for factor, x in ((a, reconstruction), (b, kl)) if factor]
    return sum(terms) if terms else torch.zeros_like(arithmetic(kl))


def exp_elbo_loss_reference(reconstruction: Tensor, kl: Tensor, a: float, b: float, alpha: float) -> Tensor:
    return _exponent(reconstruction, kl, a, b).clamp(max=MOST).exp().mean(-1) / alpha


def _backward_reference(grad, reconstruction, kl, a, b, alpha):
    # ∂x_i = β_x factor e_i/(α n); no gradient where the exponent is clamped
    t = _exponent(reconstruction, kl, a, b)
    e = (grad.unsqueeze(-1) / (alpha * kl.shape[-1])) * t.clamp(max=MOST).exp().masked_fill(t > MOST, 0)
    return (a * e).to(kl.dtype), (b * e).to(kl.dtype)


_forward = register(
    "exp_elbo_loss(Tensor reconstruction, Tensor kl, float a, float b, float alpha) -> Tensor",
    reference=exp_elbo_loss_reference,
    triton="exp_elbo.forward",
)
_backward = register(
    "exp_elbo_loss_backward(Tensor grad, Tensor reconstruction, Tensor kl, float a, float b, float alpha)"
    " -> (Tensor dreconstruction, Tensor dkl)",
    reference=_backward_reference,
    triton="exp_elbo.backward",
)
_loss = differentiable(
    _forward,
    lambda backward, grads, inputs, outputs, needed: backward(*grads, *inputs),
    backward=_backward,
    tensors=2,
)
