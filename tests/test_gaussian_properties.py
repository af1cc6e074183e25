"""KL and samples of Gaussian posteriors against torch.distributions, on fresh random inputs."""

import torch

import ivfast
from ivfast.testing import error

DOUBLE = torch.float64


def normal(*shape, dtype=DOUBLE):
    return torch.randn(*shape, dtype=dtype)


def test_gaussian_kl_agrees_with_torch_distributions():
    mu, logvar = normal(8, 5), normal(8, 5)
    q, p = torch.distributions.Normal(mu, (0.5 * logvar).exp()), torch.distributions.Normal(0.0, 1.0)
    assert error(ivfast.gaussian_kl(mu, logvar), torch.distributions.kl_divergence(q, p).sum(-1)) < 1e-12
    assert float(ivfast.gaussian_kl(torch.zeros(4), torch.zeros(4))) == 0.0


def test_reparameterized_samples_have_their_moments():
    mu, logvar = torch.tensor([0.5, -2.0]), torch.tensor([0.0, 1.2])
    z, kl = ivfast.reparameterize(mu.expand(200_000, 2), logvar.expand(200_000, 2))
    assert torch.allclose(z.mean(0), mu, atol=0.02)
    assert torch.allclose(z.var(0).log(), logvar, atol=0.03)
    assert torch.equal(kl[:1], ivfast.gaussian_kl(mu, logvar)[None])


def test_reparameterize_gradients_of_one_output_alone():
    mu, logvar, draws = normal(4, 3).requires_grad_(), normal(4, 3).requires_grad_(), normal(4, 3)
    g = normal(4, 3)
    z, kl = ivfast.reparameterize(mu, logvar, draws=draws)
    dmu, dlogvar = torch.autograd.grad(z, (mu, logvar), g, retain_graph=True)
    assert torch.equal(dmu, g)
    assert error(dlogvar, g * draws * 0.5 * (0.5 * logvar).exp()) < 1e-12
    dmu, dlogvar = torch.autograd.grad(kl.sum(), (mu, logvar))
    assert error(dmu, mu) < 1e-12
    assert error(dlogvar, 0.5 * logvar.expm1()) < 1e-12


def test_reparameterize_repeats_its_draws():
    mu = normal(3, 2)
    z = [ivfast.reparameterize(mu, mu, generator=torch.Generator().manual_seed(3)).z for _ in range(2)]
    assert torch.equal(*z)
