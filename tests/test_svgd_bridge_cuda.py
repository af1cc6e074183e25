"""SVGD bridge in CUDA C++, run on the CPU by tests/simt."""

import pytest
import torch
from helpers import by_cuda, same_bits_in_every_schedule, size

import ivfast
from ivfast import testing
from ivfast.ops.svgd_bridge import svgd_bridge_reference
from ivfast.testing import Case

HALF = (torch.bfloat16, torch.float16)


def matches(case: Case, dtype: torch.dtype = torch.float32):
    testing.check(case, testing.inputs(case, dtype), "cuda")


def bridge_case(n, d, t=3, iterations=2, *, scale=100.0, batch=(), transform=lambda z: z, slack=1.0) -> Case:
    def draw(generator):
        def normal(*leading):
            return torch.randn(*leading, *batch, n, d, generator=generator, dtype=torch.float64)

        return transform(normal()), normal((t - 1) * iterations + 1)

    def bridge(z, draws):
        return ivfast.svgd_bridge(z, t, iterations=iterations, scale=scale, draws=draws)

    return Case("svgd_bridge", f"{(*batch, n, d)}", bridge, draw, constants=1, slack=slack)


@pytest.mark.usefixtures("simt")
class TestBridge:
    @pytest.mark.parametrize("n", [1, 2, 3, 17, 64, 100, 128, 200, 256])
    def test_every_output(self, n):
        for d in (1, 3, 16, 64, 128):
            z, draws = torch.randn(n, d), torch.randn(4, n, d)
            arguments = 4, 1, 1.0, 5.0, 0.1  # t, iterations, step_size, scale, noise
            ours = torch.ops.ivfast.svgd_bridge.cuda(z, draws, *arguments)
            theirs = svgd_bridge_reference(z.double(), draws.double(), *arguments)
            for a, b in zip(ours, theirs, strict=True):
                assert a.shape == b.shape
                assert testing.error(a, b) <= testing.TOLERANCES[torch.float32]

    @pytest.mark.parametrize("n", [1, 2, 3, 17, 64, 100, 128, 200, 256])
    def test_gradients(self, n):
        for d in (1, 3, 16, 64, 128) if n < 200 else (1, 16, 64, 128)[size(0, 1) :: 2]:
            matches(bridge_case(n, d))
            matches(bridge_case(n, d, scale=3.0))

    @pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
    def test_random_sizes(self, dtype):
        for _ in range(4):
            batch = [size(1, 3) for _ in range(size(1, 2))]
            matches(bridge_case(size(1, 80), size(1, 128), size(1, 4), size(1, 3), batch=batch), dtype)

    def test_bridges_that_are_no_whole_chunk_of_the_kernel(self, simt):
        for n, d in ((130, 128), (77, 97), (255, 66)):
            matches(bridge_case(n, d, t=2))

    def test_a_tight_cluster_far_from_the_origin(self):
        # with mean 10, float32 leaves a relative error of 1e-4 in distances about 0.01, and so in k and 2/h
        matches(bridge_case(60, 8, scale=1.0, transform=lambda z: 10 + z / 100, slack=10))

    def test_duplicates_and_equal_particles(self):
        matches(bridge_case(40, 6, transform=lambda z: z[:20].repeat(2, 1)))
        matches(bridge_case(40, 6, t=2, transform=lambda z: z[:1].repeat(40, 1)))

    @pytest.mark.parametrize(("n", "d"), [(64, 16), (90, 70), (140, 9)])
    def test_every_schedule_gives_the_same_bits(self, simt, n, d):
        same_bits_in_every_schedule(simt, by_cuda(bridge_case(n, d, batch=(2,))))

    def test_strides(self):
        z, draws = torch.randn(3, 20, 35).mT.requires_grad_(), torch.randn(3, 5, 20, 35).mT.movedim(1, 0)
        weights = torch.randn(35, 4, 3, 20).permute(1, 2, 0, 3)
        results = []
        for copy in (lambda x: x, torch.Tensor.contiguous):
            with ivfast.use("cuda"):
                bridge = ivfast.svgd_bridge(copy(z), 3, draws=copy(draws))
                results.append((bridge, *torch.autograd.grad(bridge, z, copy(weights))))
        assert results[0][0].is_contiguous()
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    def test_no_sets(self):
        with ivfast.use("cuda"):
            z = torch.empty(0, 4, 3, requires_grad=True)
            bridge = ivfast.svgd_bridge(z, 3)
            assert bridge.shape == (4, 0, 4, 3)
            assert torch.autograd.grad(bridge.sum(), z)[0].shape == z.shape

    @pytest.mark.parametrize("shape", [(257, 3), (5, 129)])
    def test_what_it_does_not_serve_is_refused(self, shape):
        with ivfast.use("cuda"), pytest.raises(RuntimeError, match=r"n <= 256 and d <= 128, got n = \d+, d = \d+"):
            ivfast.svgd_bridge(torch.randn(shape), 3)
