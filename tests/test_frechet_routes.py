"""The cheap methods for a Fréchet distance's value: accurate where used, and not used where rounding would show."""

import pytest
import torch

import ivfast
from ivfast.ops import frechet
from ivfast.testing import error

DOUBLE = torch.float64


def normal(*shape):
    return torch.randn(*shape, dtype=DOUBLE)


def covariance(values):
    """A covariance with these eigenvalues in a random basis, and a factor C with CᵀC = it."""
    Q, _ = torch.linalg.qr(normal(len(values), len(values)))
    C = values.sqrt().unsqueeze(1) * Q
    return C.mT @ C, C


def spectrum(d, fall):
    return torch.arange(1, d + 1, dtype=DOUBLE) ** -fall


def refused(*args):
    raise AssertionError("singular values were computed")


@pytest.mark.parametrize("fall", [0.0, 1.0, 2.0])
def test_eigenvalues_serve_spectra_as_they_come(fall, monkeypatch):
    (sigma1, C1), (sigma2, C2) = covariance(spectrum(150, fall)), covariance(spectrum(150, fall))
    exact = torch.linalg.svdvals(C1 @ C2.mT).sum()
    monkeypatch.setattr(frechet, "frechet_covariance_trace_reference", refused)
    trace = frechet._covariance_trace(sigma1, sigma2, False)[0]
    assert error(trace, exact) < 1e-8


@pytest.mark.parametrize("kept", [0, 1, 40, 149])
def test_singular_covariances_take_singular_values(kept):
    values = spectrum(150, 1.0)
    values[kept:] = 0
    (sigma1, C1), (sigma2, C2) = covariance(values), covariance(spectrum(150, 0.5))
    exact = torch.linalg.svdvals(C1 @ C2.mT).sum()
    # the covariance itself has √eps for each singular value that is 0
    for pair in ((sigma1, sigma2), (sigma2, sigma1)):
        assert float(frechet._covariance_trace(*pair, False)[0] - exact) == pytest.approx(0, abs=2e-5)
    assert error(frechet._factor_trace(C1, C2, False)[0], exact, unit=1.0) < 1e-12


def test_a_spectrum_over_24_decades_is_not_left_to_eigenvalues():
    _, C = covariance(torch.logspace(0, -24, 60, dtype=DOUBLE))
    gram = C.mT @ C
    assert not frechet._root_sum(gram, torch.linalg.matrix_norm(gram))[1]
    exact = torch.logspace(0, -12, 60, dtype=DOUBLE).sum()
    assert error(frechet._factor_trace(C, None, False)[0], exact) < 1e-10


@pytest.mark.parametrize(("n", "m", "d"), [(40, 30, 100), (300, 250, 20), (300, 10, 60), (2, 2, 5), (90, 90, 1)])
def test_values_with_and_without_gradients_agree(n, m, d):
    x, y = normal(2, n, d), normal(2, m, d) + 0.5
    value = ivfast.frechet_distance_from_samples(x, y)
    with_gradient = ivfast.frechet_distance_from_samples(x.requires_grad_(), y.requires_grad_())
    assert error(value, with_gradient) < 1e-8
    latent = ivfast.fld(x.detach())
    assert error(latent, ivfast.fld(x)) < 1e-8


@pytest.mark.parametrize(("n", "m", "d"), [(9, 7, 20), (9, 30, 20), (40, 30, 6)])
def test_gradients_are_the_references(n, m, d):
    x, y = normal(n, d).requires_grad_(), normal(m, d).requires_grad_()
    ours = torch.autograd.grad(ivfast.frechet_distance_from_samples(x, y), (x, y))
    with ivfast.use("reference"):
        theirs = torch.autograd.grad(ivfast.frechet_distance_from_samples(x, y), (x, y))
    assert all(error(a, b) < 1e-9 for a, b in zip(ours, theirs, strict=True))


def test_one_singular_covariance_of_a_batch_does_not_spoil_the_others():
    good, _ = covariance(spectrum(30, 0.5))
    sigma1 = torch.stack([good, torch.zeros_like(good)])
    sigma2 = good.expand(2, 30, 30)
    trace = frechet._covariance_trace(sigma1, sigma2, False)[0]
    assert float(trace[0]) == pytest.approx(float(good.diagonal().sum()), rel=1e-9)
    assert float(trace[1]) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("n", "d", "fall"), [(60, 8, 0.0), (60, 8, 1.0), (60, 8, 9.0), (5, 8, 0.0), (2, 3, 0.0), (60, 1, 0.0)]
)
def test_gradient_of_fld_is_that_of_the_singular_values(n, d, fall):
    """Well-conditioned codes by eigenvalues, others (fall 9, n < d) by singular values."""
    z = (normal(3, n, d) * spectrum(d, fall) + 0.3).requires_grad_()
    mu = z.mean(-2)
    c = (z - mu.unsqueeze(-2)) / (n - 1) ** 0.5
    # with n < d samples one singular value is 0, because of the mean: the subgradient of least norm leaves it out
    singular = torch.linalg.svdvals(c)[..., : min(n - 1, d)]
    expected = mu.square().sum(-1) + c.square().sum((-2, -1)) + d - 2 * singular.sum(-1)
    value = ivfast.fld(z)
    assert error(value, expected) < 1e-8
    weights = normal(3)
    (ours,), (theirs,) = (torch.autograd.grad(v, z, weights) for v in (value, expected))
    assert error(ours, theirs) < 1e-6
