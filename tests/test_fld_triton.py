"""Inverse roots and the latent distance of small codes in Triton, interpreted if there is no GPU."""

import pytest
import torch

import ivfast
from ivfast import testing
from ivfast.ops.fld import fld_gram, fld_gram_reference, fld_reference
from ivfast.ops.inverse_root import CONVERGED, inverse_root, inverse_root_reference

device = "cuda" if torch.cuda.is_available() else "cpu"  # interpreted on the CPU: tests/conftest.py
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]
# float64, except the rounding of results
ROUNDING = {torch.float64: 2e-12, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
# Rounding by eps relative to the largest eigenvalue is eps · condition relative to the smallest, and so for a^−½ and
# the polar factor; it changes the sum of roots by ½ eps · √condition.
EPS = torch.finfo(torch.float64).eps
dtypes = pytest.mark.parametrize("dtype", ROUNDING, ids=str)


def root(a):
    with ivfast.use("triton"):
        return inverse_root(a)


def gram(z, gradient=True):
    with ivfast.use("triton"):
        return fld_gram(z, gradient)


def close(ours, theirs, tolerance):
    assert ours.shape == theirs.shape
    assert ours.is_contiguous()
    assert testing.error(ours.cpu(), theirs.cpu()) <= tolerance


def matrix(d: int, condition: float, *batch: int) -> torch.Tensor:
    Q = torch.linalg.qr(torch.randn(*batch, d, d, dtype=torch.float64))[0]
    a = (Q * 3 * condition ** -torch.linspace(0, 1, d, dtype=torch.float64)) @ Q.mT
    return ((a + a.mT) / 2).to(device)


def condition_of(z: torch.Tensor) -> float:
    """Condition of the Gram matrix of the centred codes, if they are not dependent."""
    values = torch.linalg.svdvals(z.double() - z.double().mean(-2, keepdim=True))
    return float((values[0] / values[min(z.shape[-2] - 1, z.shape[-1]) - 1]) ** 2)


class TestInverseRoot:
    @pytest.mark.parametrize(
        ("d", "condition"), [(d, c) for d in (1, 2, 17, 31) for c in (1, 1e4, 1e12)] + [(64, 1e2), (100, 10)]
    )
    def test_conditions(self, d, condition):
        a = matrix(d, condition)
        ours, theirs = root(a), inverse_root_reference(a)
        close(ours[0], theirs[0], 1e-13 + EPS * condition)
        close(ours[1], theirs[1], 1e-13 + 4 * EPS * condition**0.5)
        assert bool(ours[2] <= CONVERGED) == bool(theirs[2] <= CONVERGED)

    @dtypes
    def test_dtypes_batches_and_strides(self, dtype):
        a = torch.stack([matrix(9, 10, 2), matrix(9, 30, 2)], -1).to(dtype).movedim(-1, 1)
        assert not a.is_contiguous()
        ours, theirs = root(a), inverse_root_reference(a.double())
        assert ours[0].dtype == ours[1].dtype == dtype
        assert ours[2].dtype == torch.float32
        close(ours[0], theirs[0], ROUNDING[dtype])
        close(ours[1], theirs[1], ROUNDING[dtype])

    def test_rank_deficient(self):
        for d in (1, 20):
            v = torch.randn(d, 1, dtype=torch.float64, device=device)
            for a in (torch.zeros_like(v @ v.mT), v @ v.mT):
                inverse, trace, _ = root(a)
                assert inverse.isfinite().all()
                # rounding leaves eigenvalues of eps λ_max, whose roots are 1e-8
                close(trace, a.trace().sqrt(), 1e-6)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_not_finite_stays_in_its_matrix(self, value):
        a = matrix(7, 10, 3)
        expected = root(a)
        for i, j in ((2, 2), (1, 6)):
            spoilt = a.clone()
            spoilt[1, i, j] = value
            for ours, theirs in zip(root(spoilt), expected, strict=True):
                assert ours[1].isnan().all()
                assert torch.equal(ours[[0, 2]], theirs[[0, 2]])

    def test_refusals_and_no_matrices(self):
        assert [x.shape for x in root(torch.empty(0, 4, 4, device=device))] == [(0, 4, 4), (0,), (0,)]
        with pytest.raises(RuntimeError, match="inverse_root in Triton takes matrices of 1 to 128 rows, got 129"):
            root(torch.eye(129, device=device))


class TestFld:
    @pytest.mark.parametrize(
        ("n", "d"),
        [(2, 1), (4, 3), (9, 4), (65, 31), (1100, 5), (200, 17), (2, 2), (2, 3), (3, 700), (31, 31), (20, 64)],
    )
    def test_sizes(self, n, d):
        z = (torch.randn(n, d, dtype=torch.float64) * (0.5 + torch.rand(d)) + torch.randn(d)).to(device)
        distance, gradient, left = gram(z)
        expected, slope, left_there = fld_gram_reference(z.double(), True)
        close(distance, expected, ROUNDING[z.dtype])
        close(gradient, slope, ROUNDING[z.dtype] + 4 * EPS * condition_of(z))
        assert bool(left <= CONVERGED) == bool(left_there <= CONVERGED)
        value, none, _ = gram(z, False)
        assert torch.equal(value, distance)
        assert none.shape == (0,)

    @pytest.mark.parametrize(("n", "d"), [(300, 66), (66, 200)])
    def test_three_tiles(self, n, d):
        z = torch.randn(n, d, device=device)
        distance, gradient, _ = gram(z)
        expected, slope, _ = fld_gram_reference(z.double(), True)
        close(distance, expected, 1e-6)
        close(gradient, slope, 1e-6)

    @dtypes
    @pytest.mark.parametrize(("n", "d"), [(40, 7), (7, 40)])
    def test_dtypes_batches_and_strides(self, n, d, dtype):
        z = torch.randn(2, 2, d, 2 * n, device=device).to(dtype).mT[:, :, ::2]
        assert not z.is_contiguous()
        distance, gradient, _ = gram(z)
        expected, slope, _ = fld_gram_reference(z.double(), True)
        assert gradient.dtype == dtype
        assert distance.dtype == torch.promote_types(dtype, torch.float32)
        close(distance, expected, min(ROUNDING[dtype], 1e-6))
        close(gradient, slope, ROUNDING[dtype])

    @pytest.mark.parametrize("condition", [1e4, 1e10])
    @pytest.mark.parametrize(("n", "d"), [(30, 10), (11, 10), (10, 10), (6, 10)])
    def test_conditions(self, n, d, condition):
        z = torch.randn(n, d, dtype=torch.float64) * condition ** torch.linspace(0, -0.5, d, dtype=torch.float64)
        z = z.to(device)
        distance, gradient, _ = gram(z)
        expected, slope, left = fld_gram_reference(z, True)
        condition = condition_of(z)
        close(distance, expected, 1e-12 + 4 * EPS * condition**0.5)
        if left <= CONVERGED:
            # entries of the polar factor are at most 1
            assert (gradient - slope).abs().max() < 2 / (n - 1) ** 0.5 * (1e-13 + 4 * EPS * condition)

    def test_far_mean(self):
        z = torch.randn(700, 6, device=device) + 1e4
        expected, slope = fld_reference(z.double(), True)
        close(gram(z)[0], expected, 1e-7)
        # in float32 the gradient of ‖μ‖² would swamp the rest
        exact = gram(z.double())[1]
        close(exact - exact.mean(0), slope - slope.mean(0), 1e-6)

    def test_collapsed_codes(self):
        for z in (
            torch.full((5, 3), 2.0), torch.zeros(2, 1), torch.randn(2, 6).repeat(4, 1), torch.randn(40, 1) * torch.ones(7),
            torch.randn(1, 50).repeat(3, 1),
        ):  # fmt: skip
            distance, gradient, _ = gram(z.to(device))
            assert gradient.isfinite().all()
            close(distance, fld_reference(z.double(), False)[0], 1e-6)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    @pytest.mark.parametrize(("n", "d"), [(9, 3), (3, 9)])
    def test_not_finite_stays_in_its_set(self, n, d, value):
        z = torch.randn(3, n, d, device=device)
        expected = gram(z)
        z[1, 2, 1] = value
        for ours, theirs in zip(gram(z), expected, strict=True):
            assert ours[1].isnan().all()
            assert torch.equal(ours[[0, 2]], theirs[[0, 2]])

    def test_bits(self):
        z = torch.randn(2, 300, 9, device=device)
        assert all(torch.equal(a, b) for a, b in zip(gram(z), gram(z), strict=True))

    @pytest.mark.parametrize("shape", [(700, 8), (2, 9, 30)])
    def test_three_launches(self, monkeypatch, shape):
        from ivfast.kernels import fld

        launches = []
        for name in ("_scatter_kernel", "_root_kernel", "_gradient_kernel"):
            monkeypatch.setattr(fld, name, Counted(getattr(fld, name), name, launches))
        gram(torch.randn(shape, device=device))
        assert launches == ["_scatter_kernel", "_root_kernel", "_gradient_kernel"]

    @pytest.mark.parametrize("case", [c for c in testing.CASES if c.op == "fld"], ids=str)
    def test_cases(self, case):
        testing.check(case, testing.inputs(case, torch.float32, device=device), "triton")

    def test_refusals_and_no_sets(self):
        assert [x.shape for x in gram(torch.empty(0, 9, 4, device=device))] == [(0,), (0, 9, 4), (0,)]
        with pytest.raises(RuntimeError, match="fld_gram in Triton takes matrices of 1 to 128 rows, got 129"):
            gram(torch.randn(129, 300, device=device))


class Counted:
    """A kernel that records its launches."""

    def __init__(self, kernel, name, launches):
        self.kernel, self.name, self.launches = kernel, name, launches

    def __getitem__(self, grid):
        self.launches.append(self.name)
        return self.kernel[grid]
