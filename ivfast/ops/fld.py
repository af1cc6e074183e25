"""Fréchet latent distance of codes to the prior N(0, I), and its gradient in the same pass.

Small codes use the inverse root of their Gram matrix (`fld_gram`), larger ones a factor of their covariance
(`frechet.py`). Computed in float64, like every Fréchet distance.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import _check
from .._registry import forced, register
from ._derivatives import differentiable
from .frechet import factor, frechet_factor_trace, frechet_factor_trace_reference, squared_norm
from .frechet_products import waits
from .inverse_root import CONVERGED, MOST, few_rows_in_cuda, inverse_root_reference, shared_of
from .polar import polar


def fld(z: Tensor) -> Tensor:
    """Fréchet latent distance of the codes z to the prior N(0, I): ‖μ‖² + Tr(Σ + I) − 2 Tr √Σ.

    Args:
        z: codes `[..., n, d]`, n >= 2; the covariance divides by n − 1.

    Result and errors are those of `frechet_distance`. Differentiable any number of times; forward mode and higher
    orders decompose the centred codes by singular values. On a GPU, where min(n, d) <= 128 in float32 or less, a
    direction whose standard deviation is below 1e-6 of the largest counts in part: its share of the value is off by
    at most 6e-7 √(Tr Σ), and its gradient is a fraction. Where it is 0, both are exact.

    Source: S1 (IVAAE) section 4.
    """
    _check.samples("z", z, at_least=2)
    return _distance(z)


def fld_reference(z: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    """The distance and its gradient 2μ/n + 2 (C − P)/√(n − 1), P = ∂‖C‖_*/∂C (empty unless requested).

    P's columns sum to 0, as C's do, so the mean does not contribute to the second term.
    """
    return _fld_by_factor(z, gradient, frechet_factor_trace_reference)


def fld_op(z: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    """The same as the reference, by the cheapest method of the same accuracy."""
    exactly = waits(z) and z.dtype == torch.float64 and forced() is None
    if exactly or min(z.shape[-2:]) > MOST:
        return _fld_by_factor(z, gradient, frechet_factor_trace)
    distance, grad, error = fld_gram(z, gradient)
    if waits(z):  # reading the error would wait for the device
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
    """‖μ‖² + Tr(Σ + I) − 2 Tr √Σ of z `[..., n, d]`, its gradient (empty unless requested) and `inverse_root`'s error.

    C is the centred samples over √(n − 1). The gradient is 2μ/n + 2 (C − P)/√(n − 1) with P = C (CᵀC)^−½. For n <= d,
    P = (CCᵀ)^−½ C, where a multiple of 11ᵀ replaces the zero eigenvalue that centring leaves.
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


def _shapes(z: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    """What forward returns for fake tensors; a decomposition would compare n with d."""
    distance = z.new_empty(z.shape[:-2], dtype=torch.promote_types(z.dtype, torch.float32))
    return distance, z.new_empty(z.shape if gradient else 0)


fld_gram = register(
    "fld_gram(Tensor z, bool gradient) -> (Tensor distance, Tensor gradient, Tensor error)",
    reference=fld_gram_reference,
    triton="fld.forward",
    cuda=True,
    prefer=lambda z, _: few_rows_in_cuda(min(z.shape[-2:])),
    shared=lambda z, _: shared_of(min(z.shape[-2:])),
)
_fld = register(
    "fld(Tensor z, bool gradient) -> (Tensor distance, Tensor gradient)",
    reference=fld_reference,
    composition=fld_op,
    meta=_shapes,
    parts=(fld_gram,),
)


def _gradients(backward, grads, inputs, outputs, needed):
    return (_scaled(outputs[0], grads[0]),)


def _pull(grads, inputs, needed):
    """2μ/n + 2 (C − P)/√(n − 1), in which P has derivatives of every order."""
    z, n = inputs[0], inputs[0].shape[-2]
    mu, c = factor(z)
    return (_scaled((2 / n) * mu.unsqueeze(-2) + (2 / (n - 1) ** 0.5) * (c - polar(c)), grads[0]).to(z.dtype),)


def _scaled(gradient: Tensor, grad: Tensor) -> Tensor:
    return (gradient * (grad[..., None, None] if grad.dim() else grad)).to(gradient.dtype)


_distance = differentiable(_fld, _gradients, pull=_pull, tensors=1, outputs=2, saved=slice(1, 2), flags=1)
