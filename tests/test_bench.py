"""Benchmarks: only correct providers are timed, ratios and limits are accurate, and a failure is a row."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ivfast
from ivfast import bench
from ivfast.bench import svgd
from ivfast.bench.harness import machine, measure, memory, peers, plot, results, session, tables
from ivfast.bench.harness.problem import BACKWARD, FORWARD, Instance, Problem, Provider

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    """Restores the processors for later tests, because the command restricts its own process."""
    monkeypatch.setattr(machine, "use_threads", lambda threads: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def row(provider, us, kind="peer", **more):
    about = {"op": "op", "size": [4, 2], "dtype": "float32", "pass": FORWARD, "provider": provider, "kind": kind}
    return about | ({"us": us, "bound": "call", "share": 0.5} if us else {"reason": "no reason"}) | more


def limits():
    empty = {"empty_forward_s": 1e-6, "empty_forward+backward_s": 5e-6}
    return {"matmul_flop_per_s": 1e9, "copy_bytes_per_s": 1e8, **empty}


def report_of(rows, missing=()):
    about = {"id": 0, "date": "", "versions": {}, "limits": limits(), "ops": ["op"], "not_started": []}
    return {"machine": {"name": "here"}, "sessions": [about | {"missing": list(missing)}], "rows": rows}


def square(*peers, tolerance=1e-4):
    """Squares of the rows of x, an op without a registered implementation."""
    return Problem(
        op="square",
        axes="n×d",
        sizes=((8, 3), (16, 3)),
        draw=lambda size: (torch.randn(size) + 2,),
        output=lambda size: size[:1],
        function=lambda x: x.square().sum(-1),
        peers=peers,
        work=lambda size, what: 2 * math.prod(size),
        tolerance=tolerance,
    )


def measured(monkeypatch, problem, **options):
    monkeypatch.setattr(session, "problem_of", {"square": problem}.get)
    monkeypatch.setattr(measure, "limits", lambda *_: limits())
    one = session.Session(["square"], quick=True, **options)
    return one, [row for _, rows in one.run() for row in rows]


class Counted:
    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, x):
        self.calls += 1
        return self.function(x)


def test_ratios_are_over_ivfast_and_over_the_best_peer():
    rows = [row("ivfast", 20.0, "ivfast"), row("ivfast:reference", 5.0, "implementation"), row("a", 40.0)]
    rows = results.with_ratios([*rows, row("b", 10.0), row("c", None)])
    assert [r["over_ivfast"] for r in rows] == [1.0, 0.25, 2.0, 0.5, None]
    assert [r["over_best_peer"] for r in rows] == [2.0, 0.5, 4.0, 1.0, None]
    assert results.best_peer(rows)["provider"] == "b"
    assert "| 4 × 2 | forward | 20.0 | 5.0 | 40.0 | 10.0 | 0.50 | 50% call |" in tables.markdown(report_of(rows))


def test_ratios_without_a_peer_or_without_ivfast():
    (alone,) = results.with_ratios([row("ivfast", 20.0, "ivfast")])
    assert (alone["over_ivfast"], alone["over_best_peer"]) == (1.0, None)
    (peer,) = results.with_ratios([row("a", 20.0)])
    assert (peer["over_ivfast"], peer["over_best_peer"]) == (None, 1.0)


def test_a_drift_of_the_machine_leaves_ratios_alone(monkeypatch):
    """The machine slows down tenfold during the run, and one provider takes three times as long as the other."""
    order = []

    def clock(call, calls, cuda):
        order.append(call())
        return call() * (1 + 9 * len(order) / (2 * measure.ROUNDS))

    monkeypatch.setattr(measure, "clock", clock)
    fast, slow = Provider("fast", None), Provider("slow", None)
    timings = measure.in_turns({fast: (lambda: 1.0, 1e-3), slow: (lambda: 3.0, 1e-3)}, budget=10)
    assert timings[fast].rounds == timings[slow].rounds == measure.ROUNDS
    assert timings[slow].median / timings[fast].median == pytest.approx(3, rel=0.05)  # half a turn's drift
    assert order[:8] == [1, 3, 3, 1, 1, 3, 3, 1]


def test_rounds_fill_the_budget_and_no_more():
    rounds, calls = measure.rounds_of(1e-5, 0.5)
    assert (rounds, calls) == (measure.ROUNDS, 200)
    assert measure.rounds_of(0.1, 0.65) == (6, 1)
    assert measure.rounds_of(0.9, 0.6) == (3, 1)
    assert measure.rounds_of(9.0, 0.6) == (1, 1)


@pytest.mark.parametrize(
    ("work", "traffic", "expected"), [(1e6, 10, ("matmul", 1e-3)), (10, 1e6, ("copy", 1e-2)), (1, 1, ("call", 1e-6))]
)
def test_a_limit_is_the_largest_of_three(work, traffic, expected):
    name, seconds = measure.bound(limits(), work, traffic, FORWARD)
    assert (name, seconds) == (expected[0], pytest.approx(expected[1]))


def test_a_missing_peer_is_reported_with_its_reason(monkeypatch):
    absent = Provider("absent", None, packages=("no_such_package",))
    elsewhere = Provider("elsewhere", None, devices=("cuda",))
    one, rows = measured(monkeypatch, square(absent, elsewhere))
    assert not {r["provider"] for r in rows} & {"absent", "elsewhere"}
    reasons = {r["provider"]: r["reason"] for r in one.missing}
    assert "no_such_package is not installed" in reasons["absent"]
    assert reasons["elsewhere"] == "it is timed only on cuda tensors"
    text = tables.markdown(report_of(results.with_ratios([row("ivfast", 1.0, "ivfast")]), [row("absent", None)]))
    assert "- absent: no reason" in text


@pytest.mark.parametrize("what", [FORWARD, BACKWARD])
def test_a_wrong_peer_is_refused_before_it_is_timed(monkeypatch, what):
    def wrong(x):
        """Correct in value, and off by 1 % in its gradient if requested."""
        right = x.square().sum(-1)
        return right * 1.01 if what == FORWARD else right + 0.02 * (x.square() - x.detach().square()).sum(-1)

    function = Counted(wrong)
    _, rows = measured(monkeypatch, replace(square(Provider("peer", function)), sizes=((8, 3),), passes=(what,)))
    (refused,) = (r for r in rows if r["provider"] == "peer")
    assert refused["wrong"]
    assert "us" not in refused
    assert refused["reason"].startswith("wrong: error ")
    assert function.calls == 1
    assert all("us" in r for r in rows if r["provider"] == "ivfast")


def test_a_result_of_another_shape_or_with_nan_is_wrong(monkeypatch):
    shape = Provider("shape", lambda x: x.square())
    nan = Provider("nan", lambda x: x.square().sum(-1) * float("nan"))
    _, rows = measured(monkeypatch, replace(square(shape, nan), passes=(FORWARD,)))
    assert {r["provider"] for r in rows if r.get("wrong")} == {"shape", "nan"}


def test_a_peer_that_fails_or_does_not_fit_or_takes_too_long_is_a_row_with_the_reason(monkeypatch):
    def fail(x):
        raise RuntimeError("out of luck\nand more")

    slow = Counted(lambda x: x.square().sum(-1))
    huge = Provider("huge", None, squares=(1e18, 1e18))
    problem = replace(square(Provider("fail", fail), huge, Provider("slow", slow)), sizes=((8, 3),), passes=(FORWARD,))
    one, rows = measured(monkeypatch, problem, _seen={("square", "slow", FORWARD): (100.0, 48)})
    reasons = {r["provider"]: r.get("reason", "") for r in rows}
    assert reasons["fail"] == "RuntimeError: out of luck"
    assert "GB is free" in reasons["huge"]
    assert reasons["slow"] == "about 100 s per call"
    assert slow.calls == 0
    assert one.missing == []


def test_nothing_is_started_after_the_deadline(monkeypatch):
    one, rows = measured(monkeypatch, square(), deadline=-math.inf)
    assert rows == []
    assert one.not_started == [f"square {n}x3 {what}" for n in (8, 16) for what in (FORWARD, BACKWARD)]


def test_every_public_op_has_a_benchmark():
    modules = {"distributed", "nn", "optim", "patch"}
    public = set(ivfast.__all__) - modules - {"use"}
    assert {bench.problem_of(name).op.split()[0] for name in bench.names()} == public


@pytest.mark.parametrize("name", bench.names())
def test_every_peer_is_right(name):
    """KeOps and torch.compile would need time to compile; `pytest bench` and the command check them as well."""
    problem = bench.problem_of(name)
    instance = Instance(problem, problem.sizes[0], problem.dtypes[0], "cpu")
    for provider in problem.providers("cpu"):
        if (provider.compiles and provider.bind is not peers.bind_jax) or problem.missing(provider, "cpu"):
            continue
        if provider.kind == "floor":  # computes nothing: what a call costs
            continue
        for what in problem.passes:
            with provider.forced():
                call = instance.bind(provider, what, constants=bool(instance.constants))
                assert instance.error(call()) <= instance.allowed(provider), (provider.name, what)


@pytest.mark.parametrize("name", ["eager", "eager-cdist", "attention"])
def test_batches_of_svgd_are_the_sets_one_by_one(name):
    (provider,) = (p for p in svgd.PROBLEM.peers if p.name == name)
    instance = Instance(svgd.PROBLEM, (3, 10, 4), torch.float32, "cpu")
    assert instance.error(instance.bind(provider, BACKWARD)()) <= instance.allowed(provider)


def test_the_rows_of_a_large_problem_are_those_of_the_reference():
    x, score, cotangent = torch.randn(3, 60, 5, dtype=torch.float64).unbind()
    with ivfast.use("reference"):
        leaves = [x.requires_grad_(), score.requires_grad_()]
        phi = svgd.PROBLEM.function(*leaves)
        whole = [phi.detach(), *torch.autograd.grad(phi, leaves, cotangent)]
    part = svgd.exact([x.detach(), score.detach()], cotangent, rows=7, above=10)
    for (rows, actual), expected in zip(part, whole, strict=True):
        assert len(rows) == 7
        torch.testing.assert_close(actual, expected[rows], rtol=1e-9, atol=1e-12)
    assert svgd.exact([x, score], cotangent) is None


@pytest.mark.skipif(not memory.supported(), reason="peak memory is read from Linux's /proc")
def test_peak_memory_is_that_of_the_call():
    torch.ones(128 << 20, dtype=torch.uint8)  # an earlier peak
    kept = torch.ones(64 << 20, dtype=torch.uint8)
    assert memory.growth(lambda: None) < 1 << 20
    grown = memory.growth(lambda: torch.ones(32 << 20, dtype=torch.uint8))
    assert grown == pytest.approx(32 << 20, rel=0.1)
    n = 1500  # K alone is 9 MB
    jobs = [{"size": [n, 16], "what": FORWARD, "warm": True}]
    (eager,) = memory.measured("svgd", "eager", jobs, threads=1)
    (ours,) = memory.measured("svgd", "ivfast", jobs, threads=1)
    assert 4 * n * n <= eager["peak_bytes"] <= 6 * 4 * n * n
    if svgd.PROBLEM.served("cpu") == "cpu":
        assert ours["peak_bytes"] < 4 * n * n / 4
    del kept


def test_a_group_that_is_measured_again_replaces_its_rows(tmp_path):
    def add(us):
        found = results.Results({"name": "here"}, {"versions": {}}, tmp_path / "here.json")
        found.add([row("ivfast", us, "ivfast"), row("a", 2 * us)])
        return found

    add(1.0)
    other = add(3.0)
    other.add([row("ivfast", 7.0, "ivfast", size=[5, 2])])
    report = json.loads((tmp_path / "here.json").read_text())
    assert [r["us"] for r in report["rows"]] == [3.0, 6.0, 7.0]
    assert [s["id"] for s in report["sessions"]] == [1]  # no row of the first is left


def test_a_picture_needs_times(tmp_path):
    assert plot.draw(report_of([row("ivfast", None, "ivfast")]), "op", tmp_path / "a.png") is None
    rows = [row(name, us, size=[n, 2]) for n, us in ((4, 1.0), (64, 9.0)) for name in ("ivfast", "a")]
    assert plot.draw(report_of(rows), "op", tmp_path / "a.png").exists()
