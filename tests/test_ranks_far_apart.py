"""Rings of gloo ranks over float32 samples whose distances products of float32 lose: as formulas in float64 of all data.

As a script, this file runs the ranks.
"""

import functools
import sys
from collections.abc import Callable
from typing import NamedTuple

import formulas
import pytest
import torch
import torch.distributed as dist
from helpers import as_ranks, run_script

import ivfast
from ivfast import distributed

N, D, WORLDS = 21, 3, (1, 2, 3)
CLOSE = {torch.float32: 2e-5, torch.float64: 1e-10}  # as in test_distributed.py


def outliers(x):
    """Three, each by itself."""
    far = torch.tensor([1e5, -3e4, 1e4], dtype=x.dtype).unsqueeze(-1)
    return torch.cat((x[: N // 2], x[N // 2 : N // 2 + 3] * far, x[N // 2 + 3 :]))


def clusters(x):
    """Two, a thousand deviations apart."""
    return x + 1000.0 * (torch.arange(N) % 5 < 2).unsqueeze(-1)


def far_outlier(x):
    """Whose rounding in float64 moves the others if the mean is subtracted."""
    return torch.cat((x[:-1], x[-1:] * 1e19))


SETS = {
    "outliers": outliers,
    "far outlier": far_outlier,
    "clusters": clusters,
    "two samples": lambda x: x + 1000.0,  # the second, half as wide, is at 500
    "1e-20": lambda x: x * 1e-20,
    "1e19": lambda x: x * 1e19,
    "float64": lambda x: far_outlier(x) * 1e-6,
    "tied": lambda x: torch.cat((x[:-2].round(), 1e6 * x[-2:].round() + 1e6)),
    "most coincide": lambda x: torch.cat((x[:4] * 1e5, x[4:5].expand(N - 4, D))),
    "nan": lambda x: torch.cat((x[:-1], x[-1:] * float("nan"))),
    "inf": lambda x: torch.cat((x[:-1], x[-1:] * float("inf"))),
}
BAD = ("nan", "inf")
USUAL = ("outliers", "clusters", "1e-20", "1e19", "nan")


class Case(NamedTuple):
    inputs: int
    call: Callable[..., torch.Tensor]  # of a module with the ops and `inputs` tensors
    sets: tuple[str, ...]  # whose numbers do not leave float32 on the way
    unit: float = 0.0  # of a difference of means


def bridge(ops, z, e, **how):
    return ops.svgd_bridge(z, t=2, draws=torch.stack([e.detach() * k for k in range(1, 4)]), **how)


CASES = {
    "median": Case(
        1,
        lambda ops, x, **how: ops.median_bandwidth(x, **how),
        (*USUAL, "far outlier", "float64", "tied", "most coincide", "inf"),
    ),
    "median of roots": Case(
        1, lambda ops, x, **how: ops.median_bandwidth(x, convention="paper", **how), ("outliers", "1e19")
    ),
    "direction": Case(
        1,
        lambda ops, x, **how: ops.svgd_direction(x, **how),
        (*USUAL, "far outlier", "float64", "most coincide", "inf"),
    ),
    "through the median": Case(
        2,
        lambda ops, x, s, **how: ops.svgd_direction(x, score=s, bandwidth=ops.median_bandwidth(x, **how), **how),
        ("outliers", "clusters"),
    ),
    "narrow": Case(
        2,
        lambda ops, x, s, **how: ops.svgd_direction(x, score=s, bandwidth=1e-3, **how),
        ("outliers", "1e-20", "1e19"),
    ),
    "bridge": Case(2, bridge, ("outliers", "clusters", "1e19", "nan")),
    "imq": Case(
        2, lambda ops, x, y, **how: ops.mmd(x, y, **how), (*USUAL, "two samples", "far outlier", "float64"), 1.0
    ),
    "imq, median": Case(
        2, lambda ops, x, y, **how: ops.mmd(x, y, bandwidth="median", **how), ("clusters", "1e-20", "1e19"), 1.0
    ),
    "rbf": Case(
        2, lambda ops, x, y, **how: ops.mmd(x, y, kernel="rbf", **how), (*USUAL, "far outlier", "most coincide"), 0.3
    ),
    "rbf, biased": Case(
        2,
        lambda ops, x, y, **how: ops.mmd(x, y, kernel="rbf", bandwidth=1.5, unbiased=False, **how),
        ("outliers", "1e-20"),
        0.1,
    ),
    "as": Case(4, lambda ops, *q, **how: ops.as_distance(*q, log=True, **how), (*USUAL, "two samples")),
    "as, prior": Case(
        4,
        lambda ops, *q, **how: ops.as_distance(*q, kernel="additive", measure="prior", log=True, **how),
        ("outliers", "two samples", "1e19"),
    ),
}
CHOSEN = [(case, name) for case, its in CASES.items() for name in its.sets]


def inputs(case, name):
    """Tensors `[N, D]`: particles and a score or noise, or two samples, the second half as wide, or posteriors of such
    means."""
    generator = torch.Generator().manual_seed(len(case))
    normal = [torch.randn(N, D, generator=generator, dtype=torch.float64) for _ in range(4)]
    dtype = torch.float64 if name == "float64" else torch.float32
    points, others = SETS[name](normal[0].to(dtype)), 0.5 * SETS[name](normal[1].to(dtype))
    if name in BAD:
        others = normal[1].to(dtype)
    second = others if case.startswith(("imq", "rbf")) else normal[2].to(dtype)
    if case.startswith("as"):
        return [points, normal[2].to(dtype), others, normal[3].to(dtype)]
    return [points, second][: CASES[case].inputs]


def shares(world):
    return {1: (N,), 2: (N // 3, N - N // 3), 3: (N // 4, 0, N - N // 4)}[world]


def weights(name):
    """Of φ's rows; small where the gradient of φ would overflow float32."""
    of = torch.randn(N, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return of * (1e-20 if name == "1e-20" else 1)


def rank_main(rank, world, folder):
    distributed.exchange.TILE = 500  # several tiles, the last ones cut
    results = {}
    for case, name in CHOSEN:
        mine = [x.split(shares(world))[rank].clone().requires_grad_() for x in inputs(case, name)]
        out = CASES[case].call(distributed, *mine, exchange="ring")
        weight = weights(name).split(shares(world))[rank] if out.dim() else rank + 1
        loss = (out.double() * weight).sum()
        results[case, name] = out.detach(), torch.autograd.grad(loss, mine, allow_unused=True)
    torch.save(results, f"{folder}/{world}{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The results of the ranks of three groups, by the number of ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    run_script(__file__, folder, "-W", "error")
    return {world: [torch.load(folder / f"{world}{rank}.pt") for rank in range(world)] for world in WORLDS}


@functools.cache
def expected(case, name, ops):
    """The value, and the gradients of its weighted sum."""
    dtype = torch.float64 if ops is formulas else None
    whole = [x.to(dtype).requires_grad_() for x in inputs(case, name)]
    out = CASES[case].call(ops, *whole)
    loss = (out.double() * (weights(name) if out.dim() else 1)).sum()
    return out.detach(), torch.autograd.grad(loss, whole, allow_unused=True)


def joined(results, case, name):
    """The value and the gradients of all ranks together."""
    outs, gradients = zip(*(result[case, name] for result in results), strict=True)
    assert outs[0].dim() or all(torch.equal(out, outs[0]) or out.isnan() for out in outs)
    rows = [None if g[0] is None else torch.cat(g, -2) for g in zip(*gradients, strict=True)]
    return torch.cat(outs, -2) if outs[0].dim() > 1 else outs[0], rows


def assert_close(ours, theirs, unit, about):
    """By the largest value, at least `unit`; where float32 holds no more, to its last bit."""
    assert ours.isfinite().all(), about
    last = 2.0**-149 if ours.dtype == torch.float32 else 0.0
    difference = float((ours.double() - theirs).abs().max())
    assert difference <= CLOSE[ours.dtype] * max(float(theirs.abs().max()), unit) + last, (about, difference)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("case", "name"), [chosen for chosen in CHOSEN if chosen[1] not in BAD])
def test_a_ring_computes_far_apart_samples_as_the_formula(results, world, case, name):
    value, gradients = joined(results[world], case, name)
    wanted, its_gradients = expected(case, name, formulas)
    assert_close(value, wanted, CASES[case].unit, "value")
    coefficient = 1 if value.dim() else world * (world + 1) / 2  # the sum of the ranks' losses
    for k, (ours, theirs) in enumerate(zip(gradients, its_gradients, strict=True)):
        if theirs is not None:
            assert_close(ours, theirs * coefficient, 0.0, f"gradient {k}")


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("case", "name"), [chosen for chosen in CHOSEN if chosen[1] in BAD])
def test_a_ring_returns_nan_where_one_process_does(results, world, case, name):
    value, gradients = joined(results[world], case, name)
    wanted, its_gradients = expected(case, name, ivfast)
    assert torch.equal(value.isnan(), wanted.isnan())
    for ours, theirs in zip(gradients, its_gradients, strict=True):
        if theirs is not None:
            assert torch.equal(ours.isnan(), theirs.isnan())


if __name__ == "__main__":
    for ranks in WORLDS:
        as_ranks(ranks, functools.partial(rank_main, world=ranks, folder=sys.argv[1]), sys.argv[1])
