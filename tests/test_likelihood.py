"""Estimates of the likelihood and of the KL of the codes to the prior, against known values."""

import math

import pytest
import torch
from helpers import settings_with
from torch import distributions
from torch.nn import functional as F

from ivfast import data, metrics
from ivfast.models import build
from ivfast.testing import error
from ivfast.train import Settings
from ivfast.train.run import Run

SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def small(**changes) -> Settings:
    values = {"system": "avb", "batch_size": 24, "latent_dim": 6, "noise_dim": 5, "contrast_draws": 7}
    values |= {"width": 32, "discriminator_width": 24, "tensorboard": False, "seed": int(torch.randint(1000, ()))}
    return settings_with(values, changes)


def test_kl_to_prior_is_that_of_gaussians():
    for d, n in ((1, 20_000), (2, 20_000), (6, 8_000)):
        mean, deviation = 0.5 * torch.randn(d), 0.5 + torch.rand(d)
        z = mean + deviation * torch.randn(n, d)
        truth = float(
            distributions.kl_divergence(distributions.Normal(mean, deviation), distributions.Normal(0.0, 1.0)).sum()
        )
        # the noise of the mean of log q/p + d log r, and a bias that grows with d
        assert metrics.kl_to_prior(z) == pytest.approx(truth, abs=0.05 if d < 6 else 0.15)
    assert metrics.kl_to_prior(torch.zeros(10, 2)) == math.inf
    with pytest.raises(ValueError, match="codes must hold n > neighbours = 5 samples, got n = 5"):
        metrics.kl_to_prior(torch.randn(5, 2))
    with pytest.raises(ValueError, match="codes must be finite"):
        metrics.kl_to_prior(torch.full((9, 2), math.nan))


def known_decoder(system):
    """p(x|z) of four Bernoullis: σ(±4) depending on the quadrant of z, a sharp but known function."""

    def write(z, y=None):
        quadrant = 2 * (z[:, 0] > 0).long() + (z[:, 1] > 0).long()
        return 8.0 * F.one_hot(quadrant, 4).float() - 4

    system.write = write
    a = torch.sigmoid(torch.tensor(4.0, dtype=torch.float64))
    return math.log(float(0.25 * a**4 + 0.75 * a**2 * (1 - a) ** 2))  # every quadrant has a quarter of the prior


def test_quadrature_and_importance_weighting_know_the_likelihood():
    for name in ("avb", "vae"):
        system = build(small(system=name, data="four-points", latent_dim=2), (4,))
        truth = known_decoder(system)
        # an even number of points per side avoids the edges, where the trapezoid rule is ambiguous
        found = metrics.quadrature_log_likelihood(system, torch.eye(4), cells=301)
        assert error(found, torch.full((4,), truth).double()) < 1e-3
        system.proposal = lambda x: (torch.zeros(len(x), 2), torch.full((len(x), 2), 0.3))
        value = metrics.importance_log_likelihood(system, torch.eye(4).repeat(50, 1), draws=400)
        assert value == pytest.approx(truth, abs=0.02)  # 200 values with an error of 1/√400 each, and its bias
    with pytest.raises(ValueError, match="one or two dimensions, got 6"):
        metrics.quadrature_log_likelihood(build(small(), SHAPE), torch.zeros(1, *SHAPE))


@pytest.mark.trains
def test_importance_weighting_is_the_bound_at_one_draw_and_rises_from_there(digits):
    for name in ("vae", "cvae", "avb"):
        settings = small(system=name, steps=40)
        run = Run(build(settings, SHAPE), digits.train, settings, None, digits.train_labels if name == "cvae" else None)
        for _ in range(40):
            run.advance()
            run.record.clear()
        x, labels = digits.test[:200], digits.test_labels[:200] if name == "cvae" else None
        one, many = (metrics.importance_log_likelihood(run.system, x, labels, draws=k) for k in (1, 30))
        assert many > one
        if name != "avb":
            assert one == pytest.approx(metrics.lower_bound(run.system, x, labels), abs=1.0)  # other noise, 200 images
        assert many == metrics.importance_log_likelihood(run.system, x, labels, draws=30)
