"""SVGD direction in CUDA C++, run on the CPU by tests/simt."""

import pytest
import torch
from helpers import (
    assert_right_where_particles_hardly_meet,
    assert_the_gradient_of_h_is_optional,
    by_cuda,
    same_bits_in_every_schedule,
    size,
)

import ivfast
from ivfast import testing
from ivfast.ops import svgd
from ivfast.testing import Case

HALF = (torch.bfloat16, torch.float16)


def matches(case: Case, dtype: torch.dtype = torch.float32):
    testing.check(case, testing.inputs(case, dtype), "cuda")


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
        # inputs with mean 10 leave float32 ten times less precision in each difference
        matches(direction_case(90, 20, shift=10.0, slack=10))

    def test_equal_particles_follow_the_score_alone(self, simt):
        x, score = torch.randn(1, 7).expand(40, 7), torch.randn(40, 7)
        with ivfast.use("cuda"):
            phi = ivfast.svgd_direction(x, score, bandwidth=1.0)
        assert testing.error(phi, score.double().mean(0).expand(40, 7)) <= testing.TOLERANCES[torch.float32]

    @pytest.mark.parametrize("d", [1, 40, 128])
    def test_equal_particles_are_at_distance_zero_to_the_bit(self, simt, d):
        x = torch.randn(45, d)
        x[:, 0] += 10 * torch.randperm(45)  # other particles are too far to count, in one dimension too
        x = x.repeat(2, 1)
        with ivfast.use("cuda"):
            row_sum = svgd._forward(x, None, torch.tensor(1e-9))[1]
        assert torch.equal(row_sum, torch.full_like(row_sum, 2.0))

    def test_the_gradient_of_the_bandwidth_is_optional(self, simt):
        assert_the_gradient_of_h_is_optional("cuda")

    def test_particles_that_hardly_meet(self, simt):
        assert_right_where_particles_hardly_meet("cuda")

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
