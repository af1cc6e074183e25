"""Ops over the samples of several gloo ranks: the same values and gradients as one process on the concatenation.

As a script, this file runs the ranks.
"""

import contextlib
import functools
import re
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import as_ranks, run_script

import ivfast
from ivfast import distributed
from ivfast.ops import _collectives
from ivfast.testing import error

N, M, D = 23, 18, 5
RING = ("gather", "ring")
KERNELS = find_spec("ivfast._C") is not None
# Like ivfast.testing.TOLERANCES, except that float64 loses digits in sums that cancel, and that each rank rounds its
# gradients before they are added.
ALLOWED = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 1.6e-2}
# Differences of means or of their logarithms are compared on the scale of the means, and a narrow kernel's direction on
# that of the positions, whose differences it divides by h/2.
UNITS = {"narrow": 1.0, "mmd": 1.0, "mmd_rbf": 0.3, "mmd_prior": 1.0, "as_log": 1.0, "as_prior": 0.05}


def rounded(x):
    """Points on a grid, many of them equal, with the gradient of x."""
    return x + (x.round() - x).detach()


# name -> (exchanges, rows of the inputs, function of the module, its inputs and keywords)
CASES = {
    "direction": (RING, (N,), lambda ops, x, **how: ops.svgd_direction(x, **how)),
    "score": (RING, (N, N), lambda ops, x, score, **how: ops.svgd_direction(x, score=score, bandwidth=2.5, **how)),
    "narrow": (RING, (N,), lambda ops, x, **how: ops.svgd_direction(x, bandwidth=1e-6, **how)),
    "blackjax": (RING, (N,), lambda ops, x, **how: ops.svgd_direction(x, convention="blackjax", scale=3.0, **how)),
    "numpyro": (RING, (N,), lambda ops, x, **how: ops.svgd_direction(x, convention="numpyro", **how)),
    "tied": (RING, (N,), lambda ops, x, **how: ops.svgd_direction(rounded(x), convention="paper", **how)),
    "together": (RING, (N,), lambda ops, x, **how: ops.svgd_direction(x * 0 + 1, bandwidth="median", **how)),
    "sets": (RING, (2, 3, N), lambda ops, x, **how: ops.svgd_direction(x, **how)),
    "one": (RING, (1,), lambda ops, x, **how: ops.svgd_direction(x, **how)),
    "bandwidth": (
        RING,
        (N,),
        lambda ops, x, **how: ops.svgd_direction(x, bandwidth=ops.median_bandwidth(x, **how), **how),
    ),
    "median": (RING, (N,), lambda ops, x, **how: ops.median_bandwidth(x, convention="paper", **how)),
    # the mean of 16 is exact, and so are tied distances
    "median_tied": (RING, (16,), lambda ops, x, **how: ops.median_bandwidth(rounded(x), convention="numpyro", **how)),
    "median_sets": (RING, (2, 3, N), lambda ops, x, **how: ops.median_bandwidth(x, **how).sum()),
    "bridge": (
        RING,
        (N, N),
        lambda ops, z, e, **how: ops.svgd_bridge(z, 3, draws=torch.stack([e.detach() * k for k in range(1, 6)]), **how),
    ),
    "mmd": (RING, (N, M), lambda ops, x, y, **how: ops.mmd(x, y, **how)),
    "mmd_rbf": (RING, (N, M), lambda ops, x, y, **how: ops.mmd(x, y, kernel="rbf", unbiased=False, **how)),
    "mmd_prior": (RING, (N, M), lambda ops, x, y, **how: ops.mmd(x, y.detach(), bandwidth=3.0, **how)),
    "mmd_sets": (RING, (2, N), lambda ops, x, **how: ops.mmd(x, x + 1, **how)),
    "as": (RING, (N, N, M, M), lambda ops, *q, **how: ops.as_distance(*q, **how)),
    "as_log": (RING, (N, N, M, M), lambda ops, *q, **how: ops.as_distance(*q, log=True, unbiased=True, **how)),
    "as_prior": (
        RING,
        (N, N, M, M),
        lambda ops, *q, **how: ops.as_distance(*q, kernel="additive", measure="prior", **how),
    ),
    "js": (("",), (5, 4), lambda ops, x, **how: ops.multi_js_loss(x, **how)),
    "js_weights": (
        ("",),
        (5, 4),
        lambda ops, x, **how: ops.multi_js_loss(x, weights=torch.arange(1, 6).to(x) / 15, label_smoothing=0.1, **how),
    ),
    "importance": (("",), (N,), lambda ops, x, **how: ops.importance_weighted_loss(3 * x[..., 0], **how)),
    "fld": (("gather", "reduce"), (N,), lambda ops, z, **how: ops.fld(z, **how)),
}


def drawn(name, dtype):
    """The inputs `[..., n, d]` of a case, leaves in one process."""
    _, rows, _ = CASES[name]
    shapes = [(*rows, D)] if "sets" in name or name.startswith("js") else [(n, D) for n in rows]
    generator = torch.Generator().manual_seed(len(name) + sum(map(ord, name)))
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def weights(shape):
    """Weights of a loss that sums over rows, different for each row, so that swapped rows show."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def shares(n, world, name):
    """Rows per rank: uneven, with one rank without rows where that is allowed."""
    if name.startswith("js"):
        return (1, n - 1) if world == 2 else (1, 2, n - 3)
    return (n // 3, n - n // 3) if world == 2 else (n // 4, 0, n - n // 4)


def own(x, rank, world, name):
    return x.split(shares(x.shape[-2], world, name), -2)[rank]


def rank_main(rank, world, folder):
    distributed.exchange.TILE = 150  # several tiles, the last ones cut
    results = {}
    for name, (exchanges, _, function) in CASES.items():
        for exchange in exchanges:
            for dtype in ALLOWED:
                mine = [own(x.detach(), rank, world, name).clone().requires_grad_() for x in drawn(name, dtype)]
                how = {"exchange": exchange} if exchange else {}
                out = function(distributed, *mine, **how)
                gradients = None
                if out.requires_grad:
                    loss = out.double().sum() * (rank + 1)
                    if out.dim() > 1:
                        whole = weights((*out.shape[:-2], sum(rows_of_rank(name, world)), D))
                        loss = (out.double() * own(whole, rank, world, name)).sum()
                    gradients = torch.autograd.grad(loss, mine, allow_unused=True)
                results[name, exchange, dtype] = out.detach(), gradients
    results["said"] = said(rank, world)
    mine = own(with_nan(), rank, world, "median").clone().requires_grad_()
    h = distributed.median_bandwidth(mine, exchange="ring")
    results["nan"] = h.detach(), torch.autograd.grad(h, mine)[0]
    torch.save(results, f"{folder}/{world}{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def with_nan():
    x = drawn("median", torch.float32)[0].detach()
    x[-1, 2] = float("nan")
    return x


def rows_of_rank(name, world):
    return shares(CASES[name][1][-1] if "sets" in name else CASES[name][1][0], world, name)


def said(rank, world):
    """The error of every rank when the arguments of one do not fit."""
    last = rank == world - 1
    calls = (
        lambda: distributed.svgd_direction(torch.zeros(3, 4 if last else 5)),
        lambda: distributed.mmd(torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.float64 if last else torch.float32)),
        lambda: distributed.fld(torch.zeros(3, 2, requires_grad=last)),
        lambda: distributed.svgd_direction(torch.zeros(0, 2)),
        lambda: distributed.fld(torch.zeros(int(last), 2)),
        lambda: distributed.svgd_direction(torch.zeros(2, 2), exchange="none"),
    )
    messages = []
    for call in calls:
        with pytest.raises(ValueError) as raised:
            call()
        messages.append(str(raised.value))
    return messages


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The results of the ranks of two groups, by the number of ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    run_script(__file__, folder, "-W", "error")
    return {world: [torch.load(folder / f"{world}{rank}.pt") for rank in range(world)] for world in (2, 3)}


@pytest.mark.parametrize("world", [2, 3])
def test_a_median_with_a_particle_that_is_not_a_number_is_none(results, world):
    x = with_nan().requires_grad_()
    h = ivfast.median_bandwidth(x)
    (expected,) = torch.autograd.grad(h, x)
    values, gradients = zip(*(result["nan"] for result in results[world]), strict=True)
    assert h.isnan()
    assert all(value.isnan() for value in values)
    assert torch.equal(torch.cat(gradients).isnan(), expected.isnan())


@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(("name", "exchange"), [(name, how) for name, case in CASES.items() for how in case[0]])
def test_as_one_process_on_the_concatenation(results, world, name, exchange, dtype):
    allowed = ALLOWED[dtype]
    whole = drawn(name, dtype)
    expected = CASES[name][2](ivfast, *whole)
    outs, gradients = zip(*(result[name, exchange, dtype] for result in results[world]), strict=True)
    rows = expected.dim() > 1
    got = torch.cat(outs, -2) if rows else outs[0]
    assert got.dtype == expected.dtype
    assert error(got, expected, UNITS.get(name, 0.0)) < allowed
    if exchange == "gather" and KERNELS:  # PyTorch's products of some of the rows may differ in the last bit
        assert torch.equal(got, expected)
    if not rows:
        assert all(torch.equal(out, got) for out in outs)
    if not expected.requires_grad:
        return
    # the sum of the ranks' losses
    coefficient = weights(expected.shape) if rows else world * (world + 1) / 2
    reference = torch.autograd.grad((expected.double() * coefficient).sum(), whole, allow_unused=True)
    for k, wanted in enumerate(reference):
        if wanted is None or not wanted.any():
            continue
        assert error(torch.cat([g[k] for g in gradients], -2), wanted) < allowed, f"input {k}"


def test_what_does_not_fit_raises_on_every_rank(results):
    for world, ranks in results.items():
        messages = ranks[0]["said"]
        assert all(result["said"] == messages for result in ranks)
        last = world - 1
        assert messages == [
            "x must match rank 0's except for n: d = 5, torch.float32, without gradient, "
            f"got d = 4, torch.float32, without gradient on rank {last}",
            "y must match rank 0's except for n: d = 2, torch.float32, without gradient, "
            f"got d = 2, torch.float64, without gradient on rank {last}",
            "z must match rank 0's except for n: d = 2, torch.float32, without gradient, "
            f"got d = 2, torch.float32, with gradient on rank {last}",
            "x must hold n >= 1 samples over all ranks, got 0",
            "z must hold n >= 2 samples over all ranks, got 1",
            "exchange must be one of 'auto', 'gather', 'ring', got 'none'",
        ]


def test_collectives_are_called_in_one_place():
    """PyTorch renames them; ops/_collectives.py knows the names."""
    named = r"\bdist(?:ributed)?\.(all_(?:gather|reduce|to_all)\w*|reduce_scatter\w*|batch_isend_irecv|reduce|gather)\("
    root = Path(ivfast.__file__).parent
    found = [
        f"{path.relative_to(root)}: {call}"
        for path in sorted(root.rglob("*.py"))
        if path.name != "_collectives.py"
        for call in re.findall(named, path.read_text())
    ]
    assert found == []


def test_the_newest_name_of_a_collective_is_called(monkeypatch):
    assert _collectives._present(("all_reduce", "all_gather")) is dist.all_reduce
    assert _collectives._present(("a_name_to_come", "all_gather")) is dist.all_gather
    for names in (_collectives._GATHER, _collectives._SCATTER):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            with contextlib.suppress(Exception):  # the group does not exist
                _collectives._present(names)(torch.zeros(1), torch.zeros(1))
        assert [str(w.message) for w in seen if "deprecated" in str(w.message)] == []


if __name__ == "__main__":
    for ranks in (2, 3):
        as_ranks(ranks, functools.partial(rank_main, world=ranks, folder=sys.argv[1]), sys.argv[1])
