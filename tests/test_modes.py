"""What surrounds a call changes no number: autocast, and `use` in other threads."""

import threading

import numpy as np
import pytest
import torch

import ivfast
from ivfast import testing


def cast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


def small():
    sizes = [(sum(x.numel() for x in testing.inputs(c, torch.float32, seed=0)), c) for c in testing.CASES]
    least = {c.op: size for size, c in sorted(sizes, key=lambda each: -each[0])}
    return [c for size, c in sizes if size == least[c.op]]


@pytest.mark.parametrize("implementation", ["reference", None])
@pytest.mark.parametrize("case", [*small(), *(c for c in testing.CASES if c.label == "one-chunk")], ids=str)
def test_autocast_does_not_reach_inside(case, implementation):
    tensors = testing.inputs(case, torch.float32)
    if case.op == "sqrtm_spd":  # its case multiplies matrices itself
        case = case._replace(function=ivfast.sqrtm_spd)
        tensors = [torch.cov(torch.randn(4, 20)).requires_grad_()]
    with ivfast.use(implementation) if implementation else torch.enable_grad():
        expected = testing.value_and_gradients(case, tensors)
        with cast():
            actual = testing.value_and_gradients(case, tensors)
    for ours, theirs in zip(actual, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


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
        ivfast.mmd(x, x + 1)
    left.set()
    thread.join()
    assert not failures
    ivfast.mmd(x, x + 1)
    assert ivfast._registry._forced is None


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


def test_one_graph_serves_every_number_of_rows():
    """With a median, whose divisor depends on n, scales as numbers, and draws left to the op."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def function(x):
        h = ivfast.median_bandwidth(x)
        return ivfast.svgd_direction(x, bandwidth=h, scale=2.0), ivfast.radial_bridge(x, 2), ivfast.mmd(x, x + 1)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for n in (6, 10, 7):
        x = torch.randn(n, 4)
        assert torch.equal(compiled(x)[0], function(x)[0])
    assert len(graphs) == 1


def test_integers_of_numpy_are_integers():
    three, z = np.int64(3), torch.randn(4, 6)
    draws = torch.randn_like(z)
    assert torch.equal(ivfast.radial_bridge(z, three, draws=draws), ivfast.radial_bridge(z, 3, draws=draws))
    assert torch.equal(ivfast.blockwise_bridge(z, three, draws=draws), ivfast.blockwise_bridge(z, 3, draws=draws))
    with pytest.raises(ValueError, match="t must be an integer >= 1, got True"):
        ivfast.radial_bridge(z, True)
