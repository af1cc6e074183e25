"""Reconstruction losses equal PyTorch's, on fresh random inputs."""

import math

import torch
import torch.nn.functional as F

import ivfast
from ivfast.testing import error

DOUBLE = torch.float64


def normal(*shape, dtype=DOUBLE):
    return torch.randn(*shape, dtype=dtype)


def test_reconstruction_losses_are_torchs():
    x, t = normal(5, 3, 4, 4), torch.rand(5, 3, 4, 4, dtype=DOUBLE)
    torchs = {"l2": F.mse_loss, "l1": F.l1_loss, "bce": F.binary_cross_entropy_with_logits}
    for kind, function in torchs.items():
        expected = function(x, t, reduction="none").flatten(1).sum(1)
        assert error(ivfast.reconstruction_loss(x, t, kind=kind), expected) < 1e-12


def test_certain_and_right_logits_cost_nothing():
    x = torch.tensor([[math.inf, -math.inf], [math.inf, math.inf]], requires_grad=True)
    t = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    loss = ivfast.reconstruction_loss(x, t, kind="bce")
    assert loss[0] == 0
    assert loss[1] > 1e38
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    assert torch.equal(gradient, torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
