"""Square root of symmetric positive semi-definite matrices, with a backward that solves a Lyapunov equation."""

import torch
from torch import Tensor

from .. import _check
from .._registry import register
from ._finite import finite_matrices
from ._once import once_differentiable
from .inverse_root import CONVERGED, MOST, inverse_root


def sqrtm_spd(a: Tensor) -> Tensor:
    """The symmetric positive semi-definite S with S S = a.

    Args:
        a: matrices `[..., d, d]`, positive semi-definite of any rank; their symmetric part is used, and eigenvalues
            that are negative through rounding count as 0.

    Returns:
        root `[..., d, d]` in the dtype of a, computed in float64. Differentiable once: the gradient D solves
        S D + D S = G, where G is the gradient of S; between directions with eigenvalue 0, where the root has no
        derivative, it is 0. A matrix that is not finite gives NaN.

    Raises:
        TypeError, ValueError: a dtype or shape that does not fit.

    Source: Higham, Functions of Matrices (2008), chapter 6; Lin & Maji 2017 (the backward).
    """
    _check.square("a", a)
    if torch.is_grad_enabled() and a.requires_grad:
        return _SqrtmSpd.apply(a)
    return _sqrtm_spd(a, False)[0]


def sqrtm_spd_reference(a: Tensor, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The root, and the eigenvectors and roots of eigenvalues in float64 (empty unless a gradient is needed)."""
    finite, nan = finite_matrices(_symmetric(a.double()))
    values, V = torch.linalg.eigh(finite)
    floor = values[..., -1:].clamp_min(0) * values.shape[-1] * torch.finfo(values.dtype).eps
    roots = torch.where(values > floor, values, 0).sqrt() + nan.squeeze(-1)
    root = ((V * roots.unsqueeze(-2)) @ V.mT).to(a.dtype)
    return (root, V, roots) if gradient else (root, V.new_empty(0), V.new_empty(0))


def sqrtm_spd_op(a: Tensor, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The same as the reference; a value without gradient, if not float64, by matrix products accurate to 1e-8."""
    if gradient or a.shape[-1] > MOST or a.dtype == torch.float64:
        return sqrtm_spd_reference(a, gradient)
    exact = _symmetric(a.double())
    inverse, _, error = inverse_root(exact)
    root = _symmetric(exact @ inverse).to(a.dtype)
    if not a.is_cuda:  # on a GPU, reading the error would wait for the device
        failed = error > CONVERGED
        if bool(failed.any()):
            root = root.masked_scatter(failed[..., None, None], sqrtm_spd_reference(a[failed], False)[0])
    return root, exact.new_empty(0), exact.new_empty(0)


def _symmetric(a: Tensor) -> Tensor:
    return (a + a.mT) / 2


class _SqrtmSpd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a):
        root, V, roots = _sqrtm_spd(a, True)
        ctx.save_for_backward(V, roots)
        return root

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        V, roots = ctx.saved_tensors
        sums = roots.unsqueeze(-1) + roots.unsqueeze(-2)
        inner = V.mT @ _symmetric(grad.double()) @ V
        inner = torch.where(sums == 0, 0, inner / torch.where(sums == 0, 1, sums))
        return _symmetric(V @ inner @ V.mT).to(grad.dtype)


_sqrtm_spd = register(
    "sqrtm_spd(Tensor a, bool gradient) -> (Tensor root, Tensor vectors, Tensor roots)",
    reference=sqrtm_spd_reference,
    composition=sqrtm_spd_op,
    parts=(inverse_root,),
)
