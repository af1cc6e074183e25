"""SVGD direction at a fixed bandwidth: `pytest bench/svgd.py`. Each provider is checked before it is timed."""

import functools

import peers
import pytest
import torch

import ivfast

SHAPES = [(64, 16), (100, 64), (128, 128), (1024, 64), (4096, 64)]
PROVIDERS = {
    "ivfast": lambda x, score, h: ivfast.svgd_direction(x, score, bandwidth=h),
    "eager": peers.svgd_matmul,
    "eager-cdist": peers.svgd_cdist,
    "compile": functools.cache(lambda: torch.compile(peers.svgd_matmul, dynamic=False)),
    "attention": peers.svgd_attention,
}


def forward(function, x, score, h, weights):
    return (function(x, score, h),)


def forward_backward(function, x, score, h, weights):
    phi = function(x, score, h)
    return phi.detach(), *torch.autograd.grad(phi, (x, score), weights)


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def problem(request):
    """x, score, h, upstream gradient, and φ with its gradients in float64."""
    n, d = request.param
    x, score, weights = torch.randn(3, n, d).unbind()
    exact = [t.double().requires_grad_() for t in (x, score)]
    with ivfast.use("reference"):
        expected = forward_backward(PROVIDERS["ivfast"], *exact, float(d), weights.double())
    return x, score, float(d), weights, expected


@pytest.mark.filterwarnings("ignore")  # torch.compile's own
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("run", [forward, forward_backward], ids=["forward", "forward+backward"])
def test_svgd(benchmark, problem, run, provider):
    x, score, h, weights, expected = problem
    function = PROVIDERS[provider]
    if provider == "compile":
        function = function()
    if run is forward_backward:
        x, score = (t.clone().requires_grad_() for t in (x, score))
    for actual, exact in zip(run(function, x, score, h, weights), expected, strict=False):
        torch.testing.assert_close(actual.double(), exact, rtol=0, atol=1e-4 * float(exact.abs().max()))
    benchmark.group = f"{x.shape[0]}x{x.shape[1]} {run.__name__}"
    benchmark(run, function, x, score, h, weights)
