"""Tr √(Σ₁Σ₂) and its gradients on a device, without waiting for it: matrix products and Cholesky factors alone.

A covariance is first restricted to its eigenvalues above `FLOOR` of the largest. Its polar factor W by products has
eigenvalues 1, −1 and 0 where those of Σ are positive, negative and 0 up to rounding, so Π = (W² + W)/2 projects onto
the range that counts. With λ ≈ ‖Σ‖,

    ΠΣΠ + λ (I − Π) = LLᵀ is positive definite,  C = LᵀΠ has CᵀC = ΠΣΠ,  C⁺ = ΠL⁻ᵀ,

and Tr √(Σ₁Σ₂) = ‖C₁C₂ᵀ‖_*, as in `frechet.py`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._finite import finite_matrices
from .polar_products import EPS, FLOOR, factor_or_nan, norm_bound, nuclear_by_products, polar_by_products

TOLERANCE = 1e-5  # the largest error, relative to √(Tr Σ₁ Tr Σ₂), with which a trace is not NaN


class Trace(NamedTuple):
    trace: Tensor  # Tr √(Σ₁Σ₂) [...]; NaN if the error is not within `TOLERANCE`
    d1: Tensor  # its gradient in the first argument
    d2: Tensor  # and in the second
    error: Tensor  # a bound on the trace's error [...]


def waits(x: Tensor) -> bool:
    """Whether the host would wait for the decomposition of x."""
    return x.is_cuda


def covariance_trace_by_products(sigma1: Tensor, sigma2: Tensor) -> Trace:
    """Tr √(Σ₁Σ₂) of covariances `[..., d, d]`, with gradients ½ C₁⁺ P C₂ and ½ C₂⁺ Pᵀ C₁.

    The error has three parts: what `nuclear_by_products` proves; what Π leaves out, by Tr √((A + E) B) <= Tr √(AB) +
    √(Tr E Tr B); and rounding, to first order.
    """
    S, nan = finite_matrices(torch.stack((sigma1, sigma2)))
    S, scale = _scaled(symmetric(S))
    d = S.shape[-1]
    eye = torch.eye(d, dtype=S.dtype, device=S.device)
    W = symmetric(polar_by_products(S))
    squared = W @ W
    project = (squared + W) / 2
    rest = eye - project
    # small where a projector has an eigenvalue between 0 and 1; of `rest` alone, rounding would add to small λ
    L = factor_or_nan(symmetric(project @ S @ project + 4 * FLOOR * (rest @ rest)))
    K = project @ L  # Cᵀ
    norm, P, error = nuclear_by_products(K[0].mT @ K[1])
    right = torch.stack((P @ K[1].mT, P.mT @ K[0].mT))
    gradients = symmetric(project @ torch.linalg.solve_triangular(L.mT, right, upper=True)) / 2

    # Tr |Σ − W²Σ|
    lost = d - W.square().sum((-2, -1))
    missing = torch.minimum(FLOOR * lost, d**0.5 * torch.linalg.matrix_norm(S - squared @ S))
    missing = torch.where(lost > 1e-6, missing, 0)
    total = K.square().sum((-2, -1))
    error = error + (missing * total.flip(0)).sqrt().sum(0)
    error = error + 8 * EPS * d**0.5 * torch.linalg.matrix_norm(gradients).sum(0)
    within = TOLERANCE * total.prod(0).sqrt() + _slack(d)
    trace = _or_nan(norm, error <= within, nan.sum(0))
    root1, root2 = scale.sqrt()
    ratio, poison = (root2 / root1)[..., None, None], 0 * trace[..., None, None]
    d1, d2 = ratio * gradients[0] + poison, gradients[1] / ratio + poison
    return Trace(root1 * root2 * trace, d1, d2, root1 * root2 * error)


def factor_trace_by_products(c1: Tensor, c2: Tensor | None) -> Trace:
    """‖C₁C₂ᵀ‖_* of factors `[..., n, d]` and `[..., m, d]`, with gradients P C₂ and Pᵀ C₁; C₂ None is the identity.

    A factor with more rows than columns is reduced by C = QR first.
    """
    Q1, R1, scale, nan = _reduced(c1)
    size, M, root = R1.square().sum((-2, -1)), R1, R1.shape[-2] ** 0.5
    if c2 is not None:
        Q2, R2, scale2, nan2 = _reduced(c2)
        M, scale, nan = R1 @ R2.mT, scale * scale2, nan + nan2
        size, root = size * R2.square().sum((-2, -1)), 1
    norm, P, error = nuclear_by_products(M)
    error = error + 4 * EPS * c1.shape[-1] ** 0.5 * size.sqrt() * root
    trace = _or_nan(norm, error <= TOLERANCE * size.sqrt() * root + _slack(min(M.shape[-2:])), nan)
    poison = 0 * trace[..., None, None]
    if c2 is None:
        d1, d2 = _times(Q1, P) + poison, c1.new_empty(0)
    else:
        d1 = _times(Q1, P @ R2) * scale2[..., None, None] + poison
        d2 = _times(Q2, P.mT @ R1) * (scale / scale2)[..., None, None] + poison
    return Trace(scale * trace, d1, d2, scale * error)


def _reduced(c: Tensor) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Q (None for the identity), R with ‖R‖₂ <= 1, the scale s with C = s QR, and NaN where C is not finite."""
    c, nan = finite_matrices(c)
    Q, R = torch.linalg.qr(c) if c.shape[-2] > c.shape[-1] else (None, c)
    R, scale = _scaled(R)
    return Q, R, scale, nan


def _times(Q: Tensor | None, x: Tensor) -> Tensor:
    return x if Q is None else Q @ x


def _scaled(a: Tensor) -> tuple[Tensor, Tensor]:
    """a over a bound on its norm, and that bound; 1 for a of 0."""
    bound = norm_bound(a)
    bound = torch.where(bound == 0, 1, bound)
    return a / bound[..., None, None], bound


def _slack(d: int) -> float:
    """What `nuclear_by_products` finds as the error of norms that are 0."""
    return 64 * d**2 * EPS


def _or_nan(value: Tensor, holds: Tensor, nan: Tensor) -> Tensor:
    return torch.where(holds, value, torch.nan) + nan[..., 0, 0]


def symmetric(a: Tensor) -> Tensor:
    return (a + a.mT).div_(2)  # a second array (33 MB at d = 2048) would double the time
