"""Particles far from the others in Triton, interpreted if there is no GPU."""

import formulas
import pytest
import torch
from test_far_apart_cpu import D, N, clusters, compare, outliers, tight

import ivfast
from ivfast import testing
from ivfast.ops import mmd

svgd_bridge = pytest.importorskip("ivfast.kernels.svgd_bridge")

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # overflows, in the interpreter's NumPy
]


@pytest.mark.parametrize("place", [outliers, clusters, tight])
def test_far_apart_particles(place):
    compare("triton", place, torch.float32)


@pytest.mark.parametrize("only", ["median", "direction"])
@pytest.mark.parametrize("place", [outliers, clusters, tight])
def test_several_tiles(place, only):
    compare("triton", place, torch.float32, n=70, d=40, only=only)


@pytest.mark.parametrize("only", ["mmd", "rbf"])
def test_several_tiles_of_two_samples(only):
    compare("triton", outliers, torch.float32, n=70, d=40, only=only)


@pytest.mark.parametrize("unbiased", [False, True])
def test_values_without_gradients(unbiased):
    """Without a gradient, pairs of near rows within a sample are counted by one of them."""
    x, y = (outliers(torch.randn(N, D), 1e5) for _ in range(2))
    y[5:9] = 3e6 + torch.randn(4, D).round()  # far rows at near distances
    with ivfast.use("triton"):
        value = mmd._forward(x, y, None, True, [8.0], unbiased, False, False)[0]
    exact = formulas.mmd(x.double(), y.double(), bandwidth=8.0, scales=(1.0,), unbiased=unbiased)
    assert testing.error(value, exact, 1.0) <= testing.TOLERANCES[torch.float32]


@pytest.mark.parametrize("programs", ["one", "several"])
def test_the_bridge(monkeypatch, programs):
    if programs == "several":
        monkeypatch.setattr(svgd_bridge, "SMALL_N", 0)
    z, draws = outliers(torch.randn(N, D), 10 ** float(torch.empty(()).uniform_(3, 12))), torch.randn(3, N, D)
    ours, exact = z.clone().requires_grad_(), z.double().requires_grad_()
    with ivfast.use("triton"):
        a = ivfast.svgd_bridge(ours, 3, draws=draws, iterations=1, scale=2.0)[:, 3:]
    b = formulas.svgd_bridge(exact, draws.double(), 3, iterations=1, scale=2.0)[:, 3:]
    weights = torch.randn_like(b)
    (found,), (wanted,) = torch.autograd.grad(a, ours, weights.to(a)), torch.autograd.grad(b, exact, weights)
    for p, q in ((a, b), (found, wanted)):
        assert testing.error(p, q) <= testing.TOLERANCES[torch.float32]
