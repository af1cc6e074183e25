"""Bridges and block substitution in C++: instruction sets, odd sizes, threads, every half-precision number."""

import math

import pytest
import torch
from helpers import assert_right_on_cpu, assert_threads_change_no_bit, normal, size

import ivfast
from ivfast import testing

pytest.importorskip("ivfast._C")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", testing.TOLERANCES, ids=str)
class TestEachInstructionSet:
    def test_bridges(self, isa, dtype):
        for _ in range(4):
            t = size(1, 6)
            shape = (size(1, 2), size(1, 40), t * size(1, 25))
            draw = normal(shape, shape)
            blockwise = lambda z, e, t=t: ivfast.blockwise_bridge(z, t, draws=e)  # noqa: E731
            radial = lambda z, e, t=t: ivfast.radial_bridge(z, t, draws=e)  # noqa: E731
            assert_right_on_cpu("blockwise_bridge", blockwise, draw, dtype, constants=1)
            assert_right_on_cpu("radial_bridge", radial, draw, dtype, constants=1)
            index = torch.randint(0, t, shape[:-1], dtype=(torch.int64, torch.int32)[size(0, 1)])
            substitute = lambda z, e, t=t, i=index: ivfast.block_substitute(z, t, i, draws=e)  # noqa: E731
            assert_right_on_cpu("block_substitute", substitute, draw, dtype, constants=1)


def test_the_number_of_threads_does_not_change_a_bit(threads):
    assert_threads_change_no_bit(lambda z, e: ivfast.radial_bridge(z, 3, draws=e), [(900, 1000)] * 2, threads)
    assert_threads_change_no_bit(lambda z, e: ivfast.blockwise_bridge(z, 4, draws=e), [(900, 1000)] * 2, threads)


def test_half_precision_passes_through_every_number(isa):
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        z = every.view(dtype).view(256, 256)
        out = ivfast.radial_bridge(z, 2, draws=torch.zeros_like(z))[1]
        exact = (z.float() * math.cos(math.pi / 4)).to(dtype)
        torch.testing.assert_close(out, exact, rtol=0, atol=0, equal_nan=True)
