"""What S5 says about the AS-Distance, by quadrature and on fresh random inputs."""

import contextlib
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


LIMITS = {
    ("lebesgue", torch.float32): 170.0,
    ("prior", torch.float32): 170.0,
    ("lebesgue", DOUBLE): 600.0,
    ("prior", DOUBLE): 330.0,
}


@pytest.mark.parametrize("use", ["reference", None])
@pytest.mark.parametrize("kernel", ["product", "additive"])
@pytest.mark.parametrize(("measure", "dtype"), LIMITS, ids=str)
def test_log_variances_are_not_clamped(use, kernel, measure, dtype):
    """One Gaussian each, both of variance l = e^v: ∫ N² = 1/√(4πl), and 1/√(4π² (2l + l²)) under the prior."""
    most = LIMITS[measure, dtype]
    with ivfast.use(use) if use else contextlib.nullcontext():
        for v in (most, most / 2, 85.0, 43.0, -85.0, -100.0, -most):
            z = torch.zeros(1, 3, dtype=dtype)
            logvar = torch.full_like(z, v).requires_grad_()
            log_l = torch.tensor(v, dtype=DOUBLE, requires_grad=True)
            log_P = log_l + math.log(2)
            if measure == "prior":
                log_P = torch.logaddexp(log_P, 2 * log_l)
            term = -0.5 * (log_P + (1 + (measure == "prior")) * math.log(2 * math.pi))
            expected = 3 * term if kernel == "product" else term
            found = ivfast.log_gaussian_kernel_sums(z, logvar, z, logvar, kernel=kernel, measure=measure)
            assert error(found, expected.expand(3)) < 1e-6
            gradient = torch.autograd.grad(found[0], logvar)[0].sum()
            assert error(gradient, torch.autograd.grad(expected, log_l)[0]) < 1e-6


@pytest.mark.parametrize("use", ["reference", None])
@pytest.mark.parametrize("measure", ["lebesgue", "prior"])
def test_shares_add_up_to_one_however_large_the_logarithm(use, measure):
    """One pair, at log k of about −400, outweighs the others: its share is 1, and not 1 ± 400 eps."""
    far = torch.tensor([[0.0], [20.0]]), torch.tensor([[5.0], [60.0]])
    q = [x for mean in far for x in (mean + 0.1 * torch.randn(2, 32), torch.rand(2, 32) - 1)]
    ours, exact = [x.clone().requires_grad_() for x in q], [x.double().requires_grad_() for x in q]
    with ivfast.use(use) if use else contextlib.nullcontext():
        gradients = torch.autograd.grad(ivfast.log_gaussian_kernel_sums(*ours, measure=measure)[2], ours)
    with ivfast.use("reference"):
        expected = torch.autograd.grad(ivfast.log_gaussian_kernel_sums(*exact, measure=measure)[2], exact)
    for a, b in zip(gradients, expected, strict=True):
        assert error(a, b) < 2e-6


@pytest.mark.parametrize("kernel", ["product", "additive"])
def test_second_derivatives_beside_a_narrow_posterior(kernel):
    """A posterior's product with itself does not depend on its mean, so 1/variance, here e⁴⁵, does not show."""
    mu, logvar = torch.randn(2, 3, dtype=DOUBLE), torch.tensor([[-45.0], [0.0]], dtype=DOUBLE).expand(2, 3)

    def plain(mu):
        log_s = torch.logaddexp(logvar.unsqueeze(1), logvar)
        own = -0.5 * (log_s + math.log(2 * math.pi))
        between = own[0, 1] - 0.5 * (mu[0] - mu[1]).square() / log_s[0, 1].exp()
        l = torch.stack((own[0, 0], own[1, 1], between, between))
        return l.sum(-1).logsumexp(0) if kernel == "product" else l.logsumexp((0, 1)) - math.log(3)

    def ours(mu):
        return ivfast.log_gaussian_kernel_sums(mu, logvar, mu.detach(), logvar, kernel=kernel)[0]

    hessian = torch.autograd.functional.hessian
    assert error(ours(mu), plain(mu)) < 1e-12
    assert error(hessian(ours, mu), hessian(plain, mu)) < 1e-9  # of exponentials of numbers up to 70
