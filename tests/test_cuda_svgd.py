"""SVGD in CUDA C++, run on the CPU by tests/simt: median bandwidth, direction and bridge."""

import math

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


# Median bandwidth


def median_case(n, d, convention="liu-wang", *, batch=(), whole=None) -> Case:
    """Normal particles, or whole numbers below `whole` and their opposites: centred as they are, at distances that are
    exact, so that ties are ties in every arithmetic."""

    def draw(generator):
        if whole is None:
            return (torch.randn(*batch, n, d, generator=generator, dtype=torch.float64),)
        half = torch.randint(whole, (*batch, (n + 1) // 2, d), generator=generator).double()
        return (torch.cat([half[..., : n // 2, :], 0 * half[..., : n % 2, :], -half[..., : n // 2, :]], -2),)

    def median(x):
        return ivfast.median_bandwidth(x, convention=convention)

    return Case("median_bandwidth", f"{convention} {(*batch, n, d)}", median, draw)


def middles(x: torch.Tensor, full: bool) -> torch.Tensor:
    return torch.ops.ivfast.median_bandwidth.cuda(x, full, True, 1.0)[1]


def expected_middles(x: torch.Tensor, full: bool) -> torch.Tensor:
    """Of one-dimensional particles `[n, 1]`, whose distances in float32 are what every order of operations gives."""
    d2 = (x - x.mT).square()
    values = d2.flatten() if full else d2[tuple(torch.triu_indices(*d2.shape, 1))]
    values = values.sort().values
    return values[[(len(values) - 1) // 2, len(values) // 2]]


@pytest.mark.usefixtures("simt")
class TestMedian:
    @pytest.mark.parametrize("n", [1, 2, 3, 17, 64, 100, 128, 200, 256])
    @pytest.mark.parametrize("convention", ["liu-wang", "blackjax", "numpyro"])
    def test_ties(self, n, convention):
        for d in (1, 3, 16, 64, 128):
            matches(median_case(n, d, convention, whole=8))

    @pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
    @pytest.mark.parametrize("convention", ["liu-wang", "blackjax", "numpyro"])
    def test_random_sizes(self, convention, dtype):
        # of more pairs two may be so close that float32 puts them in another order, and the gradient in another place
        batch = [size(1, 3) for _ in range(size(1, 2))]
        matches(median_case(size(1, 20), size(1, 200), convention, batch=batch), dtype)

    @pytest.mark.parametrize("n", [64, 128, 256])
    def test_values_of_many_pairs(self, n):
        x = torch.randn(n, 70)
        with ivfast.use("reference"):
            expected = ivfast.median_bandwidth(x.double())
        with ivfast.use("cuda"):
            assert testing.error(ivfast.median_bandwidth(x), expected) <= testing.TOLERANCES[torch.float32]

    @pytest.mark.parametrize("full", [False, True])
    def test_order_statistics_are_exact(self, full):
        def check(x):
            assert torch.equal(middles(x, full), expected_middles(x, full)), x

        for _ in range(60):
            check(torch.randn(size(2, 12), 1))
        for n in (40, 64, 128, 129, 256):
            check(torch.randn(n, 1))
            check(torch.randn(n, 1).exp2())
            check((torch.randn(n, 1) * 20).exp2())  # from 2^-120 to 2^120
            check(1 + torch.randint(3, (n, 1)) * 2.0**-20)
            check(torch.cat([torch.rand(n // 2, 1) * 1e-6, 1 + torch.rand(n - n // 2, 1) * 1e-6]))
            check(torch.full((n, 1), 0.5).index_fill(0, torch.tensor([n - 1]), 1e18))

    @pytest.mark.parametrize("convention", ["liu-wang", "blackjax", "numpyro"])
    def test_a_median_of_zero_gives_way_to_the_spread(self, convention):
        x = torch.zeros(30, 5)
        x[7] = 3.0
        for particles in (x, x[:1], torch.ones(9, 2), torch.randn(1, 4).expand(100, 4)):
            with ivfast.use("reference"):
                expected = ivfast.median_bandwidth(particles.double(), convention=convention)
            particles = particles.clone().requires_grad_()
            with ivfast.use("cuda"):
                h = ivfast.median_bandwidth(particles, convention=convention)
                (gradient,) = torch.autograd.grad(h, particles)
            assert testing.error(h, expected) <= testing.TOLERANCES[torch.float32]
            assert torch.equal(gradient, torch.zeros_like(particles))

    def test_particles_that_are_no_numbers(self):
        x = torch.randn(40, 3)
        x[5, 1] = math.nan
        h, found = torch.ops.ivfast.median_bandwidth.cuda(x, False, False, 1.0)
        assert h == 1
        assert found.isnan().all()

    def test_a_gradient_at_no_pair_is_no_number(self):
        x, foreign = torch.randn(10, 3), torch.tensor([1.0, 1.0]) / 3
        gradient = torch.ops.ivfast.median_bandwidth_backward.cuda(torch.ones(()), x, foreign, True, 1.0)
        assert gradient.isnan().all()

    def test_strides(self):
        x = torch.randint(9, (3, 20, 35)).float().mT
        grad = torch.rand(()).expand(3)
        h, found = torch.ops.ivfast.median_bandwidth.cuda(x, False, False, 2.0)
        assert h.is_contiguous()
        assert found.is_contiguous()
        packed = torch.ops.ivfast.median_bandwidth.cuda(x.contiguous(), False, False, 2.0)
        assert torch.equal(h, packed[0])
        assert torch.equal(found, packed[1])
        ours = torch.ops.ivfast.median_bandwidth_backward.cuda(grad, x, found, False, 2.0)
        theirs = torch.ops.ivfast.median_bandwidth_backward.cuda(grad.clone(), x.contiguous(), found, False, 2.0)
        assert torch.equal(ours, theirs)

    @pytest.mark.parametrize(("n", "d"), [(50, 16), (100, 70), (200, 3)])
    def test_every_schedule_gives_the_same_bits(self, simt, n, d):
        same_bits_in_every_schedule(simt, by_cuda(median_case(n, d, "blackjax", batch=(2,), whole=9)))

    def test_no_sets(self):
        with ivfast.use("cuda"):
            x = torch.empty(0, 4, 3, requires_grad=True)
            h = ivfast.median_bandwidth(x)
            assert h.shape == (0,)
            assert torch.autograd.grad(h.sum(), x)[0].shape == x.shape

    def test_what_it_does_not_serve_is_refused(self):
        with ivfast.use("cuda"):
            with pytest.raises(RuntimeError, match=r"n <= 256 .*, got n = 257, d = 3"):
                ivfast.median_bandwidth(torch.randn(257, 3))
            with pytest.raises(RuntimeError, match=r"takes float32, bfloat16 or float16, got Double"):
                ivfast.median_bandwidth(torch.randn(5, 3, dtype=torch.float64))


# Direction


def direction_case(n, d, *, batch=(), score=True, shift=0.0, slack=1.0) -> Case:
    def draw(generator):
        def normal():
            return torch.randn(*batch, n, d, generator=generator, dtype=torch.float64)

        h = (torch.rand(batch, generator=generator, dtype=torch.float64) + 0.5) * d
        return (normal() + shift, normal(), h) if score else (normal() + shift, h)

    def direction(x, *rest):
        return ivfast.svgd_direction(x, *rest[:-1], bandwidth=rest[-1])

    return Case("svgd_direction", f"{(*batch, n, d)}", direction, draw, slack=slack)


class TestDirection:
    @pytest.mark.parametrize("seed", [0, 1])
    @pytest.mark.parametrize(
        ("n", "d"),
        [(1, 1), (2, 3), (31, 16), (32, 32), (33, 33), (64, 1), (64, 16), (64, 64), (100, 65), (256, 3), (256, 128)],
    )
    def test_edges(self, simt, n, d, seed):
        simt.schedule(seed + 1000 * size(0, 1 << 20))
        matches(direction_case(n, d, score=bool(seed)))

    @pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
    @pytest.mark.parametrize("score", [False, True])
    def test_random_sizes(self, simt, dtype, score):
        batch = [size(1, 3) for _ in range(size(1, 2))]
        matches(direction_case(size(1, 80), size(1, 128), batch=batch, score=score), dtype)

    def test_data_far_from_the_origin(self, simt):
        # inputs of mean 10 leave float32 ten times less of each difference
        matches(direction_case(90, 20, shift=10.0, slack=10))

    def test_equal_particles_follow_the_score_alone(self, simt):
        x, score = torch.randn(1, 7).expand(40, 7), torch.randn(40, 7)
        with ivfast.use("cuda"):
            phi = ivfast.svgd_direction(x, score, bandwidth=1.0)
        assert testing.error(phi, score.double().mean(0).expand(40, 7)) <= testing.TOLERANCES[torch.float32]

    def test_every_schedule_gives_the_same_bits(self, simt):
        same_bits_in_every_schedule(simt, by_cuda(direction_case(70, 33, batch=(2,))))

    def test_strided_inputs_and_expanded_gradient(self, simt):
        x, score = (torch.randn(3, 20, 35).mT.requires_grad_() for _ in range(2))
        h = torch.rand(()).expand(3) + 4
        with ivfast.use("cuda"):
            ours = torch.autograd.grad(ivfast.svgd_direction(x, score, bandwidth=h).sum(), (x, score))
        with ivfast.use("reference"):
            phi = ivfast.svgd_direction(x.double(), score.double(), bandwidth=h.double())
            theirs = torch.autograd.grad(phi.sum(), (x, score))
        for a, b in zip(ours, theirs, strict=True):
            assert testing.error(a, b) <= testing.TOLERANCES[torch.float32]

    def test_no_sets(self, simt):
        with ivfast.use("cuda"):
            assert ivfast.svgd_direction(torch.empty(0, 4, 3), bandwidth=1.0).shape == (0, 4, 3)

    def test_what_it_does_not_serve_is_refused(self, simt):
        with ivfast.use("cuda"):
            with pytest.raises(RuntimeError, match=r"d <= 128, got n = 5, d = 129"):
                ivfast.svgd_direction(torch.randn(5, 129), bandwidth=1.0)
            with pytest.raises(RuntimeError, match=r"takes float32, bfloat16 or float16, got Double"):
                ivfast.svgd_direction(torch.randn(5, 3, dtype=torch.float64), bandwidth=1.0)
        with pytest.raises(RuntimeError, match=r"n, d >= 1, got n = 0, d = 3"):
            torch.ops.ivfast.svgd_direction.cuda(torch.empty(0, 3), None, torch.ones(()))


# Bridge


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
        # z of mean 10 leaves float32 a relative 1e-4 of distances about 0.01, and k and 2/h are as exact as those
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
