"""Polar factors of matrices, with their gradient."""

import torch
from torch import Tensor

from .. import _check
from .._registry import register
from ._derivatives import differentiable
from ._finite import finite_matrices
from .lyapunov import lyapunov, symmetric


def polar(m: Tensor) -> Tensor:
    """The polar factor U Vᵀ of m = U S Vᵀ over its numerical rank: the nearest matrix with orthonormal columns or rows.

    It is also the gradient of the nuclear norm ‖m‖_*; where m is rank-deficient, the subgradient of least norm.

    Args:
        m: matrices `[..., p, q]`.

    Returns:
        factor `[..., p, q]` in the dtype of m, computed in float64. Differentiable; the derivative is 0 along
        directions outside the numerical rank. A matrix that is not finite gives NaN.

    Raises:
        TypeError, ValueError: a dtype or shape that does not fit.

    Source: Higham, Functions of Matrices (2008), chapter 8.
    """
    _check.floating("m", m)
    if m.dim() < 2 or 0 in m.shape[-2:]:
        raise ValueError(f"m must have shape [..., p, q] with p, q >= 1, got {tuple(m.shape)}")
    return _factor(m)


def polar_reference(m: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The factor, and U `[..., p, k]`, 1/S `[..., k]` (0 outside the rank) and Vᵀ `[..., k, q]` in float64."""
    finite, nan = finite_matrices(m.double())
    U, S, Vh = torch.linalg.svd(finite, full_matrices=False)
    Vh = Vh + nan
    floor = S[..., :1] * max(m.shape[-2:]) * torch.finfo(S.dtype).eps
    kept = floor < S
    inverse = torch.where(kept, 1 / torch.where(kept, S, 1), 0)
    return ((U * kept.unsqueeze(-2)) @ Vh).to(m.dtype), U.contiguous(), inverse, Vh.contiguous()


def _shapes(m: Tensor) -> tuple[Tensor, ...]:
    """What forward returns for fake tensors; a decomposition would compare p with q."""
    *batch, p, q = m.shape
    k = torch.sym_min(p, q)
    parts = (m.new_empty(*batch, *shape, dtype=torch.float64) for shape in ((p, k), (k,), (k, q)))
    return m.new_empty(m.shape), *parts


_polar = register(
    "polar(Tensor m) -> (Tensor factor, Tensor u, Tensor inverse, Tensor vh)",
    reference=polar_reference,
    meta=_shapes,
)


def _gradients(backward, grads, inputs, outputs, needed):
    """Within the rank, the skew part divided by s_i + s_j; outside U's columns and V's rows, divided by s."""
    U, inverse, Vh = outputs
    G = grads[0].double()
    kept = inverse > 0
    s = torch.where(kept, 1 / torch.where(kept, inverse, 1), 0)
    both = kept.unsqueeze(-1) & kept.unsqueeze(-2)
    sums = torch.where(both, s.unsqueeze(-1) + s.unsqueeze(-2), 1)
    U, Vh = U * kept.unsqueeze(-2), Vh * kept.unsqueeze(-1)
    inner = U.mT @ G @ Vh.mT
    gradient = U @ ((inner - inner.mT) / sums) @ Vh
    left, right = G @ Vh.mT * inverse.unsqueeze(-2), U.mT @ G * inverse.unsqueeze(-1)
    gradient = gradient + (left - U @ (U.mT @ left)) @ Vh + U @ (right - (right @ Vh.mT) @ Vh)
    return (gradient.to(grads[0].dtype),)


def _pull(grads, inputs, needed):
    """The same in P, H = (mᵀm)^½ and K = (mmᵀ)^½, which are smooth where singular values coincide:
    P D + (I − PPᵀ) G H⁺ + K⁺ G (I − PᵀP), where H D + D H is the skew part 2 sk(PᵀG) within the range of H."""
    m, G = inputs[0].double(), grads[0].double()
    P = _factor(m)
    H, K = symmetric(P.mT @ m), symmetric(m @ P.mT)
    inner = P.mT @ G @ (P.mT @ P)
    gradient = P @ lyapunov(H, inner - inner.mT)
    left, right = G @ _inverse(H), _inverse(K) @ G
    gradient = gradient + (left - P @ (P.mT @ left)) + (right - (right @ P.mT) @ P)
    return (gradient.to(grads[0].dtype),)


def _inverse(a: Tensor) -> Tensor:
    return torch.linalg.pinv(a, hermitian=True, rtol=a.shape[-1] * torch.finfo(a.dtype).eps)


_factor = differentiable(_polar, _gradients, pull=_pull, tensors=1, outputs=4, saved=slice(1, 4))
