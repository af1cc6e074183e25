"""Particles far from the others in Triton, interpreted if there is no GPU."""

import formulas
import pytest
import torch
from test_far_apart_cpu import D, N, clusters, compare, outliers, tight

import ivfast
from ivfast import testing
from ivfast.ops import mmd
from ivfast.ops.median import heuristic

svgd_bridge = pytest.importorskip("ivfast.kernels.svgd_bridge")
median = pytest.importorskip("ivfast.kernels.median")

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


def overflowing(n):
    """Rows whose sum float32 does not hold; those that are far apart do not meet."""
    x = torch.randn(n, D)
    x[:3] = torch.tensor([2e38, 1.8e38, 1.6e38])[:, None]
    return x


def exactly(call, *inputs):
    with ivfast.use("reference"):
        return call(*(x.double() for x in inputs))


@pytest.mark.parametrize("n", [20, 70])
def test_rows_whose_sum_overflows(n):
    x, y = overflowing(n), overflowing(n)
    calls = {
        "median": (ivfast.median_bandwidth, (x,)),
        "direction": (lambda x: ivfast.svgd_direction(x, bandwidth=4.0), (x,)),
        "mmd": (lambda x, y: ivfast.mmd(x, y, bandwidth=4.0), (x, y)),
    }
    for name, (call, inputs) in calls.items():
        with ivfast.use("triton"):
            found = call(*(t.to(device) for t in inputs)).cpu()
        wanted = exactly(call, *inputs)
        parts = (slice(3), slice(3, None)) if name == "direction" else (...,)
        for part in parts:
            error = testing.error(found[part], wanted[part], 1.0 if name == "mmd" else 0.0)
            assert error <= testing.TOLERANCES[torch.float32], name


@pytest.mark.parametrize("programs", ["one", "several"])
def test_the_bridge_of_rows_whose_sum_overflows(monkeypatch, programs):
    if programs == "several":
        monkeypatch.setattr(svgd_bridge, "SMALL_N", 0)
    z, draws = overflowing(20), torch.randn(3, 20, D)

    def call(z, draws):
        return ivfast.svgd_bridge(z, 3, draws=draws, iterations=1, scale=2.0)

    with ivfast.use("triton"):
        found = call(z.to(device), draws.to(device)).cpu()
    wanted = exactly(call, z, draws)
    for part in (slice(3), slice(3, None)):
        assert testing.error(found[:3, part], wanted[:3, part]) <= testing.TOLERANCES[torch.float32]


@pytest.mark.parametrize("n", [20, 70])
def test_a_row_farther_from_the_mean_than_float32_holds(n):
    x = torch.randn(n, D)
    x[:, 1] = 2e38
    x[0, 1] = -3e38
    results = []
    for implementation, where, dtype in (("triton", device, torch.float32), ("reference", "cpu", torch.float64)):
        leaf = x.to(where, dtype, copy=True).requires_grad_()
        with ivfast.use(implementation):
            h = ivfast.median_bandwidth(leaf)
            results.append((h.detach().cpu(), torch.autograd.grad(h, leaf)[0].cpu()))
    for found, wanted in zip(*results, strict=True):
        assert testing.error(found, wanted) <= testing.TOLERANCES[torch.float32]


@pytest.mark.parametrize("n", [20, 70])
def test_equal_particles_and_one_far_away(n):
    """The mean of d²_i0 replaces the median."""
    x = torch.zeros(n, D)
    x[5] = 1e18
    with ivfast.use("triton"):
        h = ivfast.median_bandwidth(x.to(device)).cpu()
    assert testing.error(h, exactly(ivfast.median_bandwidth, x)) <= testing.TOLERANCES[torch.float32]


def test_evenly_spaced_particles_keep_their_ties():
    """Their mean is exact, and so are their distances."""
    n = 2 * int(torch.randint(2, 16, ())) + 1
    x = 1000 + torch.arange(n, device=device, dtype=torch.float32)[:, None]
    d2 = formulas.pair_distances(x.double().cpu(), "paper").sort().values
    full, squared, divisor = heuristic(n, "paper")
    h, middles = median.forward(x, full, squared, divisor)
    assert torch.equal(middles.cpu().double(), d2[[(len(d2) - 1) // 2, len(d2) // 2]])
    bandwidths = svgd_bridge.forward(x, torch.zeros(2, n, 1, device=device), 2, 1, 1.0, 1.0, 0.0)[2]
    assert torch.equal(bandwidths[0], h)
