"""Every op in graphs of torch.compile and torch.export that serve any number of rows, with draws left to the op."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch._dynamo.utils import counters
from torch.autograd import forward_ad
from torch.export import Dim

import ivfast
from ivfast import testing
from ivfast._registry import Op

WEIGHTS = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
SIZES = (6, 9, 12)


class Row(NamedTuple):
    op: str
    label: str
    function: Callable
    shapes: Callable[[int], tuple[tuple[int, ...], ...]]  # of the arguments, by n

    def __str__(self):
        return f"{self.op}-{self.label}"

    def draw(self, n: int) -> list[torch.Tensor]:
        return [torch.rand(shape, dtype=torch.float64) + 0.1 for shape in self.shapes(n)]


def one(*rest):
    return lambda n: ((n, *rest),)


def two(*rest):
    return lambda n: ((n, *rest), (n, *rest))


def others(d):
    """Two samples of different sizes."""
    return lambda n: ((n, d), (n + 2, d))


def posteriors(n):
    return (n, 3), (n, 3), (n + 2, 3), (n + 2, 3)


def replaced(z):
    index = torch.arange(z.shape[0], device=z.device) % 2
    return ivfast.block_substitute(z, 2, index)


# one row per line
# fmt: off
ROWS = [
    Row("svgd_direction", "median", lambda x, s: ivfast.svgd_direction(x, s, scale=2.0), two(4)),
    Row("svgd_direction", "number", lambda x: ivfast.svgd_direction(x, bandwidth=3.0, scale=2.0), one(4)),
    Row("svgd_direction", "tensor", lambda x, h: ivfast.svgd_direction(x, bandwidth=h), lambda n: ((n, 4), ())),
    Row("svgd_direction", "sets", lambda x: ivfast.svgd_direction(x, convention="paper"), one(5, 4)),
    *(Row("median_bandwidth", c, lambda x, c=c: ivfast.median_bandwidth(x, convention=c), one(4)) for c in ("liu-wang", "paper")),
    Row("svgd_bridge", "rows", lambda z: ivfast.svgd_bridge(z, 2), one(4)),
    Row("radial_bridge", "rows", lambda z: ivfast.radial_bridge(z, 2), one(4)),
    Row("blockwise_bridge", "rows", lambda z: ivfast.blockwise_bridge(z, 2), one(4)),
    Row("block_substitute", "rows", replaced, one(4)),
    Row("as_distance", "biased", lambda *q: ivfast.as_distance(*q), posteriors),
    Row("as_distance", "unbiased", lambda *q: ivfast.as_distance(*q, unbiased=True, log=True, measure="prior"), posteriors),
    Row("log_gaussian_kernel_sums", "additive", lambda *q: ivfast.log_gaussian_kernel_sums(*q, kernel="additive"), posteriors),
    Row("as_distance", "twice", lambda u, l: ivfast.as_distance(u, l, l, u), two(3)),
    Row("mmd", "imq", lambda x, y: ivfast.mmd(x, y), others(3)),
    Row("mmd", "median", lambda x, y: ivfast.mmd(x, y, kernel="rbf", unbiased=False), others(3)),
    Row("mmd", "number", lambda x, y: ivfast.mmd(x, y, bandwidth=2.5, scales=(1.0, 2.0)), others(3)),
    Row("fld", "rows", ivfast.fld, one(3)),
    Row("fld", "few", ivfast.fld, one(20)),
    Row("frechet_distance_from_samples", "rows", ivfast.frechet_distance_from_samples, others(3)),
    Row("frechet_distance", "batch", lambda m, a: ivfast.frechet_distance(m, a @ a.mT, m + 1, (a @ a.mT).mT), lambda n: ((n, 3), (n, 3, 7))),
    Row("sqrtm_spd", "batch", lambda a: ivfast.sqrtm_spd(a @ a.mT), one(3, 8)),
    Row("polar", "rows", ivfast.polar, one(4)),
    Row("multi_js_loss", "rows", lambda x: ivfast.multi_js_loss(x, label_smoothing=0.1), lambda n: ((3 * n, 3),)),
    Row("multi_js_loss", "blocks", lambda x: ivfast.multi_js_loss(x, weights=WEIGHTS), lambda n: ((3, n, 3),)),
    Row("multi_js_divergence", "weights", lambda x: ivfast.multi_js_divergence(x, weights=WEIGHTS), lambda n: ((3 * n, 3),)),
    Row("multi_js_block_losses", "rows", lambda x: ivfast.multi_js_block_losses(x), lambda n: ((3 * n, 3),)),
    Row("linear_multi_js_loss", "one-chunk", lambda *p: ivfast.linear_multi_js_loss(*p), lambda n: ((3 * n, 5), (3, 5), (3,))),
    Row("linear_multi_js_loss", "chunks", lambda f, w: ivfast.ops.linear_multi_js.fused(f, w, None), lambda n: ((3 * n, 5), (3, 5))),
    Row("gaussian_kl", "rows", ivfast.gaussian_kl, two(4)),
    Row("reparameterize", "rows", lambda m, l: ivfast.reparameterize(m, l), two(4)),
    *(Row("reconstruction_loss", kind, lambda x, t, kind=kind: ivfast.reconstruction_loss(x, t, kind=kind), two(2, 3)) for kind in ("l2", "bce")),
    Row("importance_weighted_loss", "rows", ivfast.importance_weighted_loss, one()),
    Row("exp_elbo_loss", "rows", lambda r, k: ivfast.exp_elbo_loss(r, k, beta_kl=2.0, scale=0.5), two()),
]
# fmt: on
rows = pytest.mark.parametrize("row", ROWS, ids=str)


def test_every_op_has_a_row():
    assert {row.op for row in ROWS} == {case.op for case in testing.CASES} | {"multi_js_block_losses"}


def results(function, tensors):
    """Values and gradients, with the same draws every time."""
    torch.manual_seed(0)
    leaves = [x.clone().requires_grad_() for x in tensors]
    values = testing.outputs(function(*leaves))
    smooth = [v for v in values if v.requires_grad]
    gradients = torch.autograd.grad(sum(v.sin().sum() for v in smooth), leaves) if smooth else ()
    return [v.detach() for v in values], gradients


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert testing.error(a, b, 1e-3) <= 1e-10  # float64, in another order of summation


@rows
def test_one_graph_serves_every_number_of_rows(row):
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(row.function, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in SIZES:
        tensors = row.draw(n)
        for ours, theirs in zip(results(compiled, tensors), results(row.function, tensors), strict=True):
            assert_same(ours, theirs)
    assert counters["stats"]["unique_graphs"] == 1


class Exported(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)


def dynamic(row):
    """The first dimension that n determines in each tensor; equal sizes share a name."""
    small, large = row.shapes(6), row.shapes(7)
    dims = []
    for a, b in zip(small, large, strict=True):
        axes = [i for i, (s, l) in enumerate(zip(a, b, strict=True)) if s != l]
        factors = {i: b[i] - a[i] for i in axes}
        named = {i: Dim(f"n{a[i] - 6 * f}", min=3, max=1000) for i, f in factors.items()}
        dims.append({i: named[i] if f == 1 else f * named[i] for i, f in factors.items()})
    return (tuple(dims),)


TRACED = (
    "svgd_direction-median",
    "svgd_bridge-rows",
    "mmd-median",
    "multi_js_loss-rows",
    "linear_multi_js_loss-one-chunk",
)
exports = [(row, False) for row in ROWS] + [(row, True) for row in ROWS if str(row) in TRACED]


@pytest.mark.parametrize(("row", "strict"), exports, ids=[f"{row}{'-strict' * strict}" for row, strict in exports])
def test_exports_with_a_dynamic_number_of_rows(row, strict):
    torch._dynamo.reset()
    exported = torch.export.export(
        Exported(row.function), tuple(row.draw(6)), dynamic_shapes=dynamic(row), strict=strict
    ).module()
    for n in SIZES:
        tensors = row.draw(n)
        found = []
        for function in (exported, row.function):
            torch.manual_seed(0)
            found.append(testing.outputs(function(*tensors)))
        assert_same(*found)


def penalised(function, leaves):
    """Derivatives of a penalty on the gradients, as of a critic."""
    torch.manual_seed(0)
    values = testing.outputs(function(*leaves))
    first = torch.autograd.grad(sum(v.sin().sum() for v in values if v.requires_grad), leaves, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)


@rows
def test_second_derivatives_of_a_graph_that_is_run_as_it_is(row):
    leaves = [x.requires_grad_() for x in row.draw(6)]
    if not any(v.requires_grad for v in testing.outputs(row.function(*leaves))):
        return
    torch._dynamo.reset()
    compiled = torch.compile(row.function, fullgraph=True, backend="eager")
    assert_same(penalised(compiled, leaves), penalised(row.function, leaves))


KINDS = [row for row in ROWS if str(row) in ("gaussian_kl-rows", "reparameterize-rows", "linear_multi_js_loss-chunks")]
assert len(KINDS) == 3


@pytest.mark.parametrize("row", KINDS, ids=str)
def test_a_second_derivative_that_aot_autograd_does_not_have_is_an_error(row):
    torch._dynamo.reset()
    compiled = torch.compile(row.function, fullgraph=True, backend="aot_eager")
    leaves = [x.requires_grad_() for x in row.draw(6)]
    with pytest.raises(RuntimeError, match=r"double backward|donated buffers"):
        penalised(compiled, leaves)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo looks at it
def test_derivatives_taken_inside_a_compiled_function():
    """Dynamo breaks the graph at `autograd.grad`; the op in `value` was called outside."""
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    value = ivfast.gaussian_kl(x, 2 * x).square().sum()

    def second(value, x):
        (first,) = torch.autograd.grad(value, x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x, retain_graph=True)

    def whole(x):
        return second(ivfast.gaussian_kl(x, 2 * x).square().sum(), x)

    torch._dynamo.reset()
    expected = second(value, x)
    assert_same(torch.compile(second, backend="eager")(value, x), expected)
    assert_same(torch.compile(whole, backend="eager")(x), expected)


@pytest.mark.parametrize(
    ("transform", "backend"),
    [(name, "eager") for name in ("vmap", "grad", "jvp", "hessian", "dual")] + [("vmap", "aot_eager")],
)
def test_transforms_inside_and_outside_a_compiled_function(transform, backend):
    x, tangent = torch.rand(2, 4, 3, dtype=torch.float64)

    def loss(x):
        return ivfast.gaussian_kl(x, 2 * x).sin().sum()

    def dual(f):
        def slope(x):
            with forward_ad.dual_level():
                return forward_ad.unpack_dual(f(forward_ad.make_dual(x, tangent))).tangent

        return slope

    apply = {
        "vmap": torch.func.vmap,
        "grad": torch.func.grad,
        "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (tangent,))[1],
        "hessian": torch.func.hessian,
        "dual": dual,
    }[transform]
    expected = apply(loss)(x)
    torch._dynamo.reset()
    assert_same([torch.compile(apply(loss), backend=backend)(x)], [expected])
    torch._dynamo.reset()
    assert_same([apply(torch.compile(loss, backend=backend))(x)], [expected])


FORCED = ["gaussian_kl", "linear_multi_js_loss", "median_bandwidth", "multi_js_loss"]  # of one part and of several


@pytest.mark.parametrize("case", [next(c for c in testing.CASES if c.op == op) for op in FORCED], ids=str)
@pytest.mark.parametrize("implementation", ["triton", "cuda"])
def test_a_graph_serves_one_forced_implementation(case, implementation, request, monkeypatch):
    """A graph made inside `use` computes with that implementation when it runs, and serves no other."""
    served = []

    def launcher(op):
        served.append(op.name)
        return launch.func(op)

    launch = Op._launcher
    monkeypatch.setattr(Op, "_launcher", property(launcher))
    if implementation == "cuda":
        request.getfixturevalue("simt")
    device = "cuda" if implementation == "triton" and torch.cuda.is_available() else "cpu"
    tensors = testing.inputs(case, torch.float32, device=device)
    torch._dynamo.reset()
    compiled = case._replace(function=torch.compile(case.function, fullgraph=True, backend="aot_eager"))
    testing.value_and_gradients(compiled, tensors)
    assert not served
    with ivfast.use(implementation):
        expected = testing.value_and_gradients(case, tensors)
        eager = list(served)
        assert bool(eager) == (implementation == "triton")
        found = [testing.value_and_gradients(compiled, tensors) for _ in range(2)]
    assert served == 3 * eager
    for values, gradients in found:
        assert_same([*values, *gradients], [*expected[0], *expected[1]])
    testing.value_and_gradients(compiled, tensors)
    assert served == 3 * eager


def test_a_graph_names_a_missing_implementation():
    torch._dynamo.reset()
    weigh = torch.compile(ivfast.importance_weighted_loss, fullgraph=True, backend="eager")
    with ivfast.use("cuda"), pytest.raises(RuntimeError, match="'cuda' implementation"):
        weigh(torch.randn(4, 3))
