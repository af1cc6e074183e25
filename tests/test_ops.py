"""Every op on every case: each implementation against the float64 reference, and PyTorch's operator contract."""

import pytest
import torch
from helpers import smallest_cases

import ivfast
from ivfast import testing
from ivfast._registry import OPS, Op
from ivfast.testing import CASES

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
HALF = (torch.bfloat16, torch.float16)
NAMES = sorted({case.op for case in CASES})


def first_case(op):
    return next(case for case in CASES if case.op == op)


def calls_of(case, monkeypatch, dtype=torch.float64):
    """(op, arguments) of every operator that `case` calls, forward and backward; arguments without gradients."""
    calls = []
    dispatch = Op.__call__

    def record(self, *args):
        calls.append((self, tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)))
        return dispatch(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Op, "__call__", record)
        testing.value_and_gradients(case, testing.inputs(case, dtype))
    return calls


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_default_implementation_matches_the_float64_reference(case, dtype, device):
    testing.check(case, testing.inputs(case, dtype, device=device))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_non_contiguous_inputs_give_the_same(case):
    tensors = testing.inputs(case, torch.float32)

    def strided(x):
        wide = torch.full((*x.shape, 2), float("nan"))
        wide[..., 0] = x.detach()
        return wide[..., 0].requires_grad_(x.requires_grad)

    testing.check(case, [strided(x) for x in tensors])
    transposed = [x.detach().mT.contiguous().mT.requires_grad_(x.requires_grad) if x.dim() > 1 else x for x in tensors]
    testing.check(case, transposed)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_inputs_are_never_written(case):
    tensors = testing.inputs(case, torch.float32)
    before = [x.detach().clone() for x in tensors]
    testing.value_and_gradients(case, tensors)
    assert all(torch.equal(x, b) for x, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("case", [c for c in CASES if c.gradcheck], ids=str)
def test_gradcheck(case):
    tensors = testing.inputs(case, torch.float64)
    if sum(x.numel() for x in tensors) > 150:
        pytest.skip("finite differences on small cases only; larger ones are compared with the reference")
    with ivfast.use("reference"):
        assert torch.autograd.gradcheck(case.function, tensors)


def test_gradcheck_covers_every_op():
    small = {c.op for c in CASES if c.gradcheck and sum(x.numel() for x in testing.inputs(c, torch.float64)) <= 150}
    detached = {"importance_weighted_loss", "svgd_bridge"}  # weights and bandwidths are constants: test_<op>_properties
    assert small | detached >= set(NAMES) - {"multi_js_divergence"}


@pytest.mark.parametrize("op", NAMES)
def test_opcheck(op, monkeypatch):
    """Schema (no mutation, no aliasing), fake shapes and strides, and AOT dispatch, forward and backward."""
    for handle, args in calls_of(first_case(op), monkeypatch):
        torch.library.opcheck(handle.default, args)


@pytest.mark.parametrize("implementation", ["triton", "cuda"])
@pytest.mark.parametrize("op", NAMES)
def test_results_of_forced_implementations_are_as_fake_tensors_say(op, implementation, monkeypatch, request):
    """The overloads that graphs compiled inside `use` call."""
    if implementation == "cuda":
        request.getfixturevalue("simt")
    device = "cuda" if implementation == "triton" and torch.cuda.is_available() else "cpu"
    case = next(c for c in smallest_cases() if c.op == op)
    for handle, args in calls_of(case, monkeypatch, torch.float32):
        if not handle.missing(implementation, device):
            call = handle.implementation(implementation)
            real, fake = (
                call(*(a.to(where) if isinstance(a, torch.Tensor) else a for a in args)) for where in (device, "meta")
            )
            for r, f in zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (real, fake)), strict=True):
                assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride()), handle.name


def test_every_operator_is_reached_by_a_case(monkeypatch):
    reached = {handle.name for op in NAMES for handle, _ in calls_of(first_case(op), monkeypatch)}
    inner = {"frechet_factor_trace", "frechet_covariance_trace"}  # their gradients come with the value
    inner |= {"median_heuristic", "median_heuristic_backward"}  # only while compiling
    inner |= {"inverse_root"}  # only for values: test_roots
    inner |= {"linear_adam_"}  # writes in place: test_optim
    assert reached >= set(OPS) - inner
    # classes, drivers, and functions without a gradient
    others = {"GaussianStatistics", "distributed", "nn", "optim", "patch", "svgd", "use", "multi_js_block_losses"}
    public = set(ivfast.__all__) - others
    assert set(NAMES) == public


@pytest.mark.parametrize("op", NAMES)
def test_compiles_into_one_graph(op):
    case = first_case(op)
    torch._dynamo.reset()
    compiled = case._replace(function=torch.compile(case.function, fullgraph=True, backend="aot_eager"))
    tensors = testing.inputs(case, torch.float64)
    expected = testing.value_and_gradients(case, tensors)
    actual = testing.value_and_gradients(compiled, tensors)
    for ours, theirs in zip(actual, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert testing.error(a, b) <= 1e-12


def test_a_forced_implementation_never_falls_back():
    z = torch.randn(6, 4)
    for name in ("triton", "cpu"):
        with ivfast.use(name), pytest.raises(RuntimeError, match=f"_trace has no '{name}' implementation here"):
            ivfast.frechet_distance_from_samples(z, z + 1)
    with pytest.raises(ValueError, match=r"implementation must be one of .*got 'gpu'"), ivfast.use("gpu"):
        pass
    ivfast.frechet_distance_from_samples(z, z + 1)  # the choice ends with the block


X = torch.randn(6, 4)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: ivfast.svgd_direction([1.0]), TypeError, "x must be a Tensor, got list"),
        (lambda: ivfast.svgd_direction(X.int()), TypeError, "x must be float32.*got torch.int32"),
        (lambda: ivfast.svgd_direction(X[0]), ValueError, r"x must have shape \[..., n, d\], got \(4,\)"),
        (lambda: ivfast.svgd_direction(X[:0]), ValueError, r"x must hold n >= 1 .* got \(0, 4\)"),
        (lambda: ivfast.svgd_direction(X, X[:5]), ValueError, r"score must match x: \(6, 4\), got \(5, 4\)"),
        (lambda: ivfast.svgd_direction(X, X.double()), TypeError, "score must match x: torch.float32, got torch.float64"),
        (lambda: ivfast.svgd_direction(X, bandwidth=0.0), ValueError, "bandwidth must be finite and positive, got 0"),
        (lambda: ivfast.svgd_direction(X, bandwidth=float("nan")), ValueError, "bandwidth must be finite.*got nan"),
        (lambda: ivfast.svgd_direction(X, bandwidth="mean"), ValueError, "bandwidth must be one of 'median', got 'mean'"),
        (lambda: ivfast.svgd_direction(X, bandwidth=X[:, 0]), ValueError, r"bandwidth must have shape \(\), got \(6,\)"),
        (lambda: ivfast.svgd_direction(X, scale=-1.0), ValueError, "scale must be finite and positive, got -1.0"),
        (lambda: ivfast.svgd_direction(X, convention="x"), ValueError, "convention must be one of 'liu-wang'.*got 'x'"),
        (lambda: ivfast.median_bandwidth(X, convention="x"), ValueError, "convention must be one of"),
        (lambda: ivfast.multi_js_loss(torch.randn(7, 3)), ValueError, r"C·n rows.*C = 3.*got \(7, 3\)"),
        (lambda: ivfast.multi_js_loss(torch.randn(2, 5, 3)), ValueError, r"3 classes need 3 blocks, got \(2, 5, 3\)"),
        (lambda: ivfast.multi_js_loss(torch.randn(4, 1)), ValueError, "with C >= 2"),
        (lambda: ivfast.multi_js_loss(torch.randn(6, 3), weights=torch.ones(2)), ValueError, r"weights must have shape \(3,\), got \(2,\)"),
        (lambda: ivfast.blockwise_bridge(X, 3), ValueError, "t must divide the dimension d = 4 of z, got t = 3"),
        (lambda: ivfast.blockwise_bridge(X, 0), ValueError, "t must be an integer >= 1, got 0"),
        (lambda: ivfast.radial_bridge(X, 2.0), ValueError, "t must be an integer >= 1, got 2.0"),
        (lambda: ivfast.radial_bridge(X, 2, draws=X[:2]), ValueError, r"draws must have shape \(6, 4\), got \(2, 4\)"),
        (lambda: ivfast.svgd_bridge(X, 2, noise=-1.0), ValueError, "noise must be finite and >= 0, got -1"),
        (lambda: ivfast.svgd_bridge(X, 2, iterations=0), ValueError, "iterations must be an integer >= 1, got 0"),
        (lambda: ivfast.block_substitute(X, 3, torch.zeros(6, dtype=int)), ValueError, "k must divide .* d = 4 .*k = 3"),
        (lambda: ivfast.block_substitute(X, 2, torch.full((6,), 2)), ValueError, r"index must lie in \[0, k\) with k = 2"),
        (lambda: ivfast.block_substitute(X, 2, torch.zeros(5, dtype=int)), ValueError, r"index must have shape \(6,\)"),
        (lambda: ivfast.block_substitute(X, 2, torch.zeros(6)), TypeError, "index must be int64 or int32, got torch.float32"),
        (lambda: ivfast.gaussian_kl(X, X[:, :3]), ValueError, r"logvar must match mu: \(6, 4\), got \(6, 3\)"),
        (lambda: ivfast.importance_weighted_loss(X[:, :0]), ValueError, r"logits must have shape \[..., n\] with n >= 1"),
        (lambda: ivfast.mmd(X, X[:1]), ValueError, r"y must hold n >= 2 .* got \(1, 4\)"),
        (lambda: ivfast.mmd(X, X[:, :3]), ValueError, r"y must match x except for n: \(6, 4\), got \(6, 3\)"),
        (lambda: ivfast.mmd(X, X, kernel="linear"), ValueError, "kernel must be one of 'imq', 'rbf', got 'linear'"),
        (lambda: ivfast.mmd(X, X, scales=(1.0, -1.0)), ValueError, "scales must be finite and positive, got -1"),
        (lambda: ivfast.mmd(X, X, scales=()), ValueError, "scales must hold at least one factor"),
        (lambda: ivfast.as_distance(X[:1], X[:1], X, X, unbiased=True), ValueError, "mu_r must hold n >= 2 .*unbiased"),
        (lambda: ivfast.as_distance(X, X[:2], X, X), ValueError, r"logvar_r must match mu_r: \(6, 4\), got \(2, 4\)"),
        (lambda: ivfast.as_distance(X, X, X, X, measure="z"), ValueError, "measure must be one of 'lebesgue', 'prior'"),
        (lambda: ivfast.fld(X[:1]), ValueError, "z must hold n >= 2"),
        (lambda: ivfast.frechet_distance_from_samples(X, X[:, :2]), ValueError, "y must match x except for n"),
        (lambda: ivfast.frechet_distance(X[0], X, X[0], X), ValueError, r"sigma1 must have shape \(4, 4\).*got \(6, 4\)"),
        (lambda: ivfast.frechet_distance(X[0], X[:4], X[0, :2], X[:4]), ValueError, r"mu2 must match mu1: \(4,\), got \(2,\)"),
        (lambda: ivfast.GaussianStatistics(3).update(X), ValueError, r"x must have shape \[n, 3\], got \(6, 4\)"),
        (lambda: ivfast.GaussianStatistics(4).covariance, ValueError, "covariance needs at least 2 samples, got 0"),
    ],
)  # fmt: skip
def test_bad_input_names_the_argument_and_both_sides(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_devices_must_agree():
    with pytest.raises(ValueError, match="score must match x: device cuda:0, got cpu"):
        ivfast.svgd_direction(X.cuda(), X)
