"""Median bandwidth in CUDA C++, run on the CPU by tests/simt."""

import math

import pytest
import torch
from helpers import by_cuda, clear_median, same_bits_in_every_schedule, size

import ivfast
from ivfast import testing
from ivfast.testing import Case

HALF = (torch.bfloat16, torch.float16)


def matches(case: Case, dtype: torch.dtype = torch.float32):
    testing.check(case, testing.inputs(case, dtype), "cuda")


def median_case(n, d, convention="liu-wang", *, batch=(), whole=None) -> Case:
    """Normal particles, or integers below `whole` and their negatives: these are already centred and have exact
    distances, so that ties are ties in any arithmetic."""

    def draw(generator):
        if whole is None:
            return clear_median(n, d, batch)(generator)
        half = torch.randint(whole, (*batch, (n + 1) // 2, d), generator=generator).double()
        return (torch.cat([half[..., : n // 2, :], 0 * half[..., : n % 2, :], -half[..., : n // 2, :]], -2),)

    def median(x):
        return ivfast.median_bandwidth(x, convention=convention)

    return Case("median_bandwidth", f"{convention} {(*batch, n, d)}", median, draw)


def middles(x: torch.Tensor, full: bool) -> torch.Tensor:
    return torch.ops.ivfast.median_bandwidth.cuda(x, full, True, 1.0)[1]


def expected_middles(x: torch.Tensor, full: bool) -> torch.Tensor:
    """For one-dimensional particles `[n, 1]`, whose float32 distances do not depend on the order of operations."""
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
        # with more pairs, two may be so close that float32 swaps them, and the gradient goes to another pair
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
        assert h.isnan()
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
