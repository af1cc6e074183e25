"""S D + D S = G for symmetric positive semi-definite S: the derivative of matrix square roots and polar factors.

The solution is its own adjoint in G, and its derivatives in S are solutions too, so every order has a closed form
that never divides by a difference of eigenvalues, unlike the derivatives of an eigendecomposition.

Source: Higham, Functions of Matrices (2008), sections 6.1 and 8.2.
"""

import torch
from torch import Tensor

from ._derivatives import differentiable


def symmetric(a: Tensor) -> Tensor:
    return (a + a.mT) / 2


def _solve(S: Tensor, G: Tensor) -> Tensor:
    values, V = torch.linalg.eigh(S)
    return solved(values.clamp_min(0), V, G)


def solved(values: Tensor, V: Tensor, G: Tensor) -> Tensor:
    """For S = V diag(values) Vᵀ; 0 between directions whose eigenvalues are rounding error. NaN gives NaN."""
    floor = values[..., -1:] * values.shape[-1] * torch.finfo(values.dtype).eps
    values = torch.where(values <= floor, 0, values)
    sums = values.unsqueeze(-1) + values.unsqueeze(-2)
    inner = V.mT @ G @ V
    return V @ torch.where(sums == 0, 0, inner / torch.where(sums == 0, 1, sums)) @ V.mT


def _gradients(backward, grads, inputs, outputs, needed):
    # ⟨C, dD⟩ with S dD + dD S = dG − dS D − D dS
    S, G = inputs
    D, E = lyapunov(S, G), lyapunov(S, grads[0])
    return -symmetric(E @ D.mT + D.mT @ E), E


lyapunov = differentiable(
    _solve,
    _gradients,
    tensors=2,
    pull=lambda grads, inputs, needed: _gradients(None, grads, inputs, (), needed),
)
