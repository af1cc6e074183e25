"""What surrounds a call changes no number: autocast, defaults, modes of autograd, `use` in other threads, and how
arguments are written."""

import contextlib
import threading
import weakref

import numpy as np
import pytest
import torch
from helpers import set_by_caller, smallest_cases
from torch.utils.checkpoint import checkpoint

import ivfast
from ivfast import testing
from ivfast._torch import carried, carry


def cast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


SMALL = smallest_cases()


@pytest.mark.parametrize("implementation", ["reference", None])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_autocast_does_not_reach_inside(case, implementation):
    tensors = testing.inputs(case, torch.float32)
    if case.op == "sqrtm_spd":  # its case multiplies matrices itself
        case = case._replace(function=ivfast.sqrtm_spd)
        tensors = [torch.cov(torch.randn(4, 20)).requires_grad_()]
    with ivfast.use(implementation) if implementation else contextlib.nullcontext():
        expected = testing.value_and_gradients(case, tensors)
        with cast():
            actual = testing.value_and_gradients(case, tensors)
    for ours, theirs in zip(actual, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def layer(*p):
    return ivfast.linear_multi_js_loss(*p, label_smoothing=0.1)


one_chunk = testing.Case("linear_multi_js_loss", "one-chunk", layer, lambda generator: ())  # by other products


@pytest.mark.parametrize("case", [*SMALL, one_chunk], ids=str)
def test_autocast_reaches_no_order_of_derivatives(case):
    tensors = testing.inputs(case, torch.float32)
    if case.op == "sqrtm_spd":
        case, tensors = case._replace(function=ivfast.sqrtm_spd), [torch.cov(torch.randn(4, 20)).requires_grad_()]
    elif case is one_chunk:
        tensors = [torch.randn(shape).requires_grad_() for shape in ((60, 6), (4, 6), (4,))]
    leaves = [x for x in tensors if x.requires_grad]

    def loss(x):
        return sum(o.sin().sum() for o in testing.outputs(case.function(x, *tensors[1:])))

    def results():
        value = loss(leaves[0])
        first = torch.autograd.grad(value, leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves, materialize_grads=True)
        x = leaves[0].detach()
        tangent = torch.func.jvp(loss, (x,), (torch.ones_like(x),))[1]
        return value, *first, *second, torch.func.grad(loss)(x), tangent

    expected = results()
    with cast():
        actual = results()
    for ours, theirs in zip(actual, expected, strict=True):
        # float32 that is summed in another order; bfloat16 would leave 4e-3
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_autocast_reaches_neither_statistics_nor_chunks():
    x = torch.randn(600, 8) + 3
    features, weight = torch.randn(300_000, 4), torch.randn(4, 4, requires_grad=True)
    assert features.shape[0] * 4 > ivfast.ops.linear_multi_js.CHUNK["cpu"]

    def results():
        loss = ivfast.linear_multi_js_loss(features, weight)
        return ivfast.GaussianStatistics(8).update(x).covariance, loss, *torch.autograd.grad(loss, weight)

    expected = results()
    with cast():
        assert all(torch.equal(a, b) for a, b in zip(results(), expected, strict=True))


def test_float16_under_autocast_to_bfloat16():
    x, y = torch.randn(6, 4).half(), torch.randn(5, 4).half()
    expected = ivfast.mmd(x, y, bandwidth="median")
    with cast():
        assert torch.equal(ivfast.mmd(x, y, bandwidth="median"), expected)


def test_mixed_dtypes_are_promoted_under_autocast_alone():
    x, y = torch.randn(6, 4), torch.randn(6, 4).bfloat16()
    v = torch.rand(6)
    index = torch.zeros(6, dtype=torch.int64)
    calls = {
        "svgd_direction": lambda x, y: ivfast.svgd_direction(x, y, bandwidth=3.0),
        "mmd": ivfast.mmd,
        "as_distance": lambda x, y: ivfast.as_distance(x, y, x, y),
        "gaussian_kl": ivfast.gaussian_kl,
        "reparameterize": lambda x, y: ivfast.reparameterize(x, y, draws=x).z,
        "reconstruction_loss": ivfast.reconstruction_loss,
        "exp_elbo_loss": lambda x, y: ivfast.exp_elbo_loss(v, y[:, 0].float().abs().to(y.dtype)),
        "linear_multi_js_loss": lambda x, y: ivfast.linear_multi_js_loss(y[:4], x[:2]),
        "frechet_distance_from_samples": ivfast.frechet_distance_from_samples,
        "frechet_distance": lambda x, y: ivfast.frechet_distance(x[0], y[:4] @ y[:4].mT, y[0], torch.eye(4)),
        "blockwise_bridge": lambda x, y: ivfast.blockwise_bridge(x, 2, draws=y),
        "radial_bridge": lambda x, y: ivfast.radial_bridge(y, 2, draws=x),
        "svgd_bridge": lambda x, y: ivfast.svgd_bridge(y, 1, draws=x.unsqueeze(0)),
        "block_substitute": lambda x, y: ivfast.block_substitute(y, 2, index, draws=x),
    }
    for name, call in calls.items():
        expected = call(x, y.float())
        with cast():
            actual = call(x, y)
        if name == "frechet_distance":  # its product is rounded in this test
            assert testing.error(actual, expected) < 0.1
            continue
        assert torch.equal(actual, expected), name
        with pytest.raises(TypeError, match="must match"):
            call(x, y)


def test_threads_force_their_own_implementation():
    entered, left = threading.Event(), threading.Event()
    x, failures = torch.randn(5, 3), []

    def other():
        with ivfast.use("reference"):
            entered.set()
            left.wait(10)
            try:
                ivfast.mmd(x, x + 1)
            except RuntimeError as error:
                failures.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    entered.wait(10)
    ivfast.linear_multi_js_loss(torch.randn(4, 2), torch.randn(2, 2))
    with ivfast.use("cuda"), pytest.raises(RuntimeError, match="'cuda'"):
        ivfast.importance_weighted_loss(x)  # which has none, also where tests/simt runs the others
    left.set()
    thread.join()
    assert not failures
    ivfast.mmd(x, x + 1)
    assert ivfast._registry._forced is None


def test_what_a_thread_carries_is_held_and_released():
    class Value:
        pass

    value = Value()
    there = weakref.ref(value)
    for _ in range(3):
        carry("ivfast.test", value)
    del value
    assert there() is not None
    assert carried("ivfast.test") is there()
    carry("ivfast.test", None)
    assert there() is None


def test_threads_of_autograd_see_the_choice():
    """Deeply nested backward passes continue in threads of autograd's pool, as passes on a GPU begin in one."""
    seen, here = [], threading.get_ident()

    class Nested(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, depth):
            ctx.depth = depth
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append((threading.get_ident(), ivfast._registry._chosen()))
            if ctx.depth:
                with torch.enable_grad():
                    x = torch.ones((), requires_grad=True)
                    Nested.apply(x, ctx.depth - 1).backward()
            return grad, None

    with ivfast.use("reference"):
        Nested.apply(torch.ones((), requires_grad=True), 70).backward()
    assert {thread for thread, _ in seen} > {here}
    assert {choice for _, choice in seen} == {"reference"}
    seen.clear()
    Nested.apply(torch.ones((), requires_grad=True), 70).backward()
    assert {choice for _, choice in seen} == {None}


def test_other_numbers_are_pythons():
    """Integers and floats of NumPy, and tensors without dimensions."""
    x, z, index = torch.randn(6, 4), torch.randn(4, 6), torch.zeros(4, dtype=torch.int64)
    draws, steps, v = torch.randn_like(z), torch.randn(3, 4, 6), torch.rand(5)
    calls = [
        lambda i, f: ivfast.radial_bridge(z, i(3), draws=draws),
        lambda i, f: ivfast.blockwise_bridge(z, i(3), draws=draws),
        lambda i, f: ivfast.block_substitute(z, i(2), index, draws=draws),
        lambda i, f: ivfast.svgd_bridge(
            z, i(2), iterations=i(2), step_size=f(0.5), scale=f(2.0), noise=f(0.25), draws=steps
        ),
        lambda i, f: ivfast.svgd_direction(x, bandwidth=f(3.0), scale=i(2)),
        lambda i, f: ivfast.mmd(x, x + 1, bandwidth=f(3.0), scales=[f(0.5), i(2)]),
        lambda i, f: ivfast.mmd(x, x + 1, scales=torch.tensor([0.5, 2.0])),
        lambda i, f: ivfast.exp_elbo_loss(v, v, scale=f(0.5), beta_reconstruction=i(1), beta_kl=f(0.5), alpha=i(2)),
        lambda i, f: ivfast.multi_js_loss(x[:, :2], label_smoothing=f(0.25)),
        lambda i, f: ivfast.linear_multi_js_loss(x, x[:2], label_smoothing=f(0.25)),
        lambda i, f: ivfast.svgd(x, i(2), step_size=f(0.5), trajectory_every=i(1)).particles,
    ]
    for call in calls:
        expected = call(int, float)
        for one, other in ((np.int64, np.float32), (np.uint8, np.float16), (np.array, np.array)):
            assert torch.equal(call(one, other), expected)
        assert torch.equal(call(torch.tensor, torch.tensor), expected)


def test_what_is_no_number_is_an_error_that_names_the_argument():
    x = torch.randn(6, 4)
    for value in (True, np.bool_(True), torch.tensor(True), 2.0, torch.tensor(2.0), torch.tensor([2]), "2", None):
        with pytest.raises(ValueError, match="t must be an integer >= 1, got "):
            ivfast.radial_bridge(x, value)
    for value, given in (("2", "str"), (None, "NoneType"), (np.ones(2), "ndarray"), (torch.ones(2), "Tensor")):
        with pytest.raises(TypeError, match=f"scale must be a number, got {given}"):
            ivfast.svgd_direction(x, scale=value)
    with pytest.raises(TypeError, match="bandwidth must be a number, got ndarray"):
        ivfast.svgd_direction(x, bandwidth=np.ones(6))


def test_a_number_with_a_derivative_is_refused():
    x, two = torch.randn(6, 4), torch.tensor(2.0)
    calls = {
        "scale": lambda s: ivfast.svgd_direction(x, scale=s).sum(),
        "noise": lambda s: ivfast.svgd_bridge(x, 2, noise=s).sum(),
        "alpha": lambda s: ivfast.exp_elbo_loss(x, x, alpha=s).sum(),
    }
    ways = (
        lambda f: f(two.clone().requires_grad_()),
        lambda f: torch.func.grad(f)(two),
        lambda f: torch.func.jvp(f, (two,), (two,)),
    )
    for name, call in calls.items():
        for way in ways:
            with pytest.raises(TypeError, match=f"{name} must be a number, through which no derivative flows"):
                way(call)
    beside = torch.func.grad(lambda x: ivfast.svgd_direction(x, scale=two).sum())(x)
    assert torch.equal(beside, torch.func.grad(lambda x: ivfast.svgd_direction(x, scale=2.0).sum())(x))


def test_a_bandwidth_of_the_wrong_shape_names_the_right_one():
    x, sets = torch.randn(6, 4), torch.randn(3, 6, 4)
    ops = {
        "set": lambda x, h: ivfast.svgd_direction(x, bandwidth=h),
        "pair of samples": lambda x, h: ivfast.mmd(x, x, bandwidth=h),
    }
    for each, op in ops.items():
        with pytest.raises(ValueError, match=r"bandwidth must have shape \(\).*, got \(6,\)"):
            op(x, torch.ones(6))
        with pytest.raises(ValueError, match=rf"bandwidth must have shape \(3,\), one .* each {each}, or \(\).*\(2,\)"):
            op(sets, torch.ones(2))
        assert torch.equal(op(sets, torch.tensor(3)), op(sets, torch.full((3,), 3.0)))


def value_and_slopes(function, tensors):
    """With cotangents that are made without a generator."""
    out = testing.outputs(function(*tensors))
    leaves = [x for x in tensors if x.requires_grad]
    return out, torch.autograd.grad(out, leaves, [torch.full_like(o, 0.7) for o in out], materialize_grads=True)


def assert_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("implementation", ["reference", None])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_defaults_of_the_caller_change_nothing(case, implementation):
    tensors = testing.inputs(case, torch.float32)
    with ivfast.use(implementation) if implementation else contextlib.nullcontext():
        expected = value_and_slopes(case.function, tensors)
        with set_by_caller(torch.float64, "meta"):  # a tensor that is made there has no values
            actual = value_and_slopes(case.function, tensors)
    assert_equal(actual, expected)


def test_defaults_of_the_caller_reach_neither_draws_nor_statistics(tmp_path):
    x = torch.randn(6, 4)
    with set_by_caller(torch.float64, "meta"):
        draws = [ivfast.radial_bridge(x, 2), ivfast.svgd_bridge(x, 2), ivfast.reparameterize(x, x).z]
        draws.append(ivfast.radial_bridge(x, 2, generator=torch.Generator()))
        statistics = ivfast.GaussianStatistics(4).update(x)
        statistics.save(tmp_path / "x.npz")
        loaded = ivfast.GaussianStatistics.load(tmp_path / "x.npz")
        loaded.load_state_dict(statistics.state_dict())
        particles = ivfast.svgd(x, 2).particles
    assert all(z.dtype == torch.float32 and z.device.type == "cpu" for z in (*draws, particles))
    assert loaded.count == 6
    assert torch.equal(loaded.covariance, statistics.covariance)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_modes_of_autograd_change_nothing(case):
    """Inference, no gradient, checkpoints, and hooks that keep saved tensors elsewhere."""
    tensors = testing.inputs(case, torch.float32)
    expected = value_and_slopes(case.function, tensors)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            value = testing.outputs(case.function(*tensors))
        assert not any(v.requires_grad for v in value)
        for ours, theirs in zip(value, expected[0], strict=True):  # a value alone may come from another method
            assert testing.error(ours, theirs, 0.1) <= case.slack * testing.TOLERANCES[torch.float32]
    checkpointed = lambda *x: checkpoint(case.function, *x, use_reentrant=False)  # noqa: E731
    assert_equal(value_and_slopes(checkpointed, tensors), expected)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.clone()) or len(kept) - 1, kept.__getitem__):
        assert_equal(value_and_slopes(case.function, tensors), expected)
