"""CASES: for each op the inputs it must be right on, and how right. Tests and benchmarks draw from this one table."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import ivfast

# Largest error over the largest value of the float64 reference on the same (rounded) inputs.
# float32: n·eps of a sum of a few hundred terms; half precision: one rounding of the result.
TOLERANCES = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


class Case(NamedTuple):
    op: str  # a public name of ivfast
    label: str
    function: Callable[..., Tensor | tuple[Tensor, ...]]  # of the drawn tensors alone
    draw: Callable[[torch.Generator], tuple[Tensor, ...]]  # float64 inputs, each differentiable
    slack: float = 1.0  # factor on TOLERANCES, with its reason beside it
    gradcheck: bool = True  # False where part of the value is detached on purpose

    def __str__(self):
        return f"{self.op}-{self.label}"


def inputs(case: Case, dtype: torch.dtype, *, device="cpu", seed: int | None = None) -> list[Tensor]:
    """Fresh leaves for `case`; without a seed PyTorch's default generator picks one."""
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())) if seed is None else seed)
    return [x.to(dtype).to(device).requires_grad_() for x in case.draw(generator)]


def outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def value_and_gradients(case: Case, tensors: list[Tensor], seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of `case`, and the gradients of their sum weighted by fixed random numbers."""
    out = outputs(case.function(*tensors))
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in out]
    gradients = torch.autograd.grad(out, tensors, weights, allow_unused=True)
    return [o.detach() for o in out], [
        torch.zeros_like(x) if g is None else g for x, g in zip(tensors, gradients, strict=True)
    ]


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest expected value; infinite where a value is NaN."""
    difference = (actual.double() - expected.double()).abs().max() if expected.numel() else torch.zeros(())
    ratio = difference / expected.double().abs().max().clamp_min(1e-30) if expected.numel() else difference
    return float(ratio.nan_to_num(nan=float("inf")))


def _normal(*shapes: tuple[int, ...], scale: float = 1.0, shift: float = 0.0):
    return lambda generator: tuple(
        torch.randn(shape, generator=generator, dtype=torch.float64) * scale + shift for shape in shapes
    )


def _duplicates(n: int, d: int):
    """Every particle twice, so half of the distances of each row's nearest pairs are 0."""

    def draw(generator):
        half = torch.randn(n // 2, d, generator=generator, dtype=torch.float64)
        return (half.repeat(2, 1),)

    return draw


def _svgd(label, draw, *, bandwidth=None, **keywords):
    """φ with h as a third differentiable input, unless `bandwidth` fixes it."""

    def function(x, score=None, h=None):
        return ivfast.svgd_direction(x, score, bandwidth=h if bandwidth is None else bandwidth)

    return Case("svgd_direction", label, function, draw, **keywords)


def _with_bandwidth(draw, batch=(), scale=1.0):
    """Adds h of about d per particle set, so that the kernel is neither 0 nor 1."""

    def drawn(generator):
        tensors = draw(generator)
        d = tensors[0].shape[-1]
        return *tensors, (torch.rand(batch, generator=generator, dtype=torch.float64) + 0.5) * scale * d

    return drawn


CASES: list[Case] = [
    _svgd("score", _with_bandwidth(_normal((64, 16), (64, 16)))),
    _svgd("small", _with_bandwidth(_normal((5, 3), (5, 3)))),
    _svgd("odd", _with_bandwidth(_normal((67, 13), (67, 13)))),
    _svgd("batch", _with_bandwidth(_normal((2, 3, 17, 5), (2, 3, 17, 5)), batch=(2, 3))),
    _svgd("paper", _with_bandwidth(_normal((128, 128), (128, 128)))),
    _svgd("large", _with_bandwidth(_normal((300, 40), (300, 40)))),
    _svgd("d=512", _with_bandwidth(_normal((33, 512), (33, 512)))),
    _svgd("standard-normal", _normal((64, 16)), bandwidth=20.0),
    _svgd("median", _normal((3, 65, 7)), bandwidth="median", gradcheck=False),
    _svgd("one", _normal((1, 4)), bandwidth="median", gradcheck=False),
    _svgd("two", _normal((2, 4)), bandwidth="median", gradcheck=False),
    _svgd("duplicates", _duplicates(40, 6), bandwidth=3.0),
    # inputs of mean 10 leave float32 ten times less of each difference
    _svgd("shifted", _with_bandwidth(_normal((64, 16), (64, 16), shift=10.0)), slack=10),
    Case("median_bandwidth", "liu-wang", lambda x: ivfast.median_bandwidth(x), _normal((20, 5))),
    *(
        Case("median_bandwidth", f"{c}-batch", lambda x, c=c: ivfast.median_bandwidth(x, convention=c), _normal((2, 11, 3)))
        for c in ("liu-wang", "blackjax", "numpyro", "paper")
    ),
    Case("multi_js_loss", "paper", lambda x: ivfast.multi_js_loss(x), _normal((320, 5), scale=3)),
    Case("multi_js_loss", "small", lambda x: ivfast.multi_js_loss(x), _normal((6, 2))),
    Case("multi_js_loss", "blocks", lambda x: ivfast.multi_js_loss(x), _normal((7, 13, 7), scale=3)),
    Case("multi_js_loss", "batch", lambda x: ivfast.multi_js_loss(x), _normal((2, 3, 4, 5, 4))),
    Case("multi_js_loss", "many-classes", lambda x: ivfast.multi_js_loss(x), _normal((130, 3, 130))),
    Case("multi_js_loss", "extreme", lambda x: ivfast.multi_js_loss(x), _normal((15, 5), scale=300)),
    Case(
        "multi_js_loss",
        "weights",
        lambda x: ivfast.multi_js_loss(x, weights=torch.tensor([0.5, 0.25, 0.25]).to(x.device)),
        _normal((3, 9, 3)),
    ),
    Case("multi_js_divergence", "paper", lambda x: ivfast.multi_js_divergence(x), _normal((320, 5))),
]  # fmt: skip
