"""What S3 says about importance weights, on fresh random inputs."""

import torch

import ivfast
from ivfast.testing import error

DOUBLE = torch.float64


def normal(*shape, dtype=DOUBLE):
    return torch.randn(*shape, dtype=dtype)


def test_importance_weights_are_the_softmax_of_the_logits():
    """w = D/(1 − D) = exp(logit), normalised; held constant in the gradient (S3 Eq. 22)."""
    l = normal(11).requires_grad_()
    d = torch.sigmoid(l)
    w = (d / (1 - d)).detach()
    expected = -(w / w.sum() * torch.log(d)).sum()
    loss = ivfast.importance_weighted_loss(l)
    assert error(loss, expected) < 1e-12
    assert error(torch.autograd.grad(loss, l)[0], torch.autograd.grad(expected, l)[0]) < 1e-12


def test_importance_weighted_loss_of_equal_logits_is_the_non_saturating_one():
    l = torch.full((13,), float(torch.randn(())), dtype=DOUBLE, requires_grad=True)
    plain = torch.nn.functional.softplus(-l).mean()
    loss = ivfast.importance_weighted_loss(l)
    assert error(loss, plain) < 1e-12
    assert error(torch.autograd.grad(loss, l)[0], torch.autograd.grad(plain, l)[0]) < 1e-12
