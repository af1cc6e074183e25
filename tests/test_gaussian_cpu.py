"""Gaussian posteriors in C++: instruction sets, odd sizes, threads, extremes."""

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
    def test_gaussians(self, isa, dtype):
        for scale in (1e-3, 0.5, 2.0):
            shape = (size(1, 3), size(1, 5), size(1, 140))
            draw = normal(shape, shape, shape, scale=scale)
            assert_right_on_cpu(
                "reparameterize", lambda m, v, e: ivfast.reparameterize(m, v, draws=e), draw, dtype, constants=1
            )
            assert_right_on_cpu("gaussian_kl", ivfast.gaussian_kl, normal(shape, shape, scale=scale), dtype)


def test_the_number_of_threads_does_not_change_a_bit(threads):
    def both(m, v, e):
        return torch.cat([x.flatten() for x in ivfast.reparameterize(m, v, draws=e)])

    assert_threads_change_no_bit(both, [(3000, 300)] * 3, threads)


def test_kl_of_any_variance(isa):
    for value in (-INF, -200.0, -110.0, -90.0, -50.0, -0.51, -0.49, -1e-3, 0.0, 1e-4, 0.3, 0.5, 0.51, 5.0, 80.0, NAN):
        logvar = torch.full((3, 17), value)
        ours = ivfast.gaussian_kl(torch.zeros_like(logvar), logvar)
        theirs = ivfast.gaussian_kl(torch.zeros(3, 17).double(), logvar.double()).float()
        torch.testing.assert_close(ours, theirs, rtol=5e-6, atol=0, equal_nan=True)
