"""The Fréchet latent distance of codes that are white, scaled or collapsed."""

import pytest
import torch

import ivfast
from ivfast.testing import error

DOUBLE = torch.float64


def normal(*shape, dtype=DOUBLE):
    return torch.randn(*shape, dtype=dtype)


def test_fld_of_whitened_codes_is_zero_and_follows_its_formula():
    z = normal(200, 9) @ normal(9, 9) + 1
    mu, sigma = z.mean(0), torch.cov(z.mT)
    values, vectors = torch.linalg.eigh(sigma)
    expected = mu.square().sum() + (values.sqrt() - 1).square().sum()
    assert error(ivfast.fld(z), expected) < 1e-9
    white = (z - mu) @ vectors @ values.rsqrt().diag()
    assert abs(float(ivfast.fld(white))) < 1e-10
    assert float(ivfast.fld(torch.zeros(10, 4))) == pytest.approx(4.0)  # collapsed codes: d


def test_fld_gradient_is_finite_for_collapsed_codes():
    for z in (torch.zeros(10, 4), torch.randn(5, 1).repeat(1, 6), torch.randn(3, 12)):
        z = z.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(ivfast.fld(z), z)
        assert torch.isfinite(gradient).all()
