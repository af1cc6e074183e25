"""What the papers prove about Fréchet distances, on fresh random inputs."""

import math

import numpy as np
import pytest
import torch

import ivfast
from ivfast.testing import error

DOUBLE = torch.float64


def normal(*shape, dtype=DOUBLE):
    return torch.randn(*shape, dtype=dtype)


def random_covariance(d, rank=None):
    a = normal(rank or 3 * d, d)
    return a.mT @ a / a.shape[0]


def test_frechet_distance_of_commuting_gaussians_is_exact():
    mu1, mu2, s1, s2 = normal(7), normal(7), torch.rand(7, dtype=DOUBLE), torch.rand(7, dtype=DOUBLE)
    q = torch.linalg.qr(normal(7, 7)).Q
    expected = (mu1 - mu2).square().sum() + (s1 - s2).square().sum()
    actual = ivfast.frechet_distance(mu1, q @ s1.square().diag() @ q.mT, mu2, q @ s2.square().diag() @ q.mT)
    assert error(actual, expected) < 1e-10


def test_frechet_distance_agrees_with_scipys_square_root():
    from scipy import linalg

    mu1, mu2, s1, s2 = normal(12), normal(12), random_covariance(12), random_covariance(12)
    root = np.trace(np.real(linalg.sqrtm((s1 @ s2).numpy())))
    expected = (mu1 - mu2).square().sum() + s1.trace() + s2.trace() - 2 * root
    assert error(ivfast.frechet_distance(mu1, s1, mu2, s2), expected) < 1e-8


def test_frechet_distance_is_zero_at_equality_and_symmetric():
    x, y = normal(30, 6), normal(25, 6) * 2
    assert abs(float(ivfast.frechet_distance_from_samples(x, x))) < 1e-12
    forward, back = ivfast.frechet_distance_from_samples(x, y), ivfast.frechet_distance_from_samples(y, x)
    assert error(forward, back) < 1e-12
    stats = [(z.mean(0), torch.cov(z.mT)) for z in (x, y)]
    assert error(ivfast.frechet_distance(*stats[0], *stats[1]), forward) < 1e-10


@pytest.mark.parametrize(("n", "m", "d"), [(6, 6, 12), (2, 9, 4), (3, 40, 20), (2, 2, 1)])
def test_frechet_distance_of_rank_deficient_samples(n, m, d):
    """Tr √(Σ₁Σ₂) = Σ singular values of C₁C₂ᵀ, computed directly from the n × m matrix."""
    x, y = normal(n, d), normal(m, d)
    c1, c2 = ((z - z.mean(0)) / math.sqrt(len(z) - 1) for z in (x, y))
    expected = (x.mean(0) - y.mean(0)).square().sum() + c1.square().sum() + c2.square().sum()
    expected = expected - 2 * torch.linalg.svdvals(c1 @ c2.mT).sum()
    assert error(ivfast.frechet_distance_from_samples(x, y), expected) < 1e-10
    moments = [(z.mean(0), torch.cov(z.mT).view(d, d)) for z in (x, y)]
    # covariances lose half of the digits: √ of a rounding error of 1e-16
    assert error(ivfast.frechet_distance(*moments[0], *moments[1]), expected) < 1e-6


def test_gaussian_statistics_stream_to_the_same_moments():
    x = normal(1000, 5) * 1e-3 + 1e4  # Σxxᵀ − nμμᵀ would lose everything
    whole, left, right = (ivfast.GaussianStatistics(5) for _ in range(3))
    whole.update(x)
    for batch in x[:400].split(7):
        left.update(batch)
    right.update(x[400:])
    merged = left.merge(right).merge(ivfast.GaussianStatistics(5))
    for stats in (whole, merged):
        assert stats.count == 1000
        assert error(stats.mean, x.mean(0)) < 1e-13
        assert error(stats.covariance, torch.cov(x.mT)) < 1e-8


def test_what_is_not_finite_gives_nan_and_leaves_the_rest_of_the_batch():
    for n in (4, 30):  # fewer samples than dimensions, and more
        x, y = torch.randn(3, n, 6, dtype=torch.float64), torch.randn(3, n, 6, dtype=torch.float64)
        expected = ivfast.frechet_distance_from_samples(x, y)
        x[1, 2, 3] = float("nan")
        for grad in (False, True):
            found = ivfast.frechet_distance_from_samples(x.requires_grad_(grad), y)
            assert found[1].isnan()
            torch.testing.assert_close(found[::2], expected[::2])
    mu, sigma = torch.zeros(6, dtype=torch.float64), torch.eye(6, dtype=torch.float64)
    sigma[2, 3] = float("nan")
    for grad in (False, True):
        assert ivfast.frechet_distance(mu, sigma.requires_grad_(grad), mu, torch.eye(6, dtype=torch.float64)).isnan()


@pytest.mark.parametrize("n", [2, 3, 5])
def test_few_samples_far_from_0_have_the_derivatives_of_those_near(n):
    """The rounding of a mean far from 0 is no direction of the samples. The shift rounds no sample."""
    x, y = ((normal(n, 6) * 2**20).round() / 2**20 for _ in range(2))
    tangent = normal(n, 6)

    def curvature(x):  # of fld: the Hessian does not depend on the mean
        x = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(ivfast.fld(x), x, create_graph=True)
        return torch.autograd.grad((gradient * tangent).sum(), x)[0]

    def slope(shift):
        far = (x + shift).requires_grad_()
        return torch.autograd.grad(ivfast.frechet_distance_from_samples(far, y + shift), far)[0]

    shift = 2.0**16
    # rounding, times the square of the condition number of C
    assert error(curvature(x + shift), curvature(x)) < 1e-8
    assert error(slope(shift), slope(0.0)) < 1e-8
