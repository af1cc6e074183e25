"""Polar factors and nuclear norms by matrix products alone, so that the host never waits for the device.

Every step X ← X (a I + b XᵀX + c (XᵀX)²) keeps the singular vectors and maps each singular value x to
a x + b x³ + c x⁵. `STEPS` composes such maps into a step function: with x in [0, 1], it is 1 for x >= `FLOOR` and 0
for x <= FLOOR / 6, up to rounding. A step is three products, and the number of steps is fixed.

- Growing: 0.99 times the odd quintic that has the largest slope at 0 of those that keep [0, 1] and, once above 1/20,
  stay there. A smaller bound would be steeper, but lose digits of large singular values, which it would make small.
  Without the 0.99, what rounding puts above 1 would grow.
- Closing: minimax approximations of 1 on the interval that the previous step leaves, from [1/20, 1] on.
- Sharpening: p = (5 x³ − 3 x⁵)/2 has slope 0 at 0 and at 1. It sends what is below 0.81 to 0, which is rounding error
  and whatever was below the floor, and the rest to 1; (15 x − 10 x³ + 3 x⁵)/8 converges to order 3.

Source: Amsel et al. 2025 (Polar Express), section 3; Nakatsukasa & Higham 2012 (which steps are backward stable);
Higham, Functions of Matrices (2008), chapter 8.
"""

from typing import NamedTuple

import torch
from torch import Tensor

FLOOR = 3e-13  # singular values below this share of the norm count as 0; rounding reaches 2e-14 at d = 2048
_GROWING = (4.16766991375684, -12.1235075366372, 8.94583762288036)
_CLOSING = (
    (6.78043669060151, -18.4607641467859, 13.3502541776697),
    (2.55217409461587, -1.8866977567312, 0.442605806158003),
    (1.92995408950988, -1.30979285063662, 0.381027718136132),
)
_SHARPENING = (0.0, 2.5, -1.5)
STEPS = (*[_GROWING] * 18, *_CLOSING, _SHARPENING, _SHARPENING, (1.875, -1.25, 0.375), _SHARPENING)
BATCHED = 512  # rows up to which a batch is factorised in one call: cuSOLVER's is made for small matrices
EPS = torch.finfo(torch.float64).eps


class Nuclear(NamedTuple):
    norm: Tensor  # ‖m‖_* [...]
    polar: Tensor  # its gradient, the polar factor over the numerical rank [..., p, q]
    error: Tensor  # a bound on the norm's error [...]


def norm_bound(m: Tensor) -> Tensor:
    """A bound on the spectral norm `[...]` of m `[..., p, q]`: ‖(mᵀm)²‖_F^¼, too large by q^⅛ at most."""
    largest = m.abs().amax((-2, -1), keepdim=True)
    scaled = m / torch.where(largest == 0, 1, largest)
    gram = _small_gram(scaled)
    return (largest * torch.linalg.matrix_norm(gram @ gram, keepdim=True).pow(0.25))[..., 0, 0]


def _small_gram(m: Tensor) -> Tensor:
    return m.mT @ m if m.shape[-2] >= m.shape[-1] else m @ m.mT


def polar_by_products(m: Tensor) -> Tensor:
    """The polar factor of m `[..., p, q]`, ‖m‖₂ <= 1, over the singular values above `FLOOR`."""
    tall = m.shape[-2] >= m.shape[-1]
    X = m.reshape(-1, *m.shape[-2:])
    for a, b, c in STEPS:
        gram = _small_gram(X)
        inner = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        X = torch.baddbmm(X, *((X, inner) if tall else (inner, X)), beta=a)
    return X.view(m.shape)


def nuclear_by_products(m: Tensor) -> Nuclear:
    """The nuclear norm of m `[..., p, q]`, ‖m‖₂ <= 1, with a bound on its error.

    With the computed factor P and any K ≻ 0, ⟨P, m⟩/‖P‖₂ <= ‖m‖_* <= ½ (Tr(mᵀm K⁻¹) + Tr K), and both are equal for
    K = (mᵀm)^½ = Pᵀm. The bounds hold for whatever P the steps came to. That K is positive definite and ‖P‖₂ <= 1 up
    to rounding is what Cholesky factors prove; the error is NaN where they do not exist.
    """
    P = polar_by_products(m)
    M, Q = (m, P) if m.shape[-2] >= m.shape[-1] else (m.mT, P.mT)
    norm = (P * m).sum((-2, -1))
    q = M.shape[-1]
    H = Q.mT @ M
    H = (H + H.mT) / 2
    H.diagonal(dim1=-2, dim2=-1).add_(4 * max(q, 16) * EPS)  # above the rounding of H
    half = torch.linalg.solve_triangular(factor_or_nan(H).mT, M, upper=True, left=False)
    above = (half.square().sum((-2, -1)) + H.diagonal(dim1=-2, dim2=-1).sum(-1)) / 2
    eye = torch.eye(q, dtype=m.dtype, device=m.device)
    excess = 16 * max(q, 16) * EPS
    contraction = factor_or_nan((1 + excess) * eye - Q.mT @ Q)[..., 0, 0]  # NaN if ‖P‖₂² may be above 1 + excess
    rounding = 4 * EPS * (q + q**0.5 * torch.linalg.matrix_norm(m))
    return Nuclear(norm, P, (above - norm).abs() + excess * norm.abs() + rounding + 0 * contraction)


def factor_or_nan(a: Tensor) -> Tensor:
    """The lower Cholesky factor of a `[..., d, d]`; NaN for a matrix that is not positive definite."""
    if a.shape[-1] <= BATCHED or a.dim() == 2:
        L, info = torch.linalg.cholesky_ex(a)
        return torch.where((info == 0)[..., None, None], L, torch.nan)
    return torch.stack([factor_or_nan(x) for x in a.flatten(0, -3)]).view(a.shape)
