"""Random arguments for every op: one function for each."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import formulas
import torch
from fuzz_draw import Draw
from fuzz_smooth import SMOOTH, TWICE
from torch import Tensor

import ivfast

CONVENTIONS = ("liu-wang", "blackjax", "numpyro", "paper")


class Set(NamedTuple):
    """One call `op(**tensors, **constants, **options)`."""

    op: Callable
    formula: Callable
    tensors: dict[str, Tensor]  # differentiable, in the set's dtype
    constants: dict[str, Tensor]  # no gradient
    options: dict[str, Any]
    dtype: torch.dtype
    smooth: bool = True  # whether the value can be differentiated here
    twice: bool = True  # whether the gradient can, too
    maps: bool = True  # whether vmap can batch it


def of(draw: Draw, name: str, tensors: dict, constants=None, /, **options) -> Set:
    constants = {k: v if v.dtype == torch.int64 else draw.stored(v) for k, v in (constants or {}).items()}
    tensors = {k: draw.stored(x) for k, x in tensors.items()}
    smooth = SMOOTH[name](**tensors, **options) if name in SMOOTH else True
    twice = TWICE[name](**tensors) if name in TWICE else True
    return Set(getattr(ivfast, name), getattr(formulas, name), tensors, constants, options, draw.dtype, smooth, twice)


def median_bandwidth(draw):
    n, _, d = draw.pairs()
    draw.leading(n * n * d)
    return of(draw, "median_bandwidth", {"x": draw.samples(n, d)}, convention=draw.choice(CONVENTIONS))


def svgd_direction(draw):
    n, _, d = draw.pairs()
    draw.leading(n * n * d)
    tensors, options = {"x": draw.samples(n, d)}, {}
    if draw.often(0.7):
        tensors["score"] = draw.normal(*draw.batch, n, d) * 10 ** draw.random.uniform(-2, 2)
    kind = draw.choice(("median", "number", "tensor", "default"))
    h = d * draw.scale**2 * 10 ** draw.random.uniform(-1, 1)
    if kind == "median":
        options = {"convention": draw.choice(CONVENTIONS)}
    elif kind == "number":
        options = {"bandwidth": h}
    elif kind == "tensor" and h > 1e-3:  # in half precision too
        tensors["bandwidth"] = h * (0.5 + draw.uniform(*(draw.batch if draw.often(0.7) else ())))
    if draw.often(0.3):
        options["scale"] = 10 ** draw.random.uniform(-1, 2)
    return of(draw, "svgd_direction", tensors, **options)


def svgd_bridge(draw):
    n, d, t, iterations = draw.size(most=33), draw.size(), draw.random.randint(1, 3), draw.random.randint(1, 2)
    draw.leading(n * n * d * t)
    steps = (t - 1) * iterations + 1
    z = draw.samples(n, d)
    draws = draw.normal(steps, *draw.batch, n, d)
    options = {"t": t, "iterations": iterations}
    if draw.often(0.5):
        options["step_size"] = draw.random.uniform(0, 1.5)
        options["scale"] = 10 ** draw.random.uniform(-1, 2)
        options["noise"] = draw.random.choice((0.0, 0.3))
    return of(draw, "svgd_bridge", {"z": z}, {"draws": draws}, **options)


def codes(draw, blocks=1):
    """Codes whose dimension the number of blocks divides, and draws."""
    n, d = draw.size(), draw.size(most=20) * blocks
    draw.leading(n * d)
    return draw.samples(n, d), draw.normal(*draw.batch, n, d)


def blockwise_bridge(draw):
    t = draw.random.randint(1, 6)
    z, draws = codes(draw, t)
    return of(draw, "blockwise_bridge", {"z": z}, {"draws": draws}, t=t)


def radial_bridge(draw):
    z, draws = codes(draw)
    return of(draw, "radial_bridge", {"z": z}, {"draws": draws}, t=draw.random.randint(1, 6))


def block_substitute(draw):
    k = draw.random.randint(1, 6)
    z, draws = codes(draw, k)
    index = torch.randint(k, z.shape[:-1], generator=draw.generator)
    return of(draw, "block_substitute", {"z": z}, {"draws": draws, "index": index}, k=k)


def posteriors(draw, *shape):
    """Means and log-variances."""
    draw.centre = min(max(draw.centre, -50), 50)
    width = draw.choice((1e-3, 1.0, 1.0, 4.0, 20.0))
    return draw.samples(*shape), draw.normal(*draw.batch, *shape).clamp(-4, 4) * width


def gaussian_kl(draw):
    shape = draw.size(), draw.size()
    draw.leading(math.prod(shape))
    mu, logvar = posteriors(draw, *shape)
    return of(draw, "gaussian_kl", {"mu": mu, "logvar": logvar.clamp(max=8)})


def reparameterize(draw):
    shape = draw.size(), draw.size()
    draw.leading(math.prod(shape))
    mu, logvar = posteriors(draw, *shape)
    draws = draw.normal(*mu.shape)
    return of(draw, "reparameterize", {"mu": mu, "logvar": logvar.clamp(max=8)}, {"draws": draws})


def reconstruction_loss(draw):
    shape = (draw.size(), *(draw.size(most=12) for _ in range(draw.random.randint(0, 3))))
    kind = draw.choice(("l2", "l1", "bce"))
    output = draw.normal(*shape) * draw.scale
    target = draw.uniform(*shape) if kind == "bce" else output + draw.normal(*shape) * draw.scale
    if kind != "bce" and draw.often(0.2):
        target = torch.where(draw.uniform(*shape) < 0.5, output, target)
    return of(draw, "reconstruction_loss", {"output": output, "target": target}, kind=kind)


def importance_weighted_loss(draw):
    n = draw.size()
    draw.leading(n)
    logits = draw.normal(*draw.batch, n) * min(draw.scale, 100) + draw.centre / 100
    return of(draw, "importance_weighted_loss", {"logits": logits})


def exp_elbo_loss(draw):
    n = draw.size()
    draw.leading(n)
    size = 10 ** draw.random.uniform(-2, 2)
    tensors = {"reconstruction": draw.uniform(*draw.batch, n) * size, "kl": draw.uniform(*draw.batch, n) * size}
    options = {}
    if draw.often(0.5):
        options = {"scale": draw.choice((1.0, 1 / size)), "alpha": draw.random.uniform(0.5, 3)}
        options["beta_reconstruction"] = draw.choice((0.0, 0.5, 1.0))
        # e^+x of larger losses leaves float16, and gradients of both signs that did would add up to NaN
        options["beta_kl"] = draw.choice((0.0, 1.0, 2.0, -0.5 if options["scale"] * size <= 1 else 1.0))
    return of(draw, "exp_elbo_loss", tensors, **options)


def class_weights(draw, classes):
    weights = draw.uniform(classes) + 0.1
    if draw.often(0.1):
        weights[0] = 0
    return weights / weights.sum()


def logits(draw):
    classes, n = max(2, draw.size(most=33)), draw.size(most=33)
    draw.leading(classes * classes * n)
    flat = draw.often(0.3)
    shape = (classes * n, classes) if flat else (*draw.batch, classes, n, classes)
    return draw.normal(*shape) * min(draw.scale, 1000) + draw.centre


def multi_js_loss(draw):
    x = logits(draw)
    constants, options = {}, {}
    if draw.often(0.3):
        constants["weights"] = class_weights(draw, x.shape[-1])
    if draw.often(0.4):
        options["label_smoothing"] = draw.choice((0.1, 0.5, 1.0))
    return of(draw, "multi_js_loss", {"logits": x}, constants, **options)


def multi_js_divergence(draw):
    x = logits(draw)
    constants = {"weights": class_weights(draw, x.shape[-1])} if draw.often(0.4) else {}
    return of(draw, "multi_js_divergence", {"logits": x}, constants)


def multi_js_block_losses(draw):
    x = logits(draw)
    return of(draw, "multi_js_block_losses", {"logits": x})


def linear_multi_js_loss(draw):
    classes, n, width = max(2, draw.size(most=33)), draw.size(most=20), draw.size(most=33)
    draw.scale, draw.centre = min(draw.scale, 10), min(max(draw.centre, -10), 10)
    shape = (classes * n, width) if draw.often(0.3) else (classes, n, width)
    tensors = {"features": draw.samples(*shape), "weight": draw.normal(classes, width) / width**0.5}
    if draw.often(0.7):
        tensors["bias"] = draw.normal(classes)
    constants = {"weights": class_weights(draw, classes)} if draw.often(0.3) else {}
    options = {"label_smoothing": draw.choice((0.1, 1.0))} if draw.often(0.3) else {}
    return of(draw, "linear_multi_js_loss", tensors, constants, **options)


def two_samples(draw, low):
    n, m, d = draw.pairs(low)
    draw.leading(max(n, m) ** 2 * d)
    x = draw.samples(n, d)
    if draw.often(0.2):
        draw.renew()
    return x, draw.samples(m, d)


def mmd(draw):
    unbiased = draw.often(0.6)
    x, y = two_samples(draw, 2 if unbiased else 1)
    options, constants = {"unbiased": unbiased, "kernel": draw.choice(("imq", "rbf"))}, {}
    b = 2 * x.shape[-1] * draw.scale**2 * 10 ** draw.random.uniform(-1, 1)
    kind = draw.choice(("default", "median", "number", "tensor"))
    if kind == "median":
        options["bandwidth"] = "median"
    elif kind == "number":
        options["bandwidth"] = b
    elif kind == "tensor" and b > 1e-3:
        constants["bandwidth"] = b * (0.5 + draw.uniform(*(draw.batch if draw.often(0.7) else ())))
    if draw.often(0.3):
        options["scales"] = tuple(10 ** draw.random.uniform(-1, 1) for _ in range(draw.random.randint(1, 4)))
    return of(draw, "mmd", {"x": x, "y": y}, constants, **options)


def posterior_batches(draw):
    unbiased = draw.often(0.4)
    n, m, d = draw.pairs(2 if unbiased else 1)
    draw.leading(max(n, m) ** 2 * d)
    mu_r, logvar_r = posteriors(draw, n, d)
    mu_g, logvar_g = posteriors(draw, m, d)
    tensors = {"mu_r": mu_r, "logvar_r": logvar_r, "mu_g": mu_g, "logvar_g": logvar_g}
    options = {"unbiased": unbiased, "kernel": draw.choice(("product", "additive"))}
    return tensors, options | {"measure": draw.choice(("lebesgue", "prior"))}


def log_gaussian_kernel_sums(draw):
    tensors, options = posterior_batches(draw)
    return of(draw, "log_gaussian_kernel_sums", tensors, **options)


def as_distance(draw):
    tensors, options = posterior_batches(draw)
    return of(draw, "as_distance", tensors, log=draw.often(0.5), **options)


def fld(draw):
    n, d = draw.size(2), draw.size()
    draw.leading(n * d * min(n, d))
    return of(draw, "fld", {"z": draw.samples(n, d)})


def frechet_distance_from_samples(draw):
    x, y = two_samples(draw, 2)
    return of(draw, "frechet_distance_from_samples", {"x": x, "y": y})


def covariance(draw, d):
    a = draw.normal(*draw.batch, d + draw.random.randint(0, 2 * d), d) * min(draw.scale, 100)
    sigma = a.mT @ a / a.shape[-2]
    rounding = torch.finfo(draw.dtype).eps * torch.linalg.matrix_norm(sigma, keepdim=True)
    return sigma + rounding * torch.eye(d, dtype=torch.float64)  # positive also when it is rounded


def frechet_distance(draw):
    d = draw.size(most=6)
    draw.leading(d**4)
    tensors = {f"mu{i}": draw.normal(*draw.batch, d) * draw.scale + draw.centre for i in (1, 2)}
    return of(draw, "frechet_distance", tensors | {f"sigma{i}": covariance(draw, d) for i in (1, 2)})


def sqrtm_spd(draw):
    d = draw.size(most=6)
    draw.leading(d**4)
    return of(draw, "sqrtm_spd", {"a": covariance(draw, d)})


def polar(draw):
    p, q = draw.size(most=9), draw.size()
    draw.leading(p * q * p * p)
    draw.centre = 0.0
    m = draw.samples(p, q)
    return of(draw, "polar", {"m": m.mT if draw.often(0.5) else m})


def statistics(x, batches):
    """Mean and covariance of x, which arrives in `batches` parts: two of them in another object, merged."""
    parts = x.tensor_split(batches)
    one, other = (ivfast.GaussianStatistics(x.shape[-1]) for _ in range(2))
    for i, part in enumerate(parts):
        (other if i % 3 == 1 else one).update(part)
    merged = one + other
    return merged.mean, merged.covariance


def gaussian_statistics(draw):
    n, d = draw.choice((draw.size(2), 300, 700)), draw.size(most=33)
    draw.batch = ()
    x = draw.stored(draw.samples(n, d))
    formula = lambda x, batches: formulas.gaussian_statistics(x)  # noqa: E731
    return Set(statistics, formula, {"x": x}, {}, {"batches": draw.random.randint(1, 5)}, draw.dtype, False, maps=False)


DRAWS = {
    "GaussianStatistics": gaussian_statistics,
    "as_distance": as_distance,
    "block_substitute": block_substitute,
    "blockwise_bridge": blockwise_bridge,
    "exp_elbo_loss": exp_elbo_loss,
    "fld": fld,
    "frechet_distance": frechet_distance,
    "frechet_distance_from_samples": frechet_distance_from_samples,
    "gaussian_kl": gaussian_kl,
    "importance_weighted_loss": importance_weighted_loss,
    "linear_multi_js_loss": linear_multi_js_loss,
    "log_gaussian_kernel_sums": log_gaussian_kernel_sums,
    "median_bandwidth": median_bandwidth,
    "mmd": mmd,
    "multi_js_block_losses": multi_js_block_losses,
    "multi_js_divergence": multi_js_divergence,
    "multi_js_loss": multi_js_loss,
    "polar": polar,
    "radial_bridge": radial_bridge,
    "reconstruction_loss": reconstruction_loss,
    "reparameterize": reparameterize,
    "sqrtm_spd": sqrtm_spd,
    "svgd_bridge": svgd_bridge,
    "svgd_direction": svgd_direction,
}
