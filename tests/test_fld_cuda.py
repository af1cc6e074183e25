"""Inverse roots and the latent distance of small codes in CUDA C++, run on the CPU by tests/simt."""

import pytest
import torch

import ivfast
from ivfast import testing
from ivfast.ops.fld import fld_gram_reference, fld_reference
from ivfast.ops.inverse_root import CONVERGED, inverse_root_reference

pytestmark = pytest.mark.usefixtures("simt")
# float64, except the rounding of results and of the largest numbers in a difference
ROUNDING = {torch.float64: 2e-12, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
# Rounding by eps relative to the largest eigenvalue is eps · condition relative to the smallest, and so for a^−½ and
# the polar factor; it changes the sum of roots by ½ eps · √condition.
EPS = torch.finfo(torch.float64).eps
dtypes = pytest.mark.parametrize("dtype", ROUNDING, ids=str)
# one tile, partial tiles, 64 rows and more; partial and several chunks and panels
TALL = [(2, 1), (4, 3), (9, 4), (70, 64), (65, 31), (129, 128), (700, 5), (1500, 17), (300, 100), (9000, 1)]
FLAT = [(2, 2), (2, 3), (3, 700), (31, 31), (33, 128), (64, 65), (2, 9000), (128, 128), (100, 130)]


def inverse_root(a):
    return torch.ops.ivfast.inverse_root.cuda(a)


def fld_gram(z, gradient=True):
    return torch.ops.ivfast.fld_gram.cuda(z, gradient)


def close(ours, theirs, tolerance):
    assert ours.shape == theirs.shape
    assert ours.is_contiguous()
    assert testing.error(ours, theirs) <= tolerance


def eigenvalues(d: int, condition: float) -> torch.Tensor:
    return 3 * condition ** -torch.linspace(0, 1, d, dtype=torch.float64)


def matrix(d: int, condition: float, *batch: int) -> torch.Tensor:
    Q = torch.linalg.qr(torch.randn(*batch, d, d, dtype=torch.float64))[0]
    a = (Q * eigenvalues(d, condition)) @ Q.mT
    return (a + a.mT) / 2


def condition_of(z: torch.Tensor) -> float:
    """Condition of the Gram matrix of the centred codes, if they are not dependent."""
    values = torch.linalg.svdvals(z.double() - z.double().mean(-2, keepdim=True))
    rank = min(z.shape[-2] - 1, z.shape[-1])
    return float((values[0] / values[rank - 1]) ** 2)


class TestInverseRoot:
    @pytest.mark.parametrize("condition", [1, 1e4, 1e8, 1e12])
    @pytest.mark.parametrize("d", [1, 2, 3, 4, 5, 31, 64, 65, 100, 128])
    def test_conditions(self, d, condition):
        a = matrix(d, condition)
        ours, theirs = inverse_root(a), inverse_root_reference(a)
        close(ours[0], theirs[0], 1e-13 + EPS * condition)
        close(ours[1], theirs[1], 1e-13 + 4 * EPS * condition**0.5)
        close(ours[1], eigenvalues(d, condition).sqrt().sum(), 1e-9)
        assert bool(ours[2] <= CONVERGED) == bool(theirs[2] <= CONVERGED)

    @dtypes
    def test_dtypes_batches_and_strides(self, dtype):
        a = torch.stack([matrix(19, 10, 2), matrix(19, 30, 2)], 1).to(dtype)
        a = torch.stack([(a + a.mT) / 2] * 2, -1)[..., 0]
        assert not a.is_contiguous()
        for ours, theirs in zip(inverse_root(a), inverse_root_reference(a.double()), strict=True):
            assert ours.shape == theirs.shape
        ours, theirs = inverse_root(a), inverse_root_reference(a.double())
        assert ours[0].dtype == ours[1].dtype == dtype
        assert ours[2].dtype == torch.float32
        close(ours[0], theirs[0], ROUNDING[dtype])
        close(ours[1], theirs[1], ROUNDING[dtype])

    def test_rank_deficient(self):
        for d in (1, 2, 30):
            v = torch.randn(d, 1, dtype=torch.float64)
            for a in (torch.zeros(d, d, dtype=torch.float64), v @ v.mT):
                inverse, trace, _ = inverse_root(a)
                assert inverse.isfinite().all()
                # rounding leaves eigenvalues of eps λ_max, whose roots are 1e-8
                close(trace, a.trace().sqrt(), 1e-6)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    def test_not_finite_stays_in_its_matrix(self, value):
        a = matrix(7, 10, 3)
        expected = inverse_root(a)
        for i, j in ((2, 2), (6, 1), (1, 6)):
            spoilt = a.clone()
            spoilt[1, i, j] = value
            for ours, theirs in zip(inverse_root(spoilt), expected, strict=True):
                assert ours[1].isnan().all()
                assert torch.equal(ours[[0, 2]], theirs[[0, 2]])

    @pytest.mark.parametrize("scale", [1e-30, 1e30])
    def test_far_scales(self, scale):
        a = matrix(9, 100)
        for ours, theirs in zip(inverse_root(a * scale)[:2], inverse_root(a)[:2], strict=True):
            close(ours / ours.abs().max(), theirs / theirs.abs().max(), 1e-12)

    def test_refusals_and_no_matrices(self):
        assert [x.shape for x in inverse_root(torch.empty(0, 4, 4))] == [(0, 4, 4), (0,), (0,)]
        for shape in ((129, 129), (0, 0)):
            with pytest.raises(RuntimeError, match=r"in CUDA C\+\+ takes matrices of 1 to 128 rows"):
                inverse_root(torch.zeros(shape))
        with pytest.raises(RuntimeError, match=r"takes a \[..., d, d\]"):
            inverse_root(torch.zeros(3, 4))


class TestFld:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    @pytest.mark.parametrize(("n", "d"), TALL + FLAT)
    def test_sizes(self, n, d, dtype):
        z = (torch.randn(n, d, dtype=torch.float64) * (0.5 + torch.rand(d)) + torch.randn(d)).to(dtype)
        distance, gradient, left = fld_gram(z)
        expected, slope, left_there = fld_gram_reference(z.double(), True)
        close(distance, expected, ROUNDING[dtype])
        close(gradient, slope, ROUNDING[dtype] + 4 * EPS * condition_of(z))
        assert gradient.dtype == dtype
        assert bool(left <= CONVERGED) == bool(left_there <= CONVERGED)
        value, none, _ = fld_gram(z, False)
        assert torch.equal(value, distance)
        assert none.shape == (0,)

    @dtypes
    @pytest.mark.parametrize(("n", "d"), [(40, 7), (7, 40)])
    def test_dtypes_batches_and_strides(self, n, d, dtype):
        z = torch.randn(2, 3, d, 2 * n).to(dtype).mT[:, :, ::2]
        assert not z.is_contiguous()
        distance, gradient, _ = fld_gram(z)
        expected, slope, _ = fld_gram_reference(z.double(), True)
        assert gradient.dtype == dtype
        assert distance.dtype == torch.promote_types(dtype, torch.float32)
        close(distance, expected, min(ROUNDING[dtype], 1e-6))
        close(gradient, slope, ROUNDING[dtype])

    @pytest.mark.parametrize("condition", [1, 1e4, 1e8, 1e12])
    @pytest.mark.parametrize(("n", "d"), [(90, 30), (31, 30), (30, 30), (12, 30)])
    def test_conditions(self, n, d, condition):
        z = torch.randn(n, d, dtype=torch.float64) * condition ** torch.linspace(0, -0.5, d, dtype=torch.float64)
        distance, gradient, _ = fld_gram(z)
        expected, slope, left = fld_gram_reference(z, True)
        condition = condition_of(z)
        close(distance, expected, 1e-12 + 4 * EPS * condition**0.5)
        if left <= CONVERGED:
            close(distance, fld_reference(z, False)[0], 1e-12 + 4 * EPS * condition**0.5)
            # entries of the polar factor are at most 1
            assert (gradient - slope).abs().max() < 2 / (n - 1) ** 0.5 * (1e-13 + 4 * EPS * condition)

    def test_far_mean(self):
        z = torch.randn(700, 6) + 1e4
        expected, slope = fld_reference(z.double(), True)
        close(fld_gram(z)[0], expected, 1e-7)
        # in float32 the gradient of ‖μ‖² would swamp the rest
        exact = fld_gram(z.double())[1]
        close(exact - exact.mean(0), slope - slope.mean(0), 1e-6)

    def test_five_digits_of_a_small_distance(self):
        z = torch.randn(2000, 128)
        close(fld_gram(z, False)[0], fld_reference(z.double(), False)[0], 1e-6)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_collapsed_codes(self, dtype):
        for z in (
            torch.full((5, 3), 2.0), torch.zeros(2, 1), torch.full((3, 7), -1.0), torch.randn(2, 6).repeat(4, 1),
            torch.randn(40, 1) * torch.ones(7), torch.randn(1, 50).repeat(3, 1),
        ):  # fmt: skip
            z = z.to(dtype)
            distance, gradient, _ = fld_gram(z)
            assert gradient.isfinite().all()
            close(distance, fld_reference(z.double(), False)[0], 1e-6)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    @pytest.mark.parametrize(("n", "d"), [(9, 3), (3, 9), (300, 70)])
    def test_not_finite_stays_in_its_set(self, n, d, value):
        z = torch.randn(3, n, d)
        expected = fld_gram(z)
        z[1, 2, 1] = value
        for ours, theirs in zip(fld_gram(z), expected, strict=True):
            assert ours[1].isnan().all()
            assert torch.equal(ours[[0, 2]], theirs[[0, 2]])

    @pytest.mark.parametrize(("n", "d"), [(300, 9), (9, 300), (300, 70)])
    def test_every_schedule_gives_the_same_bits(self, simt, n, d):
        z = torch.randn(2, n, d)
        results = []
        for seed in range(4):
            simt.schedule(seed)
            results.append(fld_gram(z))
        assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(other, results[0], strict=True))

    def test_a_set_does_not_move_with_its_batch(self):
        # in a large batch each set has fewer chunks: sums differ, but sets stay separate
        z = torch.randn(300, 200, 3)
        distance, gradient, _ = fld_gram(z)
        expected, slope, _ = fld_gram_reference(z.double(), True)
        close(distance, expected, 1e-6)
        close(gradient, slope, 1e-6)

    @pytest.mark.parametrize("case", [c for c in testing.CASES if c.op == "fld"], ids=str)
    def test_cases(self, case):
        testing.check(case, testing.inputs(case, torch.float32), "cuda")

    def test_refusals_and_no_sets(self):
        assert [x.shape for x in fld_gram(torch.empty(0, 9, 4))] == [(0,), (0, 9, 4), (0,)]
        with pytest.raises(RuntimeError, match=r"fld_gram in CUDA C\+\+ takes matrices of 1 to 128 rows, got 129"):
            fld_gram(torch.randn(129, 300))
        with ivfast.use("cuda"), pytest.raises(RuntimeError, match="takes matrices of 1 to 128 rows"):
            torch.ops.ivfast.fld_gram.cuda(torch.randn(130, 130), False)
