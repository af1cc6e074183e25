"""The exponential ELBO equals Soft-IntroVAE's and is finite."""

import math

import pytest
import torch

import ivfast
from ivfast.testing import error

DOUBLE = torch.float64


def test_exp_elbo_is_soft_intro_vaes():
    """The form in the published code: (1/2) mean exp(−2 s (β_rec rec + β_kl KL)) at α = 2."""
    rec, kl = torch.rand(64, dtype=DOUBLE) * 50, torch.rand(64, dtype=DOUBLE) * 50
    ours = ivfast.exp_elbo_loss(rec, kl, scale=1 / 64, beta_reconstruction=0.2, beta_kl=0.9)
    assert error(ours, 0.5 * torch.exp(-2 / 64 * (0.2 * rec + 0.9 * kl)).mean()) < 1e-12


@pytest.mark.parametrize("device_dtype", [torch.float32, DOUBLE], ids=str)
def test_exp_elbo_is_finite_however_far_the_sample(device_dtype):
    rec = torch.tensor([0.0, 1e30, math.inf], dtype=device_dtype, requires_grad=True)
    kl = torch.tensor([1e9, 0.0, 0.0], dtype=device_dtype, requires_grad=True)
    loss = ivfast.exp_elbo_loss(rec, kl, beta_kl=0.0)
    assert float(loss.detach()) == pytest.approx(1 / 6)
    for gradient in torch.autograd.grad(loss, (rec, kl)):
        assert gradient.isfinite().all()
    far = torch.full((4,), -1e6, dtype=device_dtype, requires_grad=True)
    loss = ivfast.exp_elbo_loss(far, torch.zeros_like(far))
    assert loss.isfinite()
    assert torch.equal(torch.autograd.grad(loss, far)[0], torch.zeros_like(far))
