"""Maximum mean discrepancy between two samples, with a sum of kernels of several scales.

MMD² = mean k(x, x') + mean k(y, y') − 2 mean k(x, y),  k = Σ_s s b/(s b + r²) ("imq") or Σ_s exp(−r²/(s b)) ("rbf").
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from .. import _check
from .._registry import register
from . import median
from ._derivatives import differentiable
from ._pairwise import column_medians, pooled, positive_or_nan, small_in_cuda, squared_distances

KERNELS = ("imq", "rbf")
SCALES = {"imq": (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0), "rbf": (1.0,)}


def mmd(
    x: Tensor,
    y: Tensor,
    *,
    kernel: str = "imq",
    scales: tuple[float, ...] | None = None,
    bandwidth: float | Tensor | str | None = None,
    unbiased: bool = True,
) -> Tensor:
    """MMD² between the samples x and y.

    Args:
        x, y: samples `[..., n, d]` and `[..., m, d]`.
        kernel: "imq", inverse multiquadratics, or "rbf", Gaussians.
        scales: factors s on the bandwidth; the kernels, one per factor, are summed. None means WAE's seven for "imq"
            and (1,) for "rbf".
        bandwidth: b, in units of r²: a positive float, a tensor `[...]` (or one value for all), or "median", the
            squared median distance of the pooled sample. None means 2d for "imq" (WAE with a prior of variance 1)
            and "median" for "rbf". No gradient flows through it.
        unbiased: leave out the pairs of a sample with itself (the value may be negative); otherwise keep them.

    Returns:
        MMD² `[...]`, float32 for half precision, with sums accumulated in float64. Differentiable in x and y; forward
        mode and higher orders take O(nm) memory.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit, fewer than 2 samples for the unbiased form,
            or scales or a bandwidth that are not positive and finite.

    Source: Gretton et al. 2012, Eq. 3 and Lemma 6; WAE (Tolstikhin et al. 2018) for the scales; S1's baseline.
    """
    x, y = _check.promoted(x, y)
    _check.two_samples("x", x, "y", y, at_least=2 if unbiased else 1)
    _check.choice("kernel", kernel, KERNELS)
    factors = list(SCALES[kernel]) if scales is None else _checked(scales)
    if bandwidth is None:
        bandwidth = 2.0 * x.shape[-1] if kernel == "imq" else "median"
    b = None
    if isinstance(bandwidth, str | Tensor):
        b = _bandwidth(x, y, bandwidth)
    else:  # a number is folded into the scales, which saves filling a tensor
        bandwidth = _check.number("bandwidth", bandwidth, positive=True)
        factors = [s * bandwidth for s in factors]
    return _discrepancy(x, y, b, kernel == "imq", factors, unbiased)


def _checked(scales: Iterable[float]) -> list[float]:
    factors = [_check.number("scales", s, positive=True) for s in scales]
    if not factors:
        raise ValueError("scales must hold at least one factor, got none")
    return factors


def _bandwidth(x: Tensor, y: Tensor, bandwidth: Tensor | str) -> Tensor:
    """One b per pair of samples, `x.shape[:-2]`, in the dtype of the arithmetic."""
    if isinstance(bandwidth, str):
        _check.choice("bandwidth", bandwidth, ("median",))
        return median.squared_median(pooled(x, y))
    batch = x.shape[:-2]
    if bandwidth.shape not in (batch, ()) or bandwidth.device != x.device:
        shapes = f"{tuple(batch)}, one value for each pair of samples, or ()" if batch else "()"
        raise ValueError(
            f"bandwidth must have shape {shapes} on {x.device}, got {tuple(bandwidth.shape)} on {bandwidth.device}"
        )
    return bandwidth.detach().to(torch.promote_types(x.dtype, torch.float32)).expand(batch)


def mmd_reference(x, y, bandwidth, imq, scales, unbiased, x_gradient, y_gradient):
    """MMD² and the requested gradients, in the dtype of the arithmetic; an empty tensor where none is requested.

    Computed in float64, because far-apart samples leave too little in float32. Without a bandwidth the scales are in
    units of r². Draws y from a prior need no gradient, which saves their half of the products with the slopes.
    """
    X, Y = x.double(), y.double()
    centre = column_medians(Y)  # nothing depends on it but rounding
    X, Y = X - centre, Y - centre
    own = X - column_medians(X)  # x may be far from y
    xx, yy, xy = squared_distances(own, own), squared_distances(Y, Y), squared_distances(X, Y)
    w_xx, w_yy, w_xy = _weights(X, Y, unbiased)
    b = 1 if bandwidth is None else positive_or_nan(bandwidth.double())[..., None, None]
    slopes = x_gradient, y_gradient, x_gradient or y_gradient
    kernels = [_kernel(d2, b, imq, scales, wanted) for d2, wanted in zip((xx, yy, xy), slopes, strict=True)]
    total = 0
    for (k, _), weight, within in zip(kernels, (w_xx, w_yy, -2 * w_xy), (True, True, False), strict=True):
        sums = k.sum((-2, -1), dtype=torch.float64)
        if within and unbiased:
            sums = sums - len(scales) * k.shape[-1]  # k(0) = 1 for each scale
        total = total + weight * sums
    wide = torch.promote_types(x.dtype, torch.float32)
    dx, dy = X.new_empty(0), X.new_empty(0)
    # ∂/∂x_i = Σ_j 4 w_xx k'(r²_ij)(x_i − x_j) − Σ_j 4 w_xy k'(r²_ij)(x_i − y_j)
    s_xx, s_yy, s_xy = (slope for _, slope in kernels)
    if x_gradient:
        dx = 4 * (w_xx * _pull(s_xx, own, own) - w_xy * _pull(s_xy, X, Y))
    if y_gradient:
        dy = 4 * (w_yy * _pull(s_yy, Y, Y) - w_xy * _pull(s_xy.mT, Y, X))
    return total.to(wide), dx.to(wide), dy.to(wide)


def _weights(X, Y, unbiased):
    n, m = X.shape[-2], Y.shape[-2]
    return (1 / (n * (n - 1)), 1 / (m * (m - 1)), 1 / (n * m)) if unbiased else (1 / n**2, 1 / m**2, 1 / (n * m))


def _kernel(d2, b, imq, scales, gradient):
    """k and, if `gradient` is set, dk/dr²."""
    k = slope = 0
    for c in (s * b for s in scales):
        term = c / (c + d2) if imq else torch.exp(-d2 / c)
        k = k + term
        if gradient:
            slope = slope - (term.square() if imq else term) / c
    return k, slope


def _pull(slope, X, Y):
    """Σ_j slope_ij (x_i − y_j), in which a sample's pair with itself would cancel in exact arithmetic only."""
    if X is Y:
        slope = slope.masked_fill(torch.eye(X.shape[-2], dtype=torch.bool, device=X.device), 0)
    return slope.sum(-1, keepdim=True) * X - slope @ Y


def _gradients(backward, grads, inputs, outputs, needed):
    (grad,), dtype = grads, inputs[0].dtype
    scale = grad[..., None, None] if grad.dim() else grad
    return *((scale * g).to(dtype) if n else None for g, n in zip(outputs, needed[:2], strict=True)), None


_forward = register(
    "mmd(Tensor x, Tensor y, Tensor? bandwidth, bool imq, float[] scales, bool unbiased, bool x_gradient,"
    " bool y_gradient) -> (Tensor value, Tensor dx, Tensor dy)",
    reference=mmd_reference,
    triton="mmd.forward",
    cuda=True,
    prefer=lambda x, y, *_: small_in_cuda(x, y),
)
_discrepancy = differentiable(_forward, _gradients, tensors=3, outputs=3, saved=slice(1, 3), flags=2)
