"""What the papers prove about the SVGD direction, on fresh random inputs."""

import pytest
import torch

import ivfast
from ivfast.testing import error

DOUBLE = torch.float64


def normal(*shape, dtype=DOUBLE):
    return torch.randn(*shape, dtype=dtype)


def test_svgd_direction_is_liu_and_wangs_formula():
    x, s, h = normal(9, 3), normal(9, 3), 1.7
    difference = x.unsqueeze(1) - x.unsqueeze(0)  # x_i − x_j
    k = torch.exp(-difference.square().sum(-1) / h)
    phi = (k @ s + (2 / h) * (difference * k.unsqueeze(-1)).sum(1)) / 9
    assert error(ivfast.svgd_direction(x, s, bandwidth=h), phi) < 1e-12


def test_isolated_particles_have_exact_derivatives():
    """Kernels of 10⁻⁹ beside a particle's own of 1, which has no derivative in x or h."""
    x, s, weights, tangent = normal(4, 3), normal(4, 3) * 100, normal(4, 3), normal(4, 3)
    h = torch.pdist(x).square().min() / 20

    def formula(x, h):
        difference = (x.unsqueeze(1) - x.unsqueeze(0)) * (1 - torch.eye(4, dtype=DOUBLE)).unsqueeze(-1)
        k = torch.exp(-difference.square().sum(-1) / h).unsqueeze(-1)
        return (k * (s + 2 / h * difference)).mean(1)

    def derivatives(function):
        leaves = x.clone().requires_grad_(), h.clone().requires_grad_()
        first = torch.autograd.grad((function(*leaves) * weights).sum(), leaves, create_graph=True)
        return [*first, *torch.autograd.grad((first[0] * tangent).sum(), leaves)]

    with ivfast.use("reference"):
        found = derivatives(lambda x, h: ivfast.svgd_direction(x, s, bandwidth=h))
    for ours, exact in zip(found, derivatives(formula), strict=True):
        assert error(ours, exact) < 1e-11


def test_svgd_direction_repels():
    """Without a score, two particles repel; the gradient index printed in S1's Eq. 2 would make them attract."""
    x = torch.tensor([[0.0], [1.0]])
    phi = ivfast.svgd_direction(x, torch.zeros_like(x), bandwidth=1.0)
    assert phi[0] < 0 < phi[1]


def test_svgd_direction_moves_with_translation_rotation_and_permutation():
    x, s = normal(20, 5), normal(20, 5)
    phi = ivfast.svgd_direction(x, s, bandwidth=4.0)
    assert error(ivfast.svgd_direction(x + 7, s, bandwidth=4.0), phi) < 1e-10
    q = torch.linalg.qr(normal(5, 5)).Q
    assert error(ivfast.svgd_direction(x @ q, s @ q, bandwidth=4.0), phi @ q) < 1e-12
    order = torch.randperm(20)
    assert error(ivfast.svgd_direction(x[order], s[order], bandwidth=4.0), phi[order]) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_svgd_direction_of_coincident_particles_is_the_score(dtype):
    x = normal(1, 6, dtype=dtype).repeat(17, 1) * 10
    assert error(ivfast.svgd_direction(x), -x) < 1e-5
    assert error(ivfast.svgd_direction(x[:1]), -x[:1]) < 1e-6
    wide, narrow = ivfast.svgd_direction(x, bandwidth=1e12), ivfast.svgd_direction(x + 1, bandwidth=1e-3)
    assert torch.isfinite(wide).all()
    assert torch.isfinite(narrow).all()


@pytest.mark.parametrize(("scale", "variance"), [(1.0, 0.21), (100.0, 0.99)])
def test_svgd_converges_to_the_shrunk_variance_that_s1_reports(scale, variance):
    x = normal(64, 16, dtype=torch.float32) * 2 + 1
    for _ in range(2000 if scale == 1 else 8000):
        x = x + ivfast.svgd_direction(x, scale=scale, convention="paper")
    assert float(x.var(0, unbiased=False).mean()) == pytest.approx(variance, abs=0.015)
    assert float(x.mean(0).abs().max()) < 0.05
