"""Fréchet distances between Gaussians, without a matrix square root.

With Σ = CᵀC, Tr √(Σ₁Σ₂) = ‖C₁C₂ᵀ‖_* (nuclear norm), and the gradient uses the polar factor P of C₁C₂ᵀ. This stays exact
for rank-deficient covariances, where square roots of Σ₁Σ₂ do not. Computed in float64, because these are metrics.

On the CPU, when no gradient is needed, symmetric eigenvalues replace singular values at a fifth of the work, wherever
an estimate of their rounding error allows it. On a GPU, where decompositions wait for the device, matrix products
replace them (`frechet_products.py`); only higher derivatives decompose.
"""

import torch
from torch import Tensor

from .. import _check
from .._registry import register
from ._derivatives import differentiable
from ._finite import finite_matrices
from .frechet_products import Trace, covariance_trace_by_products, factor_trace_by_products, symmetric, waits
from .polar import polar
from .sqrtm_spd import sqrtm_spd


def frechet_distance(mu1: Tensor, sigma1: Tensor, mu2: Tensor, sigma2: Tensor) -> Tensor:
    """‖μ₁ − μ₂‖² + Tr Σ₁ + Tr Σ₂ − 2 Tr √(Σ₁Σ₂).

    Args:
        mu1, mu2: means `[..., d]`.
        sigma1, sigma2: covariances `[..., d, d]`, positive semi-definite of any rank; their symmetric part is used.

    Returns:
        distance `[...]` in squared units of the samples, float32 for half precision. Differentiable in all four
        arguments; at a singular covariance the gradient is the subgradient of least norm, and higher derivatives
        are NaN. On a GPU value and first derivative call no operator that waits for the device; eigenvalues below 3e-13
        of the largest count as 0, and a distance is NaN where the bound on the error of 2 Tr √(Σ₁Σ₂) exceeds about
        2e-5 √(Tr Σ₁ Tr Σ₂) (`ops.frechet_error` returns the bound).

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit.

    Source: S1 (IVAAE) section 4; Heusel et al. 2017 (FID); Dowson & Landau 1982.
    """
    mu1, sigma1, mu2, sigma2 = checked(mu1, sigma1, mu2, sigma2)
    sigma1, sigma2 = sigma1.double(), sigma2.double()
    trace = _root_trace(sigma1, sigma2)
    distance = squared_norm(mu1.double() - mu2.double()) + total_variance(sigma1, sigma2) - 2 * trace
    return distance.to(torch.promote_types(mu1.dtype, torch.float32))


def checked(mu1: Tensor, sigma1: Tensor, mu2: Tensor, sigma2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The arguments of `frechet_distance` in one dtype; an error if they do not fit."""
    mu1, sigma1, mu2, sigma2 = _check.promoted(mu1, sigma1, mu2, sigma2)
    _check.floating("mu1", mu1)
    if mu1.dim() < 1:
        raise ValueError(f"mu1 must have shape [..., d], got {tuple(mu1.shape)}")
    _check.same("mu2", mu2, "mu1", mu1)
    square = (*mu1.shape, mu1.shape[-1])
    for name, sigma in (("sigma1", sigma1), ("sigma2", sigma2)):
        _check.alike(name, sigma, "mu1", mu1)
        if sigma.shape != square:
            raise ValueError(f"{name} must have shape {square} for mu1 {tuple(mu1.shape)}, got {tuple(sigma.shape)}")
    return mu1, sigma1, mu2, sigma2


def frechet_distance_from_samples(x: Tensor, y: Tensor) -> Tensor:
    """Fréchet distance between the Gaussians of two samples, computed from the samples; correct even when n < d.

    Args:
        x, y: samples `[..., n, d]` and `[..., m, d]`, n, m >= 2; covariances divide by n − 1.

    Result and errors are those of `frechet_distance`. Differentiable; forward mode and higher orders take O(nm) memory.

    Source: as for `frechet_distance`; Tr √(Σ₁Σ₂) = ‖C₁C₂ᵀ‖_*, where C is the centred samples over √(n − 1).
    """
    x, y = _check.promoted(x, y)
    _check.two_samples("x", x, "y", y, at_least=2)
    mu1, c1 = factor(x)
    mu2, c2 = factor(y)
    trace = _nuclear_norm(c1, c2)
    distance = squared_norm(mu1 - mu2) + c1.square().sum((-2, -1)) + c2.square().sum((-2, -1)) - 2 * trace
    return distance.to(torch.promote_types(x.dtype, torch.float32))


def total_variance(sigma1: Tensor, sigma2: Tensor) -> Tensor:
    """Tr Σ₁ + Tr Σ₂ `[...]` of covariances `[..., d, d]`."""
    one, other = (sigma.diagonal(dim1=-2, dim2=-1).sum(-1) for sigma in (sigma1, sigma2))
    return one + other


def squared_norm(x: Tensor) -> Tensor:
    return x.square().sum(-1)


def factor(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean `[..., d]` and C `[..., n, d]` with CᵀC the covariance, in float64.

    The mean is taken relative to the first sample. Far from 0, the mean's own rounding would give C one more direction,
    which polar factors would count in full.
    """
    x = x.double()
    first = x[..., :1, :].detach()
    rows = x - first
    shift = rows.mean(-2, keepdim=True)
    return (first + shift).squeeze(-2), (rows - shift) / (x.shape[-2] - 1) ** 0.5


def _polar(m: Tensor) -> tuple[Tensor, Tensor]:
    """Nuclear norm `[...]` and polar factor U Vᵀ, over the numerical rank of m `[..., p, q]`."""
    m, nan = finite_matrices(m)
    U, S, Vh = torch.linalg.svd(m, full_matrices=False)
    S, Vh = S + nan.squeeze(-1), Vh + nan
    floor = S[..., :1] * max(m.shape[-2:]) * torch.finfo(S.dtype).eps
    return S.sum(-1), (U * (floor < S).unsqueeze(-2)) @ Vh


def frechet_factor_trace_reference(c1: Tensor, c2: Tensor | None, gradients: bool) -> tuple[Tensor, Tensor, Tensor]:
    """‖C₁C₂ᵀ‖_* and its gradients in C₁ and C₂ (empty unless requested); C₂ None is the identity."""
    # C = QR:  C₁C₂ᵀ = Q₁ R₁R₂ᵀ Q₂ᵀ, so a polar factor with min(n, d) rows and columns is enough
    Q1, R1 = torch.linalg.qr(c1)
    empty = c1.new_empty(0)
    if c2 is None:
        trace, P = _polar(R1)
        return trace, Q1 @ P if gradients else empty, empty.clone()
    Q2, R2 = torch.linalg.qr(c2)
    trace, P = _polar(R1 @ R2.mT)
    if not gradients:
        return trace, empty, empty.clone()
    return trace, Q1 @ (P @ R2), Q2 @ (P.mT @ R1)


def frechet_covariance_trace_reference(
    sigma1: Tensor, sigma2: Tensor, gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Tr √(Σ₁Σ₂) and its gradients ½ R₁⁺ P R₂ and ½ R₂⁺ Pᵀ R₁ (empty unless requested); Σ = RᵀR, R = √Λ Vᵀ."""
    R1, inverse1 = _root(sigma1)
    R2, inverse2 = _root(sigma2)
    trace, P = _polar(R1 @ R2.mT)
    if not gradients:
        return trace, sigma1.new_empty(0), sigma1.new_empty(0)
    return trace, symmetric(0.5 * inverse1 @ (P @ R2)), symmetric(0.5 * inverse2 @ (P.mT @ R1))


def frechet_factor_trace(c1: Tensor, c2: Tensor | None, gradients: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The same as the reference, by the cheapest method of the same accuracy."""
    if waits(c1):
        return _of_products(factor_trace_by_products(c1, c2), gradients)
    few = c1.shape[-2] <= c1.shape[-1] and (c2 is None or c2.shape[-2] <= c2.shape[-1])
    empty = c1.new_empty(0)
    if c2 is not None and few:  # C₁C₂ᵀ is smaller than C₁ and C₂
        product = c1 @ c2.mT
        if not gradients:
            finite, nan = finite_matrices(product)
            return torch.linalg.svdvals(finite).sum(-1) + nan[..., 0, 0], empty, empty.clone()
        trace, P = _polar(product)
        return trace, P @ c2, P.mT @ c1
    if gradients and c2 is None and not few:
        trace, inverse, exact = _root_sum_and_inverse(c1.mT @ c1)
        if exact:
            return trace, c1 @ inverse, empty
    if not gradients:
        if c2 is None:
            gram = c1 @ c1.mT if few else c1.mT @ c1
            trace, exact = _root_sum(gram, _norm(gram))
        else:
            trace, exact = _product_root_sum(c1.mT @ c1, c2.mT @ c2)
        if exact:
            return trace, empty, empty.clone()
    return frechet_factor_trace_reference(c1, c2, gradients)


def frechet_covariance_trace(sigma1: Tensor, sigma2: Tensor, gradients: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The same as the reference, by the cheapest method of the same accuracy."""
    if waits(sigma1):
        return _of_products(covariance_trace_by_products(sigma1, sigma2), gradients)
    if not gradients:
        trace, exact = _product_root_sum(symmetric(sigma1), symmetric(sigma2))
        if exact:
            return trace, sigma1.new_empty(0), sigma1.new_empty(0)
    return frechet_covariance_trace_reference(sigma1, sigma2, gradients)


def _of_products(found: Trace, gradients: bool) -> tuple[Tensor, Tensor, Tensor]:
    empty = found.trace.new_empty(0)
    return found[:3] if gradients else (found.trace, empty, empty.clone())


def _product_root_sum(sigma1: Tensor, sigma2: Tensor) -> tuple[Tensor, bool]:
    """Tr √(Σ₁Σ₂) = Tr √(LᵀΣ₂L) with Σ₁ = LLᵀ, and whether its rounding error is small enough."""
    L, info = torch.linalg.cholesky_ex(sigma1)
    if info.any():
        return L, False
    return _root_sum(_lower_congruence(L, sigma2), _norm(sigma1) * _norm(sigma2))


BLOCK = 256  # columns per product


def _lower_congruence(L: Tensor, sigma: Tensor) -> Tensor:
    """LᵀΣL on and below the diagonal blocks, for lower triangular L: a quarter of the work of two products."""
    d = L.shape[-1]
    result = torch.zeros_like(sigma)
    for j in range(0, d, BLOCK):
        columns = slice(j, j + BLOCK)
        Y = sigma[..., j:, j:] @ L[..., j:, columns]
        for i in range(j, d, BLOCK):
            rows = slice(i, i + BLOCK)
            result[..., rows, columns] = L[..., i:, rows].mT @ Y[..., i - j :, :]
    return result


def _norm(a: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(a)


EXACT = 1e-8  # relative to the sum


def _root_sum(a: Tensor, size: Tensor) -> tuple[Tensor, bool]:
    """Σ √λ of symmetric a `[..., d, d]`, and whether the error is below `EXACT`.

    Only the lower triangle of a is used; it was computed from matrices whose norms multiply to `size`. Each λ is off by
    at most about δ = 4 eps size, so √λ is off by min(√δ, δ/√λ). The errors have random signs, so their squares add. For
    spectra that fall like k⁻² the estimate is 5e-9 and the actual error 1e-14.
    """
    finite, nan = finite_matrices(a)
    values = torch.linalg.eigvalsh(finite).clamp_min(0) + nan.squeeze(-1)
    roots = values.sqrt()
    delta = (4 * torch.finfo(a.dtype).eps * size).unsqueeze(-1)
    errors = torch.minimum(delta.sqrt(), delta / roots.clamp_min(torch.finfo(a.dtype).tiny))
    return roots.sum(-1), bool((errors.norm(dim=-1) <= EXACT * roots.sum(-1)).all())


CONDITION = 1e6  # condition number up to which the inverse root of a Gram matrix is exact to 1e-9


def _root_sum_and_inverse(a: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Σ √λ and a^−½ of symmetric a `[..., d, d]`, and whether the condition number of a allows both to be exact."""
    finite, nan = finite_matrices(a)
    values, V = torch.linalg.eigh(finite)
    values = values + nan.squeeze(-1)
    exact = bool((values[..., 0] * CONDITION > values[..., -1]).all())
    roots = values.clamp_min(torch.finfo(a.dtype).tiny).sqrt()
    return roots.sum(-1), (V / roots.unsqueeze(-2)) @ V.mT, exact


def _root(sigma: Tensor) -> tuple[Tensor, Tensor]:
    """R with RᵀR = Σ, and the pseudo-inverse of R."""
    finite, nan = finite_matrices(symmetric(sigma))
    values, V = torch.linalg.eigh(finite)
    floor = values[..., -1:] * values.shape[-1] * torch.finfo(values.dtype).eps
    kept = values > floor.clamp_min(0)
    roots = torch.where(kept, values, 0).sqrt() + nan.squeeze(-1)
    inverse = torch.where(kept, 1 / torch.where(kept, roots, 1), 0)
    return roots.unsqueeze(-1) * V.mT, V * inverse.unsqueeze(-2)


def _shapes(first: Tensor, second: Tensor | None, gradients: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What forward returns for fake tensors; a decomposition would compare n with d."""
    d1, d2 = (first.new_empty(0 if x is None or not gradients else x.shape) for x in (first, second))
    return first.new_empty(first.shape[:-2]), d1, d2


_factor_trace = register(
    "frechet_factor_trace(Tensor c1, Tensor? c2, bool gradients) -> (Tensor trace, Tensor d1, Tensor d2)",
    reference=frechet_factor_trace_reference,
    composition=frechet_factor_trace,
    meta=_shapes,
)
_covariance_trace = register(
    "frechet_covariance_trace(Tensor sigma1, Tensor sigma2, bool gradients) -> (Tensor trace, Tensor d1, Tensor d2)",
    reference=frechet_covariance_trace_reference,
    composition=frechet_covariance_trace,
    meta=_shapes,
)


def _gradients(backward, grads, inputs, outputs, needed):
    g = grads[0][..., None, None]
    return tuple(None if x is None else g * d for x, d in zip(inputs, outputs, strict=True))


def _factor_pull(grads, inputs, needed):
    """P C₂ and Pᵀ C₁, where P is the polar factor of C₁C₂ᵀ; an n × m matrix."""
    (c1, c2), g = inputs, grads[0][..., None, None]
    if c2 is None:
        return g * polar(c1), None
    P = polar(c1 @ c2.mT)
    return g * (P @ c2), g * (P.mT @ c1)


def _covariance_pull(grads, inputs, needed):
    """½ R₁⁺ P R₂ and ½ R₂⁺ Pᵀ R₁, with symmetric roots R and the polar factor P of R₁R₂."""
    R1, R2 = (sqrtm_spd(sigma) + _kink(sigma) for sigma in inputs)
    P, g = polar(R1 @ R2), grads[0][..., None, None]
    inverse1, inverse2 = (torch.linalg.pinv(R, hermitian=True, rtol=ROUNDING) for R in (R1, R2))
    d1, d2 = 0.5 * inverse1 @ P @ R2, 0.5 * inverse2 @ P.mT @ R1
    return g * (d1 + d1.mT) / 2, g * (d2 + d2.mT) / 2


def _kink(sigma: Tensor) -> Tensor:
    """0 `[..., 1, 1]`, whose derivative is NaN at a singular matrix."""
    values = torch.linalg.eigvalsh(finite_matrices(symmetric(sigma.detach()))[0])
    singular = values[..., :1] <= values[..., -1:] * ROUNDING**2
    nothing = (0 * sigma).sum((-2, -1)).unsqueeze(-1)
    return torch.where(singular, torch.where(singular, nothing, 1).sqrt(), 0).unsqueeze(-1)


ROUNDING = 1e-11  # of a root's eigenvalues: those that are not 0 are above 1e-8, and those that are 0 below 1e-14
_nuclear_norm = differentiable(
    _factor_trace, _gradients, pull=_factor_pull, tensors=2, outputs=3, saved=slice(1, 3), flags=1
)
_root_trace = differentiable(
    _covariance_trace, _gradients, pull=_covariance_pull, tensors=2, outputs=3, saved=slice(1, 3), flags=1
)
