"""Bridges and block substitution in Triton, interpreted if there is no GPU."""

import pytest
import torch
from helpers import assert_close, batch, cases, normal, size

import ivfast
from ivfast import testing
from ivfast.ops import bridge
from ivfast.testing import Case

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float64, torch.float32, *HALF)
device = "cuda" if torch.cuda.is_available() else "cpu"  # interpreted on the CPU: tests/conftest.py
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings(
        "ignore:(overflow|invalid value) encountered:RuntimeWarning"
    ),  # in the interpreter's NumPy
]


def check(case: Case, dtype: torch.dtype = torch.float32):
    testing.check(case, testing.inputs(case, dtype, device=device), "triton")


dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def bridge_gradients(function, z, draws):
    """The bridges, and ∂/∂z of their sum weighted by a strided array."""
    out = function(z, draws)
    weights = torch.linspace(-1, 1, out.numel(), device=device, dtype=torch.float64).view(out.shape[::-1]).to(z.dtype)
    return out, torch.autograd.grad(out, z, weights.permute(*range(out.dim())[::-1]))[0]


BRIDGES = {
    "blockwise": lambda t: lambda z, e: ivfast.blockwise_bridge(z, t, draws=e),
    "radial": lambda t: lambda z, e: ivfast.radial_bridge(z, t, draws=e),
    "substitute": lambda t: lambda z, e: ivfast.block_substitute(z, t, testing._cycle(z, t), draws=e),
}
kinds = pytest.mark.parametrize("kind", BRIDGES)


class TestBridges:
    @dtypes
    @cases("blockwise_bridge")
    def test_blockwise(self, case, dtype):
        check(case, dtype)

    @dtypes
    @cases("radial_bridge")
    def test_radial(self, case, dtype):
        check(case, dtype)

    @dtypes
    @cases("block_substitute")
    def test_substitute(self, case, dtype):
        check(case, dtype)

    @kinds
    @dtypes
    @pytest.mark.parametrize("t", [1, 2, 3, 7])
    def test_random_sizes(self, kind, t, dtype):
        shape = (*batch(), size(1, 70), size(1, 20) * t)
        check(Case(kind, str(shape), BRIDGES[kind](t), normal(shape, shape), constants=1), dtype)

    @kinds
    def test_one_dimension_and_more_than_a_program_holds(self, kind):
        for shape, t in (((1, 1), 1), ((2049, 1), 1), ((1, 2050), 5), ((3, 1025), 25)):
            check(Case(kind, str(shape), BRIDGES[kind](t), normal(shape, shape), constants=1))

    @kinds
    def test_strides(self, kind):
        z, draws = (torch.randn(2, 12, 9, device=device).mT for _ in range(2))
        z = z.requires_grad_()
        with ivfast.use("triton"):
            ours = bridge_gradients(BRIDGES[kind](3), z, draws)
        with ivfast.use("reference"):
            theirs = bridge_gradients(BRIDGES[kind](3), z.double(), draws.double())
        for a, b in zip(ours, theirs, strict=True):
            assert_close(a, b)

    @kinds
    def test_expanded_gradient(self, kind):
        z, draws = (torch.randn(5, 6, device=device) for _ in range(2))
        z.requires_grad_()
        with ivfast.use("triton"):
            (ours,) = torch.autograd.grad(BRIDGES[kind](3)(z, draws).sum(), z)
        with ivfast.use("reference"):
            (theirs,) = torch.autograd.grad(BRIDGES[kind](3)(z.double(), draws.double()).sum(), z)
        assert_close(ours, theirs)

    @dtypes
    @pytest.mark.parametrize("t", [1, 2, 3, 50])
    def test_ends_are_copies_and_the_circle_is_round(self, t, dtype):
        z, draws = (torch.randn(4, 3, device=device).to(dtype) for _ in range(2))
        z[0, 0], draws[0, 0], z[1, 1], draws[1, 1] = float("inf"), 1.0, -0.0, 2.0
        with ivfast.use("triton"):
            out = ivfast.radial_bridge(z, t, draws=draws)
            assert torch.equal(out[0], z)
            assert torch.equal(out[t], draws)
            assert out[0, 1, 1].signbit()
            # cos² + sin² = 1 for z = (1, 0), draws = (0, 1)
            z, draws = torch.eye(2, device=device, dtype=dtype)
            points = ivfast.radial_bridge(z[None], t, draws=draws[None]).double()
        assert float((points.square().sum(-1) - 1).abs().max()) <= 2 * torch.finfo(dtype).eps

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    def test_many_angles_within_two_roundings(self, dtype):
        # numbers of at most 1
        z = torch.ones(1, 1, dtype=dtype, device=device)
        with ivfast.use("triton"):
            cos = ivfast.radial_bridge(z, 777, draws=torch.zeros_like(z)).flatten().double().cpu()
            sin = ivfast.radial_bridge(torch.zeros_like(z), 777, draws=z).flatten().double().cpu()
        angle = torch.arange(778, dtype=torch.float64) / 777 * torch.pi / 2
        assert float((cos - angle.cos()).abs().max()) <= 2 * torch.finfo(dtype).eps
        assert float((sin - angle.sin()).abs().max()) <= 2 * torch.finfo(dtype).eps

    @pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
    def test_substitute_leaves_rows_of_other_indices(self, index_dtype):
        z, draws = (torch.randn(7, 6, device=device) for _ in range(2))
        index = torch.tensor([0, 2, -1, 3, 1, 2**31 - 1, -(2**31)], dtype=index_dtype, device=device)
        expected = z.view(7, 3, 2).clone()
        for row, block in ((0, 0), (1, 2), (4, 1)):
            expected[row, block] = draws.view(7, 3, 2)[row, block]
        with ivfast.use("triton"):
            assert torch.equal(bridge._block_substitute(z, draws, index, 3), expected.view(7, 6))
            kept = bridge._block_substitute_backward(torch.ones(7, 6, device=device), index, 3)
        assert kept.sum() == 7 * 6 - 3 * 2
        if index_dtype == torch.int64:
            with ivfast.use("triton"):
                assert torch.equal(bridge._block_substitute(z, draws, index.new_full((7,), 2**32 + 1), 3), z)

    def test_what_is_replaced_leaks_nothing(self):
        nan = torch.full((4, 6), float("nan"), device=device)
        ones = torch.ones_like(nan)
        index = torch.tensor([0, 1, 2, 1], device=device)
        with ivfast.use("triton"):
            for z, draws in ((nan, ones), (ones, nan)):
                out = bridge._block_substitute(z, draws, index, 3)
                assert out.isnan().sum() == (4 * 4 if z is nan else 4 * 2)
                assert bridge._blockwise(z, draws, 3).isnan().sum() == 4 * 12
            grad = ones.expand(4, 4, 6).clone()
            grad[1:, :, :2] = float("nan")  # replaced from T_1 on
            assert torch.equal(bridge._blockwise_backward(grad, 3)[:, 0], torch.ones(4, device=device))
            grad = torch.where(torch.arange(6, device=device) // 2 == index[:, None], nan, ones)
            assert not bridge._block_substitute_backward(grad, index, 3).isnan().any()
            assert bridge._radial(nan, ones, 3)[:3].isnan().all()
            assert bridge._radial(ones, nan, 3)[1:].isnan().all()

    @kinds
    def test_no_sets(self, kind):
        z = torch.empty(0, 4, 6, device=device, requires_grad=True)
        with ivfast.use("triton"):
            out = BRIDGES[kind](3)(z, torch.empty(0, 4, 6, device=device))
            assert out.shape[-3:] == z.shape
            assert torch.autograd.grad(out.sum(), z)[0].shape == z.shape
