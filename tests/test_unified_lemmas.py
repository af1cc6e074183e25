"""S3's lemmas, by quadrature."""

import copy
import math

import pytest
import torch
from test_unified import small
from torch import distributions
from torch.nn import functional as F

from ivfast.models import build
from ivfast.testing import error

SHAPE = (1, 8, 8)
N = 24


def image():
    return torch.rand(N, *SHAPE) * 2 - 1


GRID = torch.linspace(-14, 14, 20001, dtype=torch.float64)


def integral(values):
    return torch.trapezoid(values, GRID)


def normal(mean, scale):
    return distributions.Normal(torch.as_tensor(mean, dtype=torch.float64), scale).log_prob(GRID).exp()


def kl(p, q):
    return integral(p * (p.log() - q.log()))


def jsd(p, q):
    m = (p + q) / 2
    return 0.5 * (kl(p, m) + kl(q, m))


@pytest.mark.parametrize("discriminator", ["uniform", "logistic", "optimal"])
def test_lemma_1_by_quadrature(discriminator):
    """S3 Eq. 10, and Eq. 14 for the optimal D: generator N(θ, 1.3²), data N(0, 1), p(y) uniform."""
    theta = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    p_data, p_g, p_g0 = normal(0, 1.0), normal(theta, 1.3), normal(theta.detach(), 1.3)
    logits = {
        "uniform": torch.zeros_like(GRID),
        "logistic": 0.8 - 1.1 * GRID,
        "optimal": p_data.log() - p_g0.log(),
    }[discriminator]
    D_ = torch.sigmoid(logits)

    # −E_{p(x|y) p(y)} log q^r(y|x): the loss of `Gan.generator_loss`, as log D at y = 0, and a constant at y = 1
    left = 0.5 * integral(p_g * F.softplus(-logits)) + 0.5 * integral(p_data * F.softplus(logits))
    prior = (p_g0 + p_data) / 2
    posterior = [q * prior / integral(q * prior) for q in (D_, 1 - D_)]  # q^r(x|y), y = 0, 1
    right = 0.5 * kl(p_g, posterior[0]) + 0.5 * kl(p_data, posterior[1]) - jsd(p_g, p_data)
    (a,), (b,) = (torch.autograd.grad(side, theta, retain_graph=True) for side in (left, right))
    assert abs(a - b) < 1e-9
    if discriminator == "uniform":
        assert abs(a) < 1e-9  # "the gradients of the KL and JSD terms cancel out"
    else:
        assert abs(a) > 0.05
    if discriminator == "optimal":  # Eq. 14
        (c,) = torch.autograd.grad(0.5 * kl(p_g, p_data) - jsd(p_g, p_data), theta)
        assert abs(a - c) < 1e-9
        # Eqs. 42–44: the weight of a sample, q^r(y|x) p_θ0(x) / p_θ(x|y) at y = 0, is ½ D/(1 − D)
        inside = GRID.abs() < 6
        assert error((D_ * prior / p_g0)[inside], (0.5 * D_ / (1 - D_))[inside]) < 1e-9
    # Eq. 24 holds with the normaliser of Eq. 9, E_p(y) log ∫ q^r(y|x) p_θ0(x) dx, which the paper leaves out
    normaliser = sum(0.5 * integral(q * prior).log() for q in (D_, 1 - D_))
    divergences = sum(0.5 * (kl(p, q) - kl(p, prior)) for p, q in zip((p_g, p_data), posterior, strict=True))
    assert abs(-left - (normaliser - divergences)) < 1e-9


def test_bounds_are_below_the_likelihood_by_the_divergence_of_the_posteriors():
    """One-dimensional codes: log p(x) − E bound(x) = KL(q(z|x) ‖ p(z|x)), each by quadrature."""
    system = build(small("vae", latent_dim=1, width=8), SHAPE)
    with torch.no_grad():
        system.modules["generator"][-2].weight.mul_(10)  # a decoder that depends on its code
    x = image()[:1]
    with torch.no_grad():
        l, t = copy.deepcopy(system.modules["generator"]).double()(GRID[:, None]), (x.double() + 1) / 2
        log_joint = (t * l - F.softplus(l)).sum((1, 2, 3)) + normal(0, 1.0).log()
        mu, logvar = system.modules["encoder"](x).double().chunk(2, 1)
        q = normal(mu[0, 0], float((logvar / 2).exp()))
        log_p = torch.logsumexp(log_joint, 0) + math.log(float(GRID[1] - GRID[0]))
        elbo = integral(q * (log_joint - q.clamp_min(1e-300).log()))
        gap = integral(q * (q.clamp_min(1e-300).log() - (log_joint - log_p)))
    assert abs(elbo - (log_p - gap)) < 1e-6 * abs(log_p)  # the grid holds all of q
    assert gap > 0.01
    draws = system.bound(x.expand(4000, -1, -1, -1))
    assert abs(float(draws.mean() - (log_p - gap))) < 5 * float(draws.std()) / math.sqrt(4000)  # 5 standard errors
