"""Particles far from the others in Triton, interpreted if there is no GPU."""

import formulas
import pytest
import torch
from test_far_apart_cpu import D, N, clusters, compare, outliers, tight

import ivfast
from ivfast import testing
from ivfast.ops import mmd

svgd_bridge = pytest.importorskip("ivfast.kernels.svgd_bridge")

device = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # overflows, in the interpreter's NumPy
]


@pytest.mark.parametrize("place", [outliers, clusters, tight])
def test_far_apart_particles(place):
    compare("triton", place, torch.float32, device=device)


@pytest.mark.parametrize("only", ["median", "direction"])
@pytest.mark.parametrize("place", [outliers, clusters, tight])
def test_several_tiles(place, only):
    compare("triton", place, torch.float32, n=70, d=40, only=only, device=device)


@pytest.mark.parametrize("only", ["mmd", "rbf"])
@pytest.mark.parametrize("place", [outliers, clusters, tight])
def test_several_tiles_of_two_samples(place, only):
    compare("triton", place, torch.float32, n=70, d=40, only=only, device=device)


@pytest.mark.parametrize("unbiased", [False, True])
def test_values_without_gradients(unbiased):
    """Without a gradient, pairs of near rows within a sample are counted by one of them."""
    x, y = (outliers(torch.randn(N, D), 1e5) for _ in range(2))
    y[5:9] = 3e6 + torch.randn(4, D).round()  # far rows at near distances
    with ivfast.use("triton"):
        value = mmd._forward(x.to(device), y.to(device), None, True, [8.0], unbiased, False, False)[0].cpu()
    exact = formulas.mmd(x.double(), y.double(), bandwidth=8.0, scales=(1.0,), unbiased=unbiased)
    assert testing.error(value, exact, 1.0) <= testing.TOLERANCES[torch.float32]


@pytest.mark.parametrize("programs", ["one", "several"])
def test_the_bridge(monkeypatch, programs):
    if programs == "several":
        monkeypatch.setattr(svgd_bridge, "SMALL_N", 0)
    z, draws = outliers(torch.randn(N, D), 10 ** float(torch.empty(()).uniform_(3, 12))), torch.randn(3, N, D)
    ours, exact = z.to(device, copy=True).requires_grad_(), z.double().requires_grad_()
    with ivfast.use("triton"):
        a = ivfast.svgd_bridge(ours, 3, draws=draws.to(device), iterations=1, scale=2.0)[:, 3:]
    b = formulas.svgd_bridge(exact, draws.double(), 3, iterations=1, scale=2.0)[:, 3:]
    weights = torch.randn_like(b)
    (found,), (wanted,) = torch.autograd.grad(a, ours, weights.to(a)), torch.autograd.grad(b, exact, weights)
    for p, q in ((a, b), (found, wanted)):
        assert testing.error(p.cpu(), q) <= testing.TOLERANCES[torch.float32]


@pytest.mark.parametrize("kernel", ["rbf", "imq"])
def test_several_launches(kernel):
    """Scales beyond those of one launch add to the rows that are far."""
    x, y = (outliers(torch.randn(N, D), 1e4) for _ in range(2))
    scales = (0.5, 1.0, 2.0) if kernel == "rbf" else tuple(2.0**k for k in range(-4, 5))
    ours, exact = x.to(device, copy=True).requires_grad_(), x.double().requires_grad_()
    with ivfast.use("triton"):
        a = ivfast.mmd(ours, y.to(device), kernel=kernel, scales=scales)
    b = formulas.mmd(exact, y.double(), kernel=kernel, scales=scales)
    (found,), (wanted,) = torch.autograd.grad(a, ours), torch.autograd.grad(b, exact)
    assert testing.error(a.cpu(), b, 1.0) <= testing.TOLERANCES[torch.float32]
    assert testing.error(found.cpu(), wanted) <= testing.TOLERANCES[torch.float32]


@pytest.mark.parametrize("scale", [1e-10, 1e9, 1e14])
@pytest.mark.parametrize("kernel", ["rbf", "imq"])
def test_a_wide_and_a_narrow_median(scale, kernel):
    x, y = scale * torch.randn(20, D), scale * (torch.randn(20, D) + 1)
    results = []
    for implementation, where, dtype in (("triton", device, torch.float32), ("reference", "cpu", torch.float64)):
        leaf = x.to(where, dtype).requires_grad_()
        with ivfast.use(implementation):
            value = ivfast.mmd(leaf, y.to(where, dtype), kernel=kernel, bandwidth="median")
            results.append((value.cpu(), torch.autograd.grad(value, leaf)[0].cpu()))
    (a, found), (b, wanted) = results
    assert testing.error(a, b, 1.0) <= testing.TOLERANCES[torch.float32]
    assert testing.error(found.double() * scale, wanted * scale) <= testing.TOLERANCES[torch.float32]


def test_rows_whose_sum_overflows():
    x = torch.randn(20, D)
    x[:2] = 2e38
    with ivfast.use("triton"):
        h = ivfast.median_bandwidth(x.to(device))
        phi = ivfast.svgd_direction(x.to(device), bandwidth=4.0)
    with ivfast.use("reference"):
        assert testing.error(h.cpu(), ivfast.median_bandwidth(x)) <= testing.TOLERANCES[torch.float32]
        assert testing.error(phi[2:].cpu(), ivfast.svgd_direction(x, bandwidth=4.0)[2:]) <= 2e-5
