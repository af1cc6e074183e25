"""SVGD bridge in Triton, interpreted if there is no GPU."""

import pytest
import torch
from helpers import same_bits, size

import ivfast
from ivfast import testing

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)
device = "cuda" if torch.cuda.is_available() else "cpu"  # interpreted on the CPU: tests/conftest.py
pytestmark = pytest.mark.usefixtures("poisoned")


def check(case, dtype=torch.float32):
    testing.check(case, testing.inputs(case, dtype, device=device), "triton")


def bridge_case(n, d, t=3, *, iterations=2, batch=(), slack=1.0):
    def draw(generator):
        shape = (*batch, n, d)
        draws = torch.randn((t - 1) * iterations + 1, *shape, generator=generator, dtype=torch.float64)
        return torch.randn(shape, generator=generator, dtype=torch.float64), draws

    def bridge(z, draws):
        return ivfast.svgd_bridge(z, t, iterations=iterations, step_size=0.7, scale=2.0, draws=draws)

    return testing.Case("svgd_bridge", f"{(*batch, n, d)}", bridge, draw, slack=slack, constants=1)


class TestBridge:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("n", "d"), [(1, 1), (2, 13), (17, 16), (32, 5)])
    def test_one_program(self, n, d, dtype):
        check(bridge_case(n, d, size(1, 3), iterations=size(1, 2), batch=(size(1, 2),)), dtype)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(("n", "d"), [(66, 5), (9, 17), (64, 16)])
    def test_one_launch_after_the_other(self, n, d, dtype):
        check(bridge_case(n, d, 2, iterations=size(1, 2), batch=(size(1, 2),)), dtype)

    def test_both_ways_agree(self, monkeypatch):
        from ivfast.kernels import svgd_bridge

        z, draws = torch.randn(2, 20, 7, device=device), torch.randn(4, 2, 20, 7, device=device)
        one = svgd_bridge.forward(z, draws, 2, 3, 1.0, 100.0, 0.1)
        monkeypatch.setattr(svgd_bridge, "SMALL_N", 0)
        other = svgd_bridge.forward(z, draws, 2, 3, 1.0, 100.0, 0.1)
        for a, b in zip(one, other, strict=True):
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            assert testing.error(a, b) <= testing.TOLERANCES[torch.float32]

    def test_equal_particles(self):
        # every distance is 0: h = scale, and φ is the score
        z, draws = torch.full((2, 20, 3), 0.3, device=device), torch.zeros(2, 2, 20, 3, device=device)
        with ivfast.use("triton"):
            bridges = ivfast.svgd_bridge(z, 2, iterations=1, step_size=0.5, draws=draws)
        assert torch.equal(bridges[0], z)
        assert testing.error(bridges[1], 0.5 * z) <= 1e-6

    def test_strides_and_no_sets(self):
        z, draws = torch.randn(5, 20, device=device).mT.requires_grad_(), torch.randn(3, 5, 20, device=device).mT
        with ivfast.use("triton"):
            ours = ivfast.svgd_bridge(z, 2, draws=draws)
            (dz,) = torch.autograd.grad(ours.square().sum(), z)
            assert ivfast.svgd_bridge(torch.empty(0, 4, 3, device=device), 2).shape == (3, 0, 4, 3)
        with ivfast.use("reference"):
            theirs = ivfast.svgd_bridge(z.double(), 2, draws=draws.double())
        assert testing.error(ours, theirs) <= testing.TOLERANCES[torch.float32]
        assert testing.error(dz, torch.autograd.grad(theirs.square().sum(), z)[0]) <= testing.TOLERANCES[torch.float32]

    def test_every_run_gives_the_same_bits(self):
        case = bridge_case(20, 7)
        tensors = testing.inputs(case, torch.float32, device=device)
        results = []
        for _ in range(2):
            with ivfast.use("triton"):
                value, gradients = testing.value_and_gradients(case, tensors)
            results.append([*value, *gradients])
        assert same_bits(results)
