"""Bridges and block substitution in CUDA C++, run on the CPU by tests/simt."""

import pytest
import torch
from helpers import cases, misaligned

import ivfast
from ivfast import testing
from ivfast.testing import Case

HALF = (torch.bfloat16, torch.float16)
pytestmark = pytest.mark.usefixtures("simt")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)


def matches(case: Case, dtype: torch.dtype = torch.float32):
    testing.check(case, testing.inputs(case, dtype), "cuda")


BRIDGES = {"blockwise": ivfast.blockwise_bridge, "radial": ivfast.radial_bridge}
SHAPES = [(1, 1), (3, 6), (64, 16), (7, 13), (2, 3, 5, 12), (33, 128), (2, 700)]


def bridge_case(kind, shape, t) -> Case:
    def draw(generator):
        return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))

    return Case(kind, f"{shape} {t}", lambda z, e: BRIDGES[kind](z, t, draws=e), draw, constants=1)


def substitute_case(shape, k, index_dtype=torch.int64) -> Case:
    index = torch.randint(0, k, shape[:-1], dtype=index_dtype)

    def draw(generator):
        return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))

    def function(z, draws):
        return ivfast.block_substitute(z, k, index, draws=draws)

    return Case("block_substitute", f"{shape} {k}", function, draw, constants=1)


def divisors(d: int) -> list[int]:
    return [t for t in range(1, d + 1) if d % t == 0]


class TestBridges:
    @dtypes
    @cases("blockwise_bridge", "radial_bridge", "block_substitute")
    def test_cases(self, case, dtype):
        matches(case, dtype)

    @dtypes
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_sizes(self, shape, dtype):
        for t in divisors(shape[-1])[:: 3 if shape[-1] > 100 else 1]:
            matches(bridge_case("blockwise", shape, t), dtype)
            matches(substitute_case(shape, t, torch.int32 if t % 2 else torch.int64), dtype)
        for t in (1, 2, 5):
            matches(bridge_case("radial", shape, t), dtype)

    @pytest.mark.parametrize("t", [63, 64, 65, 200])
    def test_many_angles(self, t):
        matches(bridge_case("radial", (3, 4), t))
        z, draws = torch.randn(3, 4), torch.randn(3, 4)
        draws[0] = 0  # so that any remainder of z shows
        bridges = torch.ops.ivfast.radial_bridge.cuda(z, draws, t)
        assert torch.equal(bridges[0], z)
        assert torch.equal(bridges[t], draws)

    def test_what_is_replaced_leaks_no_nan(self):
        for shape in ((5, 12), (5, 6), (3, 35)):
            d = shape[-1]
            z, draws = torch.randn(shape), torch.randn(shape)
            half = d // 2 if d % 2 == 0 else d // 5  # the first block
            t = d // half
            z[:, :half] = float("nan")
            bridges = torch.ops.ivfast.blockwise_bridge.cuda(z, draws, t)
            assert bridges[1:].isfinite().all()
            grad = torch.randn(t + 1, *shape)
            grad[1:, :, :half] = float("nan")
            assert torch.ops.ivfast.blockwise_bridge_backward.cuda(grad, t).isfinite().all()
            index = torch.zeros(shape[0], dtype=torch.int64)
            assert torch.ops.ivfast.block_substitute.cuda(z, draws, index, t).isfinite().all()
            assert torch.ops.ivfast.block_substitute_backward.cuda(z, index, t).isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
    def test_an_index_outside_leaves_the_row(self, dtype):
        z, draws = torch.randn(4, 12), torch.randn(4, 12)
        index = torch.tensor([-1, 3, torch.iinfo(dtype).max, torch.iinfo(dtype).min], dtype=dtype)
        assert torch.equal(torch.ops.ivfast.block_substitute.cuda(z, draws, index, 3), z)
        assert torch.equal(torch.ops.ivfast.block_substitute_backward.cuda(z, index, 3), z)

    @dtypes
    def test_strides_and_places_off_a_boundary(self, dtype):
        def results(copy):
            z, draws = (copy(x.mT[..., ::2]) for x in inputs[:2])
            grad = copy(inputs[2][:, :, :1].expand(4, 2, 6, 8))
            index = copy(inputs[3][:, ::2])
            ops = torch.ops.ivfast
            yield ops.blockwise_bridge.cuda(z, draws, 4)
            yield ops.radial_bridge.cuda(z, draws, 4)
            yield ops.block_substitute.cuda(z, draws, index, 4)
            yield ops.block_substitute_backward.cuda(draws, index, 4)
            yield ops.radial_bridge_backward.cuda(grad, 3)
            yield ops.blockwise_bridge_backward.cuda(grad[:3], 2)

        inputs = [torch.randn(2, 16, 6).to(dtype) for _ in range(2)]
        inputs += [torch.randn(4, 2, 6, 8).to(dtype), torch.randint(0, 4, (2, 12))]
        theirs = list(results(torch.Tensor.contiguous))
        for copy in (lambda x: x, misaligned):
            for a, b in zip(results(copy), theirs, strict=True):
                assert a.is_contiguous()
                assert torch.equal(a, b)

    def test_no_codes(self):
        with ivfast.use("cuda"):
            for shape in ((0, 3, 4), (2, 0, 1, 4)):
                z, draws = torch.empty(shape, requires_grad=True), torch.empty(shape)
                for bridge in BRIDGES.values():
                    out = bridge(z, 2, draws=draws)
                    assert out.shape == (3, *shape)
                    assert torch.autograd.grad(out.sum(), z)[0].shape == shape
                index = torch.zeros(shape[:-1], dtype=torch.int64)
                out = ivfast.block_substitute(z, 2, index, draws=draws)
                assert torch.autograd.grad(out.sum(), z)[0].shape == shape

    def test_float64_is_refused(self):
        with ivfast.use("cuda"), pytest.raises(RuntimeError, match="takes float32, bfloat16 or float16, got Double"):
            ivfast.radial_bridge(torch.randn(6, 3).double(), 2)
