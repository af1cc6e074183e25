"""The median bandwidth against NumPy, with ties and gradients, on fresh random inputs."""

import math

import numpy as np
import pytest
import torch

import ivfast
from ivfast.testing import error

DOUBLE = torch.float64


def normal(*shape, dtype=DOUBLE):
    return torch.randn(*shape, dtype=dtype)


@pytest.mark.parametrize("n", [1, 2, 3, 20, 31])
def test_median_bandwidth_follows_numpy_in_every_convention(n):
    x = normal(n, 4)
    distance = torch.cdist(x, x).numpy()
    below = distance[np.tril_indices(n, -1)]
    expected = {
        "liu-wang": np.median(distance**2) / math.log(n + 1),
        "numpyro": np.median(distance) ** 2 / math.log(max(n, 2)),
        "blackjax": np.median(below) ** 2 / math.log(max(n, 2)) if n > 1 else 0,
        "paper": np.median(below) ** 2 / math.log(max(n, 2)) if n > 1 else 0,
    }
    for convention, h in expected.items():
        actual = float(ivfast.median_bandwidth(x, convention=convention))
        if h > 0:
            assert actual == pytest.approx(h, rel=1e-6)
        else:  # no positive median: mean squared distance from the first particle, or 1
            assert 0 < actual < math.inf


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("n", [1, 2, 9])
def test_the_reference_is_nan_if_a_particle_is_not_finite(n, value):
    x = normal(n, 4)
    x[-1, 2] = value
    with ivfast.use("reference"):
        assert ivfast.median_bandwidth(x).isnan()


def test_median_bandwidth_of_ties_and_duplicates():
    assert float(ivfast.median_bandwidth(torch.ones(5, 3) * 1e4)) == 1.0
    grid = torch.tensor([[0.0], [1.0], [2.0], [3.0]])  # distances 1, 1, 1, 2, 2, 3
    assert float(ivfast.median_bandwidth(grid, convention="paper")) == pytest.approx(1.5**2 / math.log(4))
    assert error(ivfast.median_bandwidth(7 * grid), 49 * ivfast.median_bandwidth(grid)) < 1e-6


@pytest.mark.parametrize("d", [1, 7, 20, 33])
def test_duplicates_are_at_distance_0_in_the_reference(d):
    """Most pairs coincide: the spread replaces the median, which rounding must not make positive."""
    for n in range(3, 41, 2):  # two points: more than half of an odd number of entries are 0
        x = (normal(2, d) * 1e3)[torch.randint(2, (n,))]
        expected = (x - x[0]).square().sum() / n / math.log(n + 1)
        with ivfast.use("reference"):
            assert error(ivfast.median_bandwidth(x), expected) < 1e-13 or (x == x[0]).all()


def test_no_gradient_flows_through_the_median_unless_asked():
    x = normal(12, 3).requires_grad_()
    h = ivfast.median_bandwidth(x)
    direction = normal(12, 3)

    def gradient(bandwidth):
        return torch.autograd.grad((ivfast.svgd_direction(x, bandwidth=bandwidth) * direction).sum(), x)[0]

    assert torch.equal(gradient("median"), gradient(h.detach()))
    assert error(gradient(h), gradient(h.detach())) > 1e-4


def test_duplicates_share_second_derivatives():
    """Rows A, A, B, C: the middle distances of the six pairs are ‖A − B‖ and ‖A − C‖, of two pairs each."""
    a, b, c = normal(3, 2) * 0.1 + torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]], dtype=DOUBLE)
    tangent = normal(4, 2)
    tangent[1] = tangent[0]

    def curvature(function, x, tangent):
        x = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(x), x, create_graph=True)
        return torch.autograd.grad((gradient * tangent).sum(), x)[0]

    expected = curvature(
        lambda x: ((x[0] - x[1]).norm() + (x[0] - x[2]).norm()).square() / (4 * math.log(4)),
        torch.stack((a, b, c)),
        tangent[1:],
    )
    function = lambda x: ivfast.median_bandwidth(x, convention="paper")  # noqa: E731
    actual = curvature(function, torch.stack((a, a, b, c)), tangent)
    expected = torch.cat((expected[:1] / 2, expected[:1] / 2, expected[1:]))
    assert error(actual, expected) < 1e-10


@pytest.mark.parametrize("convention", ["liu-wang", "blackjax", "numpyro", "paper"])
def test_second_derivatives_where_a_middle_distance_is_0(convention):
    """Two particles have the distances 0, 0, d, d if the diagonal counts."""
    x = torch.randn(2, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: ivfast.median_bandwidth(x, convention=convention), x)
