"""CASES: for each op, the inputs it must handle and the accuracy required. Tests and benchmarks share this table."""

import contextlib
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import ivfast

from . import _defaults
from .ops import linear_multi_js

# Largest error divided by the largest value of the float64 reference on the same (rounded) inputs.
# float32: n·eps for a sum of a few hundred terms; half precision: one rounding of the result.
TOLERANCES = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
FEW = 8  # the gradients of so few numbers may all cancel against one set of random weights


class Case(NamedTuple):
    op: str  # a public name of ivfast
    label: str
    function: Callable[..., Tensor | tuple[Tensor, ...]]  # takes only the drawn tensors
    draw: Callable[[torch.Generator], tuple[Tensor, ...]]  # float64 inputs, each differentiable
    slack: float = 1.0  # factor on TOLERANCES, with the reason next to it
    gradcheck: bool = True  # False if part of the value is detached on purpose
    unit: float = 0.0  # for a difference of means: the size of its terms, the smallest scale of comparison
    constants: int = 0  # how many of the drawn tensors, the last ones, carry no gradient

    def __str__(self):
        return f"{self.op}-{self.label}"


@_defaults.initial()
def inputs(case: Case, dtype: torch.dtype, *, device="cpu", seed: int | None = None) -> list[Tensor]:
    """Fresh leaf tensors for `case`; without a seed, PyTorch's default generator picks one."""
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())) if seed is None else seed)
    tensors = [x.to(dtype).to(device) for x in case.draw(generator)]
    for x in tensors[: len(tensors) - case.constants]:
        x.requires_grad_()
    return tensors


def outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def value_and_gradients(case: Case, tensors: list[Tensor], seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of `case`, and the gradients of their sum weighted by fixed random numbers that are exact in every
    dtype."""
    out = outputs(case.function(*tensors))
    tensors = [x for x in tensors if x.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(o.shape, generator=generator, dtype=torch.bfloat16, device="cpu").to(o) for o in out]
    gradients = torch.autograd.grad(out, tensors, weights, allow_unused=True)
    return [o.detach() for o in out], [
        torch.zeros_like(x) if g is None else g for x, g in zip(tensors, gradients, strict=True)
    ]


def error(actual: Tensor, expected: Tensor, unit: float = 0.0) -> float:
    """Largest absolute difference divided by the largest expected value (at least `unit`); infinite if a value is
    NaN."""
    if expected.numel() == 0:
        return 0.0
    actual, expected = actual.detach(), expected.detach()
    floor = max(unit, torch.finfo(actual.dtype).tiny, 1e-30)
    difference = (actual.double() - expected.double()).abs().max()
    return float((difference / expected.double().abs().max().clamp_min(floor)).nan_to_num(nan=float("inf")))


def gradient_units(tensors: list[Tensor], gradients: list[Tensor], *others: list[Tensor]) -> list[float]:
    """The scale of each input's gradient: the size that would change the value as much as the largest gradient does, or
    the largest value of the gradient in `others`, which are for other random weights.

    The gradient of a scalar, such as a bandwidth, can cancel to nothing against one set of weights. It does not against
    several, and |∂L/∂x||x| over all inputs together does not either.
    """
    sizes = [float(x.detach().abs().max()) for x in tensors if x.requires_grad]
    effect = max(float(g.abs().max()) * size for g, size in zip(gradients, sizes, strict=True))
    largest = [max(float(g.abs().max()) for g in its) for its in zip(gradients, *others, strict=True)]
    return [max(effect / max(size, 1e-30), g) for size, g in zip(sizes, largest, strict=True)]


def compare(case: Case, tensors: list[Tensor], implementation: str | None = None) -> dict[str, float]:
    """The error of each value and gradient of `case` against the float64 reference on the CPU, on the same inputs.

    Errors are relative to what the dtype and the case allow: up to 1 passes. `implementation`, if given, is forced for
    the computation; an op without it raises RuntimeError.
    """
    exact = [x.detach().to("cpu", torch.float64).requires_grad_(x.requires_grad) for x in tensors]
    with ivfast.use("reference"):
        expected = value_and_gradients(case, exact)
        few = any(x.numel() <= FEW for x in exact if x.requires_grad)
        others = [value_and_gradients(case, exact, seed)[1] for seed in (1, 2, 3)] if few else []
    with ivfast.use(implementation) if implementation else contextlib.nullcontext():
        actual = value_and_gradients(case, tensors)
    tolerance = TOLERANCES[tensors[0].dtype] * case.slack
    units = [case.unit] * len(expected[0]), gradient_units(exact, expected[1], *others)
    errors = {}
    for kind, ours, theirs, scales in zip(("value", "gradient"), actual, expected, units, strict=True):
        for i, (a, b, unit) in enumerate(zip(ours, theirs, scales, strict=True)):
            same = a.shape == b.shape and (kind == "value" or a.dtype == tensors[0].dtype)
            errors[f"{kind} {i}"] = error(a.cpu(), b, unit) / tolerance if same else math.inf
    return errors


def check(case: Case, tensors: list[Tensor], implementation: str | None = None) -> None:
    """Raise AssertionError if `compare` finds an error above 1."""
    wrong = {name: ratio for name, ratio in compare(case, tensors, implementation).items() if not ratio <= 1}
    assert not wrong, f"{case} in {tensors[0].dtype}, error / tolerance: {wrong}"


def _normal(*shapes: tuple[int, ...], scale: float = 1.0, shift: float = 0.0):
    return lambda generator: tuple(
        torch.randn(shape, generator=generator, dtype=torch.float64) * scale + shift for shape in shapes
    )


def _positive(*shapes: tuple[int, ...], scale: float = 1.0):
    return lambda generator: tuple(
        torch.rand(shape, generator=generator, dtype=torch.float64) * scale for shape in shapes
    )


def _logits_and_pixels(*shape: int):
    def draw(generator):
        logits = torch.randn(shape, generator=generator, dtype=torch.float64) * 3
        return logits, torch.rand(shape, generator=generator, dtype=torch.float64)

    return draw


def _linear(classes: int, n: int, features: int, bias: bool = True):
    """Features of C blocks of n rows, and the weight and bias of a layer to C logits of about 1."""

    def draw(generator):
        shapes = [(classes, n, features), (classes, features), (classes,)][: 3 if bias else 2]
        f, *rest = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
        return f, rest[0] / features**0.5, *rest[1:]

    return draw


def _duplicates(n: int, d: int):
    """Every particle occurs twice, so half of the distances of each row's nearest pairs are 0."""

    def draw(generator):
        half = torch.randn(n // 2, d, generator=generator, dtype=torch.float64)
        return (half.repeat(2, 1),)

    return draw


def _svgd(label, draw, *, bandwidth=None, **keywords):
    """φ with h as a third differentiable input, unless `bandwidth` fixes it."""

    def function(x, score=None, h=None):
        return ivfast.svgd_direction(x, score, bandwidth=h if bandwidth is None else bandwidth)

    return Case("svgd_direction", label, function, draw, **keywords)


def _median(convention):
    return lambda x: ivfast.median_bandwidth(x, convention=convention)


def _gaussians(n: int, m: int, d: int, batch: tuple[int, ...] = ()):
    """Means and log-variances of n and m posteriors, log-variances over the range of a trained VAE."""

    def draw(generator):
        def one(rows):
            mu = torch.randn(*batch, rows, d, generator=generator, dtype=torch.float64)
            return mu, torch.rand(*batch, rows, d, generator=generator, dtype=torch.float64) * 4 - 3

        return *one(n), *one(m)

    return draw


def _as_distance(label, draw, *, slack=1.0, unit=0.0, **form):
    """A logarithm is as accurate as its argument and may be close to 0."""
    unit = 1.0 if form.get("log") else unit
    return Case("as_distance", label, lambda *q: ivfast.as_distance(*q, **form), draw, slack=slack, unit=unit)


def _mmd(label, draw, *, gradcheck=True, **form):
    """Each kernel is 1 at distance 0, and the sum over scales is a few times that."""
    return Case("mmd", label, lambda x, y: ivfast.mmd(x, y, **form), draw, gradcheck=gradcheck, unit=0.1)


def _cycle(z: Tensor, k: int) -> Tensor:
    """Block indices 0, 1, …, k − 1, 0, … for the rows of z."""
    rows = z.shape[:-1]
    return (torch.arange(rows.numel(), device=z.device) % k).view(rows)


def _moments(d: int, batch: tuple[int, ...] = (), rank: int | None = None):
    """Two means and two covariances `[..., d, d]`, computed from `rank` points each (default: more than d)."""

    def draw(generator):
        def one():
            a = torch.randn(*batch, rank or 2 * d, d, generator=generator, dtype=torch.float64)
            return torch.randn(*batch, d, generator=generator, dtype=torch.float64), a.mT @ a / a.shape[-2]

        (mu1, sigma1), (mu2, sigma2) = one(), one()
        return mu1, sigma1, mu2, sigma2

    return draw


def _with_bandwidth(draw, batch=(), scale=1.0):
    """Adds h of about d per particle set, so that the kernel is neither 0 nor 1."""

    def drawn(generator):
        tensors = draw(generator)
        d = tensors[0].shape[-1]
        return *tensors, (torch.rand(batch, generator=generator, dtype=torch.float64) + 0.5) * scale * d

    return drawn


# one case per line
# fmt: off
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
    # inputs with mean 10 leave float32 ten times less precision in each difference
    _svgd("shifted", _with_bandwidth(_normal((64, 16), (64, 16), shift=10.0)), slack=10),
    Case("median_bandwidth", "liu-wang", lambda x: ivfast.median_bandwidth(x), _normal((20, 5))),
    *(
        Case("median_bandwidth", f"{name}-batch", _median(name), _normal((2, 11, 3)))
        for name in ("liu-wang", "blackjax", "numpyro", "paper")
    ),
    Case("multi_js_loss", "paper", lambda x: ivfast.multi_js_loss(x), _normal((320, 5), scale=3)),
    Case("multi_js_loss", "small", lambda x: ivfast.multi_js_loss(x), _normal((6, 2))),
    Case("multi_js_loss", "blocks", lambda x: ivfast.multi_js_loss(x), _normal((7, 13, 7), scale=3)),
    Case("multi_js_loss", "batch", lambda x: ivfast.multi_js_loss(x), _normal((2, 3, 4, 5, 4))),
    Case("multi_js_loss", "many-classes", lambda x: ivfast.multi_js_loss(x), _normal((130, 3, 130))),
    Case("multi_js_loss", "extreme", lambda x: ivfast.multi_js_loss(x), _normal((15, 5), scale=300), slack=5),  # lse near 900 is rounded by 3e-5
    Case(
        "multi_js_loss",
        "weights",
        lambda x: ivfast.multi_js_loss(x, weights=torch.tensor([0.5, 0.25, 0.25]).to(x.device)),
        _normal((3, 9, 3)),
    ),
    Case("multi_js_loss", "smoothed", lambda x: ivfast.multi_js_loss(x, label_smoothing=0.3), _normal((4, 5, 4), scale=3)),
    Case("multi_js_loss", "uniform", lambda x: ivfast.multi_js_loss(x, label_smoothing=1.0), _normal((35, 5), scale=3)),
    Case("linear_multi_js_loss", "paper", lambda *p: linear_multi_js.fused(*p), _linear(5, 64, 32)),
    Case("linear_multi_js_loss", "small", lambda *p: linear_multi_js.fused(*p, label_smoothing=0.2), _linear(3, 2, 4), slack=2),  # logits and their gradient are rounded between products
    Case("linear_multi_js_loss", "no-bias", lambda f, w: linear_multi_js.fused(f, w, None), _linear(7, 3, 5, bias=False), slack=2),  # as above
    Case("linear_multi_js_loss", "one-chunk", lambda *p: ivfast.linear_multi_js_loss(*p), _linear(40, 29, 3)),
    Case("multi_js_divergence", "paper", lambda x: ivfast.multi_js_divergence(x), _normal((320, 5))),
    Case("blockwise_bridge", "paper", lambda z, e: ivfast.blockwise_bridge(z, 4, draws=e), _normal((64, 16), (64, 16)), constants=1),
    Case("blockwise_bridge", "batch", lambda z, e: ivfast.blockwise_bridge(z, 3, draws=e), _normal((2, 3, 6), (2, 3, 6)), constants=1),
    Case("radial_bridge", "paper", lambda z, e: ivfast.radial_bridge(z, 4, draws=e), _normal((64, 16), (64, 16)), constants=1),
    Case("radial_bridge", "batch", lambda z, e: ivfast.radial_bridge(z, 3, draws=e), _normal((2, 3, 5), (2, 3, 5)), constants=1),
    Case("svgd_bridge", "paper", lambda z, e: ivfast.svgd_bridge(z, 4, draws=e), _normal((64, 16), (7, 64, 16)), constants=1, gradcheck=False),
    Case("svgd_bridge", "batch", lambda z, e: ivfast.svgd_bridge(z, 3, iterations=1, draws=e), _normal((2, 9, 5), (3, 2, 9, 5)), constants=1, gradcheck=False),
    Case("svgd_bridge", "one-step", lambda z, e: ivfast.svgd_bridge(z, 1, draws=e), _normal((4, 3), (1, 4, 3)), constants=1),
    Case("block_substitute", "paper", lambda z, e: ivfast.block_substitute(z, 4, _cycle(z, 4), draws=e), _normal((64, 100), (64, 100)), constants=1),
    Case("block_substitute", "batch", lambda z, e: ivfast.block_substitute(z, 2, _cycle(z, 2), draws=e), _normal((2, 3, 6), (2, 3, 6)), constants=1),
    Case("gaussian_kl", "paper", lambda mu, logvar: ivfast.gaussian_kl(mu, logvar), _normal((128, 128), (128, 128))),
    Case("gaussian_kl", "batch", lambda mu, logvar: ivfast.gaussian_kl(mu, logvar), _normal((2, 3, 5), (2, 3, 5))),
    Case("gaussian_kl", "near-prior", lambda mu, logvar: ivfast.gaussian_kl(mu, logvar), _normal((7, 4), (7, 4), scale=1e-3)),
    Case("reparameterize", "paper", lambda mu, logvar, e: ivfast.reparameterize(mu, logvar, draws=e), _normal((128, 128), (128, 128), (128, 128)), constants=1),
    Case("reparameterize", "batch", lambda mu, logvar, e: ivfast.reparameterize(mu, logvar, draws=e), _normal((2, 3, 5), (2, 3, 5), (2, 3, 5)), constants=1),
    Case("reparameterize", "near-prior", lambda mu, logvar, e: ivfast.reparameterize(mu, logvar, draws=e).kl, _normal((7, 4), (7, 4), (7, 4), scale=1e-3), constants=1),
    Case("exp_elbo_loss", "paper", lambda r, k: ivfast.exp_elbo_loss(r, k, beta_reconstruction=0.5), _positive((64,), (64,))),
    Case("exp_elbo_loss", "batch", lambda r, k: ivfast.exp_elbo_loss(r, k, scale=0.1, alpha=1.0), _positive((3, 7), (3, 7), scale=4)),
    Case("reconstruction_loss", "l2", lambda x, t: ivfast.reconstruction_loss(x, t), _normal((64, 3, 8, 8), (64, 3, 8, 8))),
    Case("reconstruction_loss", "l2-small", lambda x, t: ivfast.reconstruction_loss(x, t), _normal((5, 7), (5, 7))),
    Case("reconstruction_loss", "l1", lambda x, t: ivfast.reconstruction_loss(x, t, kind="l1"), _normal((5, 2, 3), (5, 2, 3))),
    Case("reconstruction_loss", "bce", lambda x, t: ivfast.reconstruction_loss(x, t, kind="bce"), _logits_and_pixels(5, 7)),
    Case("reconstruction_loss", "bce-image", lambda x, t: ivfast.reconstruction_loss(x, t, kind="bce"), _logits_and_pixels(16, 1, 28, 28)),
    Case("importance_weighted_loss", "paper", lambda l: ivfast.importance_weighted_loss(l), _normal((64,)), gradcheck=False),
    Case("importance_weighted_loss", "batch", lambda l: ivfast.importance_weighted_loss(l), _normal((3, 7), scale=4), gradcheck=False),
    Case("importance_weighted_loss", "extreme", lambda l: ivfast.importance_weighted_loss(l), _normal((9,), scale=200), gradcheck=False),
    _mmd("imq", _normal((100, 64), (100, 64))),
    _mmd("imq-small", _normal((5, 3), (6, 3))),
    _mmd("imq-batch", _normal((2, 5, 3), (2, 4, 3)), unbiased=False),
    _mmd("rbf", _normal((33, 7), (20, 7)), kernel="rbf", scales=(0.5, 1.0, 2.0), bandwidth=7.0),
    _mmd("rbf-median", _normal((17, 5), (12, 5)), kernel="rbf", gradcheck=False),
    _as_distance("product", _gaussians(5, 4, 3), unit=0.01),
    _as_distance("product-paper", _gaussians(64, 64, 32), log=True),
    _as_distance("product-batch", _gaussians(3, 4, 2, batch=(2,)), unbiased=True, unit=0.01),
    _as_distance("product-d=512", _gaussians(17, 9, 512), log=True, slack=50),  # |log k| up to 3,000, so exp(log k − log Σ) is off by 3,000 eps
    _as_distance("prior", _gaussians(5, 4, 3), measure="prior", unit=0.01),
    _as_distance("prior-log", _gaussians(9, 9, 40), measure="prior", log=True),
    _as_distance("additive", _gaussians(5, 4, 3), kernel="additive", unit=0.01),
    _as_distance("additive-paper", _gaussians(64, 64, 32), kernel="additive", unbiased=True, unit=0.05),
    _as_distance("additive-prior", _gaussians(6, 7, 5), kernel="additive", measure="prior", log=True),
    Case("log_gaussian_kernel_sums", "d=512", lambda *q: ivfast.log_gaussian_kernel_sums(*q), _gaussians(8, 9, 512), slack=50),  # as above
    Case("log_gaussian_kernel_sums", "unbiased", lambda *q: ivfast.log_gaussian_kernel_sums(*q, unbiased=True), _gaussians(3, 4, 2), unit=1.0),
    Case("fld", "paper", lambda z: ivfast.fld(z), _normal((200, 16))),
    Case("fld", "batch", lambda z: ivfast.fld(z), _normal((2, 9, 3))),
    Case("fld", "rank-deficient", lambda z: ivfast.fld(z), _normal((6, 12))),
    Case("frechet_distance_from_samples", "full-rank", lambda x, y: ivfast.frechet_distance_from_samples(x, y), _normal((9, 3), (8, 3))),
    Case("frechet_distance_from_samples", "batch", lambda x, y: ivfast.frechet_distance_from_samples(x, y), _normal((2, 30, 7), (2, 40, 7))),
    Case("frechet_distance_from_samples", "rank-deficient", lambda x, y: ivfast.frechet_distance_from_samples(x, y), _normal((5, 12), (4, 12)), gradcheck=False),
    Case("frechet_distance", "full-rank", lambda *m: ivfast.frechet_distance(*m), _moments(4)),
    Case("frechet_distance", "batch", lambda *m: ivfast.frechet_distance(*m), _moments(6, batch=(2,))),
    Case("sqrtm_spd", "full-rank", lambda x: ivfast.sqrtm_spd(x @ x.mT), _normal((6, 24)), unit=0.1, slack=2),  # x xᵀ is rounded before, its gradient after; 24 columns keep it well-conditioned
    Case("sqrtm_spd", "batch", lambda x: ivfast.sqrtm_spd(x @ x.mT), _normal((2, 4, 20)), unit=0.1, slack=2),  # as above
    Case("polar", "tall", lambda m: ivfast.polar(m), _normal((9, 4)), unit=0.1),
    Case("polar", "wide", lambda m: ivfast.polar(m), _normal((2, 3, 7)), unit=0.1),
]
# fmt: on
