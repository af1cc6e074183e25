"""Reconstruction losses in C++: instruction sets, odd sizes, threads, extremes."""

import math

import pytest
import torch
from helpers import assert_right_on_cpu, assert_threads_change_no_bit, normal, size

import ivfast
from ivfast import testing

pytest.importorskip("ivfast._C")

NAN, INF = math.nan, math.inf


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", testing.TOLERANCES, ids=str)
class TestEachInstructionSet:
    @pytest.mark.parametrize("kind", ["l2", "l1", "bce"])
    def test_reconstruction(self, isa, kind, dtype):
        for elements in (1, size(2, 70), 5000):
            shape = (size(1, 5), elements)
            loss = lambda x, t: ivfast.reconstruction_loss(x, t, kind=kind)  # noqa: E731
            assert_right_on_cpu("reconstruction_loss", loss, normal(shape, shape), dtype)


def test_the_number_of_threads_does_not_change_a_bit(threads):
    loss = lambda x, t: ivfast.reconstruction_loss(x, t, kind="bce")  # noqa: E731
    assert_threads_change_no_bit(loss, [(300, 3000)] * 2, threads)


@pytest.mark.parametrize("target", [0.0, 0.5, 1.0])
def test_bce_of_any_logit(isa, target):
    for value in (-INF, -1e4, -100.0, -20.0, -3.0, 0.0, 1e-3, 3.0, 20.0, 1e4, INF, NAN):
        x = torch.full((2, 19), value, requires_grad=True)
        exact = x.detach().double().requires_grad_()
        losses = [ivfast.reconstruction_loss(v, torch.full_like(v, target), kind="bce") for v in (x, exact)]
        if math.isfinite(value):
            torch.testing.assert_close(losses[0], losses[1].float(), rtol=5e-6, atol=1e-38)
        gradients = [torch.autograd.grad(loss.sum(), v)[0] for loss, v in zip(losses, (x, exact), strict=True)]
        # σ − t: rounded at the size of 1
        torch.testing.assert_close(gradients[0], gradients[1].float(), rtol=0, atol=2e-7, equal_nan=True)
    certain = torch.tensor([[INF, -INF]])
    assert ivfast.reconstruction_loss(certain, torch.tensor([[1.0, 0.0]]), kind="bce") == 0
