"""What S5 says about the AS-Distance, by quadrature and on fresh random inputs."""

import math

import pytest
import torch

import ivfast
from ivfast.testing import error

DOUBLE = torch.float64


def normal(*shape, dtype=DOUBLE):
    return torch.randn(*shape, dtype=dtype)


@pytest.mark.parametrize("measure", ["lebesgue", "prior"])
@pytest.mark.parametrize("d", [1, 2])
def test_as_kernel_against_quadrature(measure, d):
    axis = torch.linspace(-15, 15, 1501, dtype=DOUBLE)
    u, logvar = normal(2, d), torch.rand(2, d, dtype=DOUBLE) * 2 - 1

    def density(u, logvar):  # of one dimension over the axis
        return torch.exp(-0.5 * (axis - u).square() / logvar.exp() - 0.5 * logvar) / math.sqrt(2 * math.pi)

    weight = torch.exp(-0.5 * axis.square()) / math.sqrt(2 * math.pi) if measure == "prior" else torch.ones_like(axis)
    one = [density(u[0, j], logvar[0, j]) * density(u[1, j], logvar[1, j]) * weight for j in range(d)]
    per_dimension = torch.stack([v.sum() * (axis[1] - axis[0]) for v in one])
    for kernel, expected in (("product", per_dimension.prod()), ("additive", per_dimension.mean())):
        sums = ivfast.log_gaussian_kernel_sums(u[:1], logvar[:1], u[1:], logvar[1:], kernel=kernel, measure=measure)
        assert float(sums[2]) == pytest.approx(float(expected.log()), abs=1e-9)


@pytest.mark.parametrize("kernel", ["product", "additive"])
@pytest.mark.parametrize("measure", ["lebesgue", "prior"])
def test_as_distance_is_a_distance(kernel, measure):
    form = {"kernel": kernel, "measure": measure}
    r = normal(6, 3), torch.rand(6, 3, dtype=DOUBLE)
    g = normal(5, 3), torch.rand(5, 3, dtype=DOUBLE)
    d = ivfast.as_distance(*r, *g, **form)
    assert float(d) > 0
    assert error(ivfast.as_distance(*g, *r, **form), d) < 1e-10
    assert abs(float(ivfast.as_distance(*r, *r, **form))) < 1e-14
    assert float(ivfast.as_distance(*r, *g, log=True, **form)) > 0
    assert abs(float(ivfast.as_distance(*r, *r, log=True, **form))) < 1e-12
    order = torch.randperm(6)
    assert error(ivfast.as_distance(r[0][order], r[1][order], *g, **form), d) < 1e-10


def test_as_distance_does_not_underflow_at_512_dimensions():
    q = [normal(8, 512, dtype=torch.float32) for _ in range(4)]
    for x in q:
        x.requires_grad_()
    value = ivfast.as_distance(*q, log=True)
    gradients = torch.autograd.grad(value, q)
    assert torch.isfinite(value)
    assert all(torch.isfinite(g).all() and g.abs().max() > 0 for g in gradients)
