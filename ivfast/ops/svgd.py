"""Stein variational gradient descent: the direction that moves particles towards a target.

φ_i = (1/n) Σ_j [k_ij s_j + ∇_{x_j} k(x_j, x_i)],  k(x, y) = exp(−‖x − y‖²/h),  ∇_{x_j} k_ij = (2/h)(x_i − x_j) k_ij.

This is attention without the softmax: with V = S − (2/h) X, K' = K − I and r' = K' 1,
φ = (1/n) [S + K' V + (2/h) r'∘X]. A particle's own term S is exact, however narrow the kernel.
"""

import torch
from torch import Tensor

from .. import _check
from .._registry import register
from ._derivatives import differentiable
from ._pairwise import column_medians, positive_or_nan, squared_distances
from .median import CONVENTIONS, median_bandwidth


def svgd_direction(
    x: Tensor,
    score: Tensor | None = None,
    *,
    bandwidth: float | Tensor | str = "median",
    scale: float = 1.0,
    convention: str = "liu-wang",
) -> Tensor:
    """SVGD direction φ(x) of the particles x; `x + step * φ` is one step of SVGD.

    Args:
        x: particles `[..., n, d]`; leading dimensions are independent particle sets.
        score: ∇ log p at each particle, `[..., n, d]`; None means the standard normal target, with score −x.
        bandwidth: h of k(x, y) = exp(−‖x − y‖²/h): a positive float, a tensor `[...]` with one h per set (or one for
            all), or "median" for the median heuristic, through which no gradient flows. For a gradient through it,
            pass `median_bandwidth(x)`.
        scale: factor on the bandwidth; S1 uses 100 in its bridge.
        convention: which median heuristic (see `median_bandwidth`); used only with "median".

    Returns:
        φ `[..., n, d]` in x's dtype, computed in float32 for half precision. Differentiable in x, score and a tensor
        bandwidth; forward mode and higher orders take O(n²) memory.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device, or a bandwidth or scale that is not positive and finite
            (the values of a tensor are not checked, because that would wait for the device).

    Source: Liu & Wang 2016, Eq. 8; S1 (IVAAE) Eq. 2 with the gradient with respect to z_j.
    """
    x, score = _check.promoted(x, score)
    _check.samples("x", x)
    if score is not None:
        _check.same("score", score, "x", x)
    scale = _check.number("scale", scale, positive=True)
    h = _bandwidth(x, bandwidth, scale, convention)
    return direction(x, score, h)


def _bandwidth(x: Tensor, bandwidth: float | Tensor | str, scale: float, convention: str) -> Tensor:
    """One h per particle set, `x.shape[:-2]`, in the dtype of the arithmetic."""
    batch, dtype = x.shape[:-2], torch.float64 if x.dtype == torch.float64 else torch.float32
    if isinstance(bandwidth, str):
        _check.choice("bandwidth", bandwidth, ("median",))
        _check.choice("convention", convention, CONVENTIONS)
        return median_bandwidth(x.detach(), convention=convention) * scale
    if isinstance(bandwidth, Tensor):
        if bandwidth.shape not in (batch, ()):
            shapes = f"{tuple(batch)}, one value for each set, or ()" if batch else "()"
            raise ValueError(f"bandwidth must have shape {shapes}, got {tuple(bandwidth.shape)}")
        if bandwidth.device != x.device:
            raise ValueError(f"bandwidth must match x: device {x.device}, got {bandwidth.device}")
        h = bandwidth if bandwidth.dtype == dtype else bandwidth.to(dtype)
        h = h if scale == 1 else h * scale
        return h if h.shape == batch else h.expand(batch)
    bandwidth = _check.number("bandwidth", bandwidth, positive=True)
    return torch.full(batch, bandwidth * scale, dtype=dtype, device=x.device)


def svgd_direction_reference(x: Tensor, score: Tensor | None, bandwidth: Tensor) -> tuple[Tensor, Tensor]:
    """φ and the row sums r = K 1 `[..., n]`."""
    kernel, X, S, h = _terms(x, score, bandwidth)[:4]
    r = kernel.sum(-1)
    phi = (S + kernel @ (S - (2 / h) * X) + (2 / h) * r.unsqueeze(-1) * X) / x.shape[-2]
    return phi.to(x.dtype), (1 + r).to(bandwidth.dtype)


def _terms(x, score, bandwidth):
    """K' [n, n], centred X and S [n, d], h [1, 1] and d² [n, n], all `[..., ·, ·]` in float64, because far-apart
    particles leave too little in float32."""
    x = x.double()
    S = -x if score is None else score.double()
    X = x - column_medians(x)  # nothing depends on the centre but rounding
    h = positive_or_nan(bandwidth.double())[..., None, None]
    d2 = squared_distances(X, X)
    own = torch.eye(x.shape[-2], dtype=torch.bool, device=x.device)
    return torch.where(own, 0 * h, torch.exp(-d2 / h)), X, S, h, d2  # NaN for an h of NaN, also where n = 1


def _backward_reference(grad, x, score, bandwidth, row_sum, bandwidth_gradient):
    n = x.shape[-2]
    kernel, X, S, h, d2 = _terms(x, score, bandwidth)
    G, r = grad.double(), kernel.sum(-1, keepdim=True)
    gx = (G * X).sum(-1, keepdim=True)
    # W = A∘K' with A_ij = ∂L/∂k_ij = (g_i·v_j + (2/h) g_i·x_i)/n;  B = W + Wᵀ;  E = (1/n) [r'∘G − K'G]
    W = (G @ (S - (2 / h) * X).mT + (2 / h) * gx) * kernel / n
    B, KG = W + W.mT, kernel @ G
    E, dS = (r * G - KG) / n, (G + KG) / n
    # ∂X = −(2/h)[(B1)∘X − B X − E]
    dX = (2 / h) * (B @ X - B.sum(-1, keepdim=True) * X + E)
    dh = bandwidth.new_empty(0)
    if bandwidth_gradient:
        # ∂h = (Σ W∘d² − 2⟨E, X⟩)/h²
        dh = (W * d2).sum((-2, -1)) - 2 * (E * X).sum((-2, -1))
        dh = (dh / bandwidth.double().square()).to(bandwidth.dtype)
    if score is None:
        return (dX - dS).to(x.dtype), x.new_empty(0), dh
    return dX.to(x.dtype), dS.to(x.dtype), dh


def _prefer(x, *_):
    """CUDA C++ for small sets and in up to 128 dimensions, otherwise Triton. Both compute in float32."""
    n, d = x.shape[-2:]
    if x.dtype == torch.float64:
        return ()
    if d > 128:
        return ("triton",)
    return ("cuda", "triton") if n <= 256 else ("triton", "cuda")


def _backward_shared(grad, x, *_):
    """Bytes of shared memory that the gradient needs in CUDA C++: six tiles of rows, two of pairs and two of sums."""
    width = next((w for w in (32, 64) if x.shape[-1] <= w), 128)
    return 4 * 32 * (6 * (width + 4) + 2 * 36 + 2)


_forward = register(
    "svgd_direction(Tensor x, Tensor? score, Tensor bandwidth) -> (Tensor phi, Tensor row_sum)",
    reference=svgd_direction_reference,
    triton="svgd.forward",
    cuda=True,
    prefer=_prefer,
)
_backward = register(
    "svgd_direction_backward(Tensor grad, Tensor x, Tensor? score, Tensor bandwidth, Tensor row_sum,"
    " bool bandwidth_gradient) -> (Tensor dx, Tensor dscore, Tensor dbandwidth)",
    reference=_backward_reference,
    triton="svgd.backward",
    cuda=True,
    prefer=lambda grad, x, *_: _prefer(x),
    shared=_backward_shared,
)


def _gradients(backward, grads, inputs, outputs, needed):
    dx, dscore, dbandwidth = backward(*grads, *inputs, *outputs, needed[2])
    return dx, None if inputs[1] is None else dscore, dbandwidth if needed[2] else None


direction = differentiable(_forward, _gradients, backward=_backward, tensors=3, outputs=2, saved=slice(1, 2))
