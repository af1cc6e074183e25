"""The median heuristic for the bandwidth of an RBF kernel: h = med²/log n, in the conventions of several libraries."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _check
from .._registry import register
from ._derivatives import differentiable
from ._pairwise import column_medians, squared_distances


class _Convention(NamedTuple):
    full: bool  # over the whole n × n matrix, including the zero diagonal; else over the pairs i < j
    squared: bool  # the median of squared distances; else the square of the median distance
    plus_one: bool  # divide by log(n + 1); else by log n


_CONVENTIONS = {
    "liu-wang": _Convention(full=True, squared=True, plus_one=True),
    "blackjax": _Convention(full=False, squared=False, plus_one=False),
    "numpyro": _Convention(full=True, squared=False, plus_one=False),
    "paper": _Convention(full=False, squared=False, plus_one=False),
}
CONVENTIONS = tuple(_CONVENTIONS)


def median_bandwidth(x: Tensor, *, convention: str = "liu-wang") -> Tensor:
    """Exact median heuristic h of k(x, y) = exp(−‖x − y‖²/h) for the particles x.

    The median of an even number of distances is the mean of the two in the middle. If it is 0 (most pairs coincide),
    the mean squared distance from the first particle replaces med². If that is 0 too (one particle, or all coincide),
    h = 1, and `svgd_direction` reduces to the score. A particle that is not finite makes h NaN.

    Args:
        x: particles `[..., n, d]`.
        convention: "liu-wang", the authors' code: the median of squared distances over the full matrix, divided by
            log(n + 1). "blackjax" and "paper", S1's h₀: the square of the median distance over i < j, divided by
            log n. "numpyro": the square of the median distance over the full matrix, divided by log n, without
            numpyro's eps.

    Returns:
        h `[...]` in float32, or float64 for float64 x. Differentiable; tied pairs share the gradient. Forward
        mode and higher orders take O(n²) memory. In float32, distances below 1e-19 leave h with fewer digits, because
        it is below the normal numbers, and h is 0 or infinite where it leaves the range.

    Raises:
        TypeError, ValueError: a wrong dtype or shape of x, an unknown convention.

    Source: Liu & Wang 2016, section 5; S1 section 4.
    """
    _check.samples("x", x)
    _check.choice("convention", convention, CONVENTIONS)
    if torch.compiler.is_compiling():  # the divisor, a constant of a graph, would make one for each n
        return _compiled(x, *_CONVENTIONS[convention])
    return _bandwidth(x, *heuristic(x.shape[-2], convention))


def squared_median(x: Tensor) -> Tensor:
    """The squared median distance between the pairs of particles `[...]`; positive, and without gradient."""
    full, squared, _ = _CONVENTIONS["paper"]
    return _bandwidth(x.detach(), full, squared, 1.0)


def heuristic(n: int, convention: str) -> tuple[bool, bool, float]:
    """The op's arguments `full`, `squared` and `divisor` for n particles."""
    full, squared, plus_one = _CONVENTIONS[convention]
    return full, squared, _divisor(n, plus_one)


def _divisor(n: int, plus_one: bool) -> float:
    if isinstance(n, torch.SymInt):
        return 1.0  # of a fake tensor, which has a shape and no value
    return math.log(n + 1 if plus_one or n == 1 else n)


def median_bandwidth_reference(x: Tensor, full: bool, squared: bool, divisor: float) -> tuple[Tensor, Tensor]:
    """h `[...]` and the two middle squared distances `[..., 2]`, equal if the number of distances is odd."""
    n = x.shape[-2]
    X = x.double()  # far-apart particles leave too little in float32
    X = X - column_medians(X)
    middles = _middles(squared_distances(X, X), full)
    h, middles = from_middles(middles, squares_about(X, X[..., :1, :]) / n, squared, divisor)
    wide = torch.promote_types(x.dtype, torch.float32)
    return h.to(wide), middles.to(wide)


def squares_about(x: Tensor, centre: Tensor) -> Tensor:
    """Σ_i ‖x_i − centre‖² `[...]` in float64; NaN if a particle is not finite."""
    return ((x - centre).square() + 0 * x).sum((-2, -1), dtype=torch.float64)


def from_middles(middles: Tensor, spread: Tensor, squared: bool, divisor: float) -> tuple[Tensor, Tensor]:
    """h `[...]` and the middles `[..., 2]`; both are NaN if the spread is, the mean squared distance from the first
    particle. It replaces a med² of 0. If it is 0 too, h = 1."""
    med2 = _combine(middles, squared)
    med2 = torch.where((med2 > 0) & ~spread.isnan(), med2, spread)
    h = torch.where(med2 == 0, torch.ones_like(med2), med2 / divisor)
    return h, torch.where(h.isnan().unsqueeze(-1), h.unsqueeze(-1), middles)


def _middles(d2: Tensor, full: bool) -> Tensor:
    n = d2.shape[-1]
    if full or n == 1:
        values = d2.flatten(-2)
    else:
        i, j = torch.triu_indices(n, n, 1, device=d2.device)
        values = d2[..., i, j]
    count = values.shape[-1]
    ordered = values.sort(-1).values
    return torch.stack((ordered[..., (count - 1) // 2], ordered[..., count // 2]), -1)


def _combine(middles: Tensor, squared: bool) -> Tensor:
    """med² from the two middle squared distances."""
    return (middles / 2).sum(-1) if squared else _roots(middles).mean(-1).square()


def _backward_reference(grad, x, middles, squared, divisor):
    # ∂h/∂x_i = Σ_j c_ij 2(x_i − x_j), c_ij is the share of pair (i, j) in the two middles
    X = x.double()
    X = X - column_medians(X)
    d2 = squared_distances(X, X).to(middles.dtype)
    chosen = middles[..., None, None, :] == d2.unsqueeze(-1)  # [..., n, n, 2]
    count = chosen.sum((-3, -2))
    # the middles, as tied pairs share them
    shared = torch.where(chosen, d2.double().unsqueeze(-1), 0).sum((-3, -2)) / count
    share = _slope(shared, squared) / count * (grad / divisor).unsqueeze(-1)
    c = (chosen * share.double()[..., None, None, :]).sum(-1)
    c = c + c.mT
    dx = 2 * (c.sum(-1, keepdim=True) * X - c @ X)
    med2 = _combine(middles, squared)[..., None, None]
    return torch.where(med2 == 0, 0, dx + 0 * med2).to(x.dtype)


def _roots(x: Tensor) -> Tensor:
    """√x, with derivatives 0 at 0."""
    return torch.where(x == 0, 0, torch.where(x == 0, 1, x).sqrt())


def _slope(middles: Tensor, squared: bool) -> Tensor:
    """∂med²/∂m_a: ½ for (m₁ + m₂)/2, (√m₁ + √m₂)/(4 √m_a) for ((√m₁ + √m₂)/2)²."""
    if squared:
        return torch.full_like(middles, 0.5)
    roots = _roots(middles)
    return torch.where(roots > 0, roots.sum(-1, keepdim=True) / (4 * torch.where(roots > 0, roots, 1)), 0)


def _shapes(x: Tensor, *_) -> tuple[Tensor, Tensor]:
    """What forward returns for fake tensors; the reference selects the middles by a number that n determines."""
    batch, wide = x.shape[:-2], torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(batch, dtype=wide), x.new_empty(*batch, 2, dtype=wide)


def _prefer(x, *_):
    """CUDA C++ for small sets, otherwise Triton. Both compute in float32."""
    if x.dtype == torch.float64:
        return ()
    return ("cuda", "triton") if x.shape[-2] <= 256 and x.shape[-1] <= 128 else ("triton",)


_forward = register(
    "median_bandwidth(Tensor x, bool full, bool squared, float divisor) -> (Tensor h, Tensor middles)",
    reference=median_bandwidth_reference,
    meta=_shapes,
    triton="median.forward",
    cuda=True,
    prefer=_prefer,
)
_backward = register(
    "median_bandwidth_backward(Tensor grad, Tensor x, Tensor middles, bool squared, float divisor) -> Tensor",
    reference=_backward_reference,
    triton="median.backward",
    cuda=True,
    prefer=lambda grad, x, *_: _prefer(x),
)


def _gradients(backward, grads, inputs, outputs, needed):
    x, _, *form = inputs
    return (backward(*grads, x, *outputs, *form),)


_bandwidth = differentiable(_forward, _gradients, backward=_backward, tensors=1, outputs=2, saved=slice(1, 2))


def _by_convention(forward):
    return lambda x, full, squared, plus_one: forward(x, full, squared, _divisor(x.shape[-2], plus_one))


def _backward_by_convention(backward):
    return lambda grad, x, middles, squared, plus_one: backward(
        grad, x, middles, squared, _divisor(x.shape[-2], plus_one)
    )


_heuristic = register(
    "median_heuristic(Tensor x, bool full, bool squared, bool plus_one) -> (Tensor h, Tensor middles)",
    reference=_by_convention(median_bandwidth_reference),
    composition=_by_convention(_forward),
    parts=(_forward,),
    meta=_shapes,
)
_heuristic_backward = register(
    "median_heuristic_backward(Tensor grad, Tensor x, Tensor middles, bool squared, bool plus_one) -> Tensor",
    reference=_backward_by_convention(_backward_reference),
    composition=_backward_by_convention(_backward),
    parts=(_backward,),
)
_compiled = differentiable(
    _heuristic, _gradients, backward=_heuristic_backward, tensors=1, outputs=2, saved=slice(1, 2)
)
