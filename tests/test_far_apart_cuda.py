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
