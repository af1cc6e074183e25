"""The tests of test_far_apart_cpu.py for CUDA C++, which computes in float32 throughout; run on the CPU by tests/simt."""

import formulas
import pytest
import torch
from test_far_apart_cpu import clusters, compare, drawn, outliers, tight

import ivfast
from ivfast import testing

pytestmark = pytest.mark.usefixtures("simt")
places = pytest.mark.parametrize("place", [outliers, clusters, tight])


@pytest.mark.parametrize(("n", "d"), [(30, 4), (70, 40)])
@places
def test_far_apart_particles(place, n, d):
    compare("cuda", place, torch.float32, n, d)


@pytest.mark.parametrize("place", [outliers, tight])  # bfloat16 does not hold the clusters
def test_far_apart_particles_in_half_precision(place):
    compare("cuda", place, torch.bfloat16)


@pytest.mark.parametrize(("n", "d"), [(30, 4), (70, 40), (150, 3)])
@places
def test_the_bridge_of_far_apart_particles(place, n, d):
    # one step, because the next one's kernel depends on how far particles were rounded
    far = 10 ** float(torch.empty(()).uniform_(3, 12))
    z = drawn(place, far, torch.float32, n, d)
    draws, weights = torch.randn(2, n, d), torch.randn(3, n, d)
    results = []
    for its, dtype in ((ivfast, torch.float32), (formulas, torch.float64)):
        leaf = z.to(dtype).requires_grad_()
        with ivfast.use("cuda"):
            bridge = its.svgd_bridge(leaf, draws=draws.to(dtype), t=2, iterations=1)
            results.append((bridge[1], torch.autograd.grad(bridge, leaf, weights.to(dtype))[0]))
    is_far = z.abs().amax(-1) > 100
    for ours, exact in zip(*results, strict=True):
        for rows in (is_far, ~is_far):
            assert testing.error(ours[rows], exact[rows]) <= testing.TOLERANCES[torch.float32], far


def test_squares_that_vanish_are_not_distances_of_zero():
    x = torch.randn(30, 4) * 1e-30
    x[:3] = torch.randn(3, 4)  # from which the bandwidth of equal particles would come
    with ivfast.use("cuda"):
        assert ivfast.median_bandwidth(x) == 0
        x[3:] = 0
        assert ivfast.median_bandwidth(x) > 0.01


@pytest.mark.parametrize("h", [1e-45, 1e-38, 1e-30, 1e30, 3e38])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_extremes_stay_finite(h, scale):
    x, score, h = (torch.randn(40, 9) * scale).requires_grad_(), torch.randn(40, 9).requires_grad_(), torch.tensor(h)
    results = []
    for implementation in ("cuda", "reference"):
        with ivfast.use(implementation):
            phi = ivfast.svgd_direction(x, score, bandwidth=h)
            results.append((phi, *torch.autograd.grad(phi.sum(), (x, score))))
    for ours, exact in zip(*results, strict=True):
        assert (ours.isfinite() | ~exact.isfinite()).all()
        if scale == 1.0 and h > 1e-38:  # 2/h is finite, and the gradients of a sum do not cancel to nothing beside it
            assert testing.error(ours, exact) <= testing.TOLERANCES[torch.float32]


@pytest.mark.parametrize("ends", [(2e38, 2e38), (2e38, -2e38), (-3.3e38, 1.0)])
@pytest.mark.parametrize(("n", "d"), [(30, 4), (70, 40)])
def test_columns_whose_sum_float32_does_not_hold(n, d, ends):
    def drawn(rows):
        x = torch.randn(rows, d)
        x[:, 0] = torch.where(torch.arange(rows) < rows * 2 // 3, *ends)
        return x

    x, y, score, draws = drawn(n), drawn(n - 7), torch.randn(n, d), torch.randn(2, n, d)
    h = torch.tensor(2.0 * d)
    calls = {
        "median": (lambda its, x: its.median_bandwidth(x, convention="paper"), (x,)),
        "direction": (lambda its, x, s, h: its.svgd_direction(x, s, bandwidth=h), (x, score, h)),
        "to the prior": (lambda its, x, h: its.svgd_direction(x, bandwidth=h), (x, h)),
        "bridge": (lambda its, z, e: its.svgd_bridge(z, draws=e, t=2, iterations=1)[1], (x, draws)),
        "imq": (lambda its, x, y: its.mmd(x, y), (x, y)),
        "rbf": (lambda its, x, y: its.mmd(x, y, kernel="rbf", bandwidth=float(d)), (x, y)),
    }
    for name, (call, inputs) in calls.items():
        smooth = name in ("direction", "imq", "rbf")  # other gradients hold products with 2e38, or have ties
        ours, exact = ([t.to(dtype).requires_grad_(smooth) for t in inputs] for dtype in (torch.float32, torch.float64))
        with ivfast.use("cuda"):
            a = call(ivfast, *ours)
        b = call(formulas, *exact)
        weights = torch.randn_like(b)
        pairs = [(a, b)]
        if smooth:
            with ivfast.use("cuda"):
                found = torch.autograd.grad(a, ours[:2], weights.float())
            pairs += zip(found, torch.autograd.grad(b, exact[:2], weights), strict=True)
        for p, q in pairs:
            for columns in (slice(0, 1), slice(1, None)):
                p_there, q_there = (t[..., columns] if t.dim() else t for t in (p, q))
                assert testing.error(p_there, q_there, 1.0 if b.dim() == 0 else 0.0) <= 3e-5, (name, columns)


def test_evenly_spaced_particles_keep_their_ties():
    # lanes j and j ^ 7 hold mirror images, so sums over lanes add equal numbers in the same order
    place = torch.arange(24)
    x = place // 8 * 4 + place % 4
    x = torch.where(place % 8 < 4, x, -1 - x[place ^ 7])
    assert sorted(x.tolist()) == list(range(-12, 12))
    for first, step in ((0.0, 1.0), (37.0, 15.0), (407.0, 99.0), (814.0, 183.0)):
        particles = (first + step * x)[:, None]
        h = torch.tensor(step**2)
        row_sum = torch.ops.ivfast.svgd_direction.cuda(particles, torch.zeros_like(particles), h)[1]
        assert torch.equal(row_sum, row_sum[place ^ 7])
