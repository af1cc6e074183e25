"""Fréchet latent distance of codes to the prior N(0, I), and its gradient in the same pass.

Small codes go through the inverse root of their Gram matrix (`fld_gram`), others through a factor of their covariance
(`frechet.py`). Computed in float64, as every Fréchet distance.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import _check
from .._registry import register
from ._once import once_differentiable
from .frechet import factor, frechet_factor_trace, frechet_factor_trace_reference, squared_norm
from .inverse_root import CONVERGED, MOST, few_rows_in_cuda, inverse_root_reference


def fld(z: Tensor) -> Tensor:
    """Fréchet latent distance of the codes z to the prior N(0, I): ‖μ‖² + Tr(Σ + I) − 2 Tr √Σ.

    Args:
        z: codes `[..., n, d]`, n >= 2; the covariance is over n − 1.

    Returns, errors and derivative order as `frechet_distance`'s.

    Source: S1 (IVAAE) section 4.
    """
    _check.samples("z", z, at_least=2)
    if torch.is_grad_enabled() and z.requires_grad:
        return _Fld.apply(z)
    return _fld(z, False)[0]


def fld_reference(z: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    """The distance and, where asked for (else empty), its gradient 2μ/n + 2 (C − P)/√(n − 1), P = ∂‖C‖_*/∂C.

    P's columns sum to 0 as C's do, so that the mean has no part in the second term.
    """
    return _fld_by_factor(z, gradient, frechet_factor_trace_reference)


def fld_op(z: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    """As the reference, by the cheapest route that is as exact."""
    if min(z.shape[-2:]) > MOST:
        return _fld_by_factor(z, gradient, frechet_factor_trace)
    distance, grad, error = fld_gram(z, gradient)
    if z.is_cuda:  # a look at the error would wait for the device
        return distance, grad
    failed = error > CONVERGED  # not where codes are NaN
    if bool(failed if error.dim() == 0 else failed.any()):
        exact, exact_grad = fld_reference(z[failed], gradient)
        distance = distance.masked_scatter(failed, exact)
        if gradient:
            grad = grad.masked_scatter(failed[..., None, None], exact_grad)
    return distance, grad


def _fld_by_factor(z: Tensor, gradient: bool, factor_trace: Callable) -> tuple[Tensor, Tensor]:
    mu, c = factor(z)
    trace, P, _ = factor_trace(c, None, gradient)
    distance = squared_norm(mu) + c.square().sum((-2, -1)) + z.shape[-1] - 2 * trace
    distance = distance.to(torch.promote_types(z.dtype, torch.float32))
    if not gradient:
        return distance, z.new_empty(0)
    n = z.shape[-2]
    grad = torch.add((2 / n) * mu.unsqueeze(-2), c - P, alpha=2 / (n - 1) ** 0.5)
    return distance, grad.to(z.dtype)


def fld_gram_reference(z: Tensor, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    """‖μ‖² + Tr(Σ + I) − 2 Tr √Σ of z `[..., n, d]`, its gradient where asked for (else empty), `inverse_root`'s error.

    With C the centred samples over √(n − 1) the gradient is 2μ/n + 2 (C − P)/√(n − 1), P = C (CᵀC)^−½; for n <= d
    P = (CCᵀ)^−½ C, where 11ᵀ takes the place of the eigenvalue 0 that centring leaves.
    """
    n, d = z.shape[-2:]
    x = z.double()
    mu = x.mean(-2, keepdim=True)
    c = (x - mu) / (n - 1) ** 0.5
    size = c.square().sum((-2, -1))
    if n > d:
        inverse, trace, error = inverse_root_reference(c.mT @ c)
    else:
        filled = size / (n - 1)
        gram = c @ c.mT + (filled / n)[..., None, None]
        inverse, trace, error = inverse_root_reference(gram)
        trace = trace - filled.sqrt()
    distance = mu.square().sum((-2, -1)) + size + d - 2 * trace
    distance = distance.to(torch.promote_types(z.dtype, torch.float32))
    if not gradient:
        return distance, z.new_empty(0), error
    P = c @ inverse if n > d else inverse @ c
    return distance, ((2 / n) * mu + (2 / (n - 1) ** 0.5) * (c - P)).to(z.dtype), error


class _Fld(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        distance, gradient = _fld(z, True)
        ctx.save_for_backward(gradient)
        return distance

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (gradient,) = ctx.saved_tensors
        return (gradient * (grad[..., None, None] if grad.dim() else grad)).to(gradient.dtype)


fld_gram = register(
    "fld_gram(Tensor z, bool gradient) -> (Tensor distance, Tensor gradient, Tensor error)",
    reference=fld_gram_reference,
    triton="fld.forward",
    cuda=True,
    prefer=lambda z, _: few_rows_in_cuda(min(z.shape[-2:])),
)
_fld = register(
    "fld(Tensor z, bool gradient) -> (Tensor distance, Tensor gradient)",
    reference=fld_reference,
    composition=fld_op,
    parts=(fld_gram,),
)
