"""Square root of symmetric positive semi-definite matrices, with a backward that solves a Lyapunov equation."""

import torch
from torch import Tensor

from .. import _check
from .._registry import register
from ._derivatives import differentiable
from ._finite import finite_matrices
from .inverse_root import CONVERGED, MOST, inverse_root
from .lyapunov import lyapunov, solved, symmetric


def sqrtm_spd(a: Tensor) -> Tensor:
    """The symmetric positive semi-definite S with S S = a.

    Args:
        a: matrices `[..., d, d]`, positive semi-definite of any rank; their symmetric part is used, and eigenvalues
            that are negative through rounding count as 0.

    Returns:
        root `[..., d, d]` in the dtype of a, computed in float64. Differentiable: the gradient D solves
        S D + D S = G, where G is the gradient of S; between directions with eigenvalue 0, where the root has no
        derivative, it is 0. A matrix that is not finite gives NaN.

    Raises:
        TypeError, ValueError: a dtype or shape that does not fit.

    Source: Higham, Functions of Matrices (2008), chapter 6; Lin & Maji 2017 (the backward).
    """
    _check.square("a", a)
    return _root(a)


def sqrtm_spd_reference(a: Tensor, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The root, and the eigenvectors and roots of eigenvalues in float64 (empty unless a gradient is needed)."""
    finite, nan = finite_matrices(symmetric(a.double()))
    values, V = torch.linalg.eigh(finite)
    floor = values[..., -1:].clamp_min(0) * values.shape[-1] * torch.finfo(values.dtype).eps
    roots = torch.where(values > floor, values, 0).sqrt() + nan.squeeze(-1)
    root = ((V * roots.unsqueeze(-2)) @ V.mT).to(a.dtype)
    return (root, V, roots) if gradient else (root, V.new_empty(0), V.new_empty(0))


def sqrtm_spd_op(a: Tensor, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The same as the reference; a value without gradient, if not float64, by matrix products accurate to 1e-8."""
    if gradient or a.shape[-1] > MOST or a.dtype == torch.float64:
        return sqrtm_spd_reference(a, gradient)
    exact = symmetric(a.double())
    inverse, _, error = inverse_root(exact)
    root = symmetric(exact @ inverse).to(a.dtype)
    if not a.is_cuda:  # on a GPU, reading the error would wait for the device
        failed = ~(error <= CONVERGED)  # NaN where an eigenvalue is negative through rounding
        if bool(failed.any()):
            root = root.masked_scatter(failed[..., None, None], sqrtm_spd_reference(a[failed], False)[0])
    return root, exact.new_empty(0), exact.new_empty(0)


_sqrtm_spd = register(
    "sqrtm_spd(Tensor a, bool gradient) -> (Tensor root, Tensor vectors, Tensor roots)",
    reference=sqrtm_spd_reference,
    composition=sqrtm_spd_op,
    parts=(inverse_root,),
)


def _gradients(backward, grads, inputs, outputs, needed):
    V, roots = outputs
    return (symmetric(solved(roots, V, symmetric(grads[0].double()))).to(grads[0].dtype),)


def _pull(grads, inputs, needed):
    root = _root(inputs[0].double())
    return (symmetric(lyapunov(root, symmetric(grads[0].double()))).to(grads[0].dtype),)


_root = differentiable(_sqrtm_spd, _gradients, pull=_pull, tensors=1, outputs=3, saved=slice(1, 3), flags=1)
