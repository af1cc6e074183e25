"""Median bandwidth in Triton, interpreted if there is no GPU."""

import pytest
import torch
from helpers import size
from test_median_cuda import median_case

import ivfast
from ivfast import testing
from ivfast.ops import median

HALF = (torch.bfloat16, torch.float16)
device = "cuda" if torch.cuda.is_available() else "cpu"  # interpreted on the CPU: tests/conftest.py
pytestmark = pytest.mark.usefixtures("poisoned")


def check(case, dtype=torch.float32):
    testing.check(case, testing.inputs(case, dtype, device=device), "triton")


@pytest.fixture(params=["sampled", "all", "below", "above"])
def streamed(request, monkeypatch):
    """Passes over tiles at any n. The first window is around a sample's quantile, or covers everything, or misses the
    rank, which is below or above it."""
    from ivfast.kernels import median, selection

    monkeypatch.setattr(median, "SMALL", 0)
    monkeypatch.setattr(selection, "SAMPLES", 64)
    monkeypatch.setattr(selection, "SAMPLED", 1 << 62 if request.param == "all" else 0)
    if request.param in ("below", "above"):
        low = 0x7F000000 if request.param == "below" else 1
        window = torch.tensor([low, 0], dtype=torch.int32, device=device)
        monkeypatch.setattr(selection, "_window", lambda packed, ranks: window.expand(packed.sets, 2, 2).clone())


def middles(x, full):
    with ivfast.use("triton"):
        return median._forward(x, full, True, 1.0)[1]


def expected_middles(x, full):
    d2 = (x.double().unsqueeze(-2) - x.double().unsqueeze(-3)).square().sum(-1)
    return median._middles(d2, full)


def whole_numbers(n, d, below=50):
    """Already centred and at distances that are exact in float32, so that the median must be bitwise correct."""
    half = torch.randint(below, (n // 2, d), device=device).float()
    return torch.cat([half, torch.zeros(n % 2, d, device=device), -half])


class TestMedian:
    @pytest.mark.parametrize("convention", ["liu-wang", "blackjax", "numpyro"])
    @pytest.mark.parametrize(("n", "d"), [(1, 1), (2, 13), (3, 16), (17, 65), (63, 7), (64, 3)])
    def test_one_program(self, n, d, convention):
        check(median_case(n, d, convention, batch=(size(1, 2),)))

    @pytest.mark.parametrize("convention", ["liu-wang", "paper"])
    @pytest.mark.parametrize(("n", "d"), [(2, 13), (66, 5), (67, 33)])
    def test_streamed(self, streamed, n, d, convention):
        check(median_case(n, d, convention))

    @pytest.mark.parametrize("dtype", HALF, ids=str)
    @pytest.mark.parametrize("n", [20, 66])
    def test_half_precision(self, n, dtype):
        check(median_case(n, 5), dtype)

    @pytest.mark.parametrize("full", [False, True])
    @pytest.mark.parametrize("n", [5, 6, 63, 64])
    def test_exact_to_the_bit_in_one_program(self, n, full):
        x = whole_numbers(n, 3)
        assert torch.equal(middles(x, full).double(), expected_middles(x, full))

    @pytest.mark.parametrize("full", [False, True])
    @pytest.mark.parametrize("n", [66, 67])
    def test_exact_to_the_bit_streamed(self, streamed, n, full):
        x = torch.stack([whole_numbers(n, 2), whole_numbers(n, 2, 3)])  # and many ties
        assert torch.equal(middles(x, full).double(), expected_middles(x, full))

    @pytest.mark.parametrize("n", [8, 66])
    def test_pairs_that_tie_share_the_gradient(self, n):
        check(median_case(n, 2, whole=3))

    @pytest.mark.parametrize("n", [1, 40, 66])
    def test_where_the_median_is_zero(self, n):
        x = torch.zeros(2, n, 3, device=device)
        x[1, 0] = 1  # all but one coincide
        x = (x + 0.3).requires_grad_()
        with ivfast.use("triton"):
            h = ivfast.median_bandwidth(x)
            (dx,) = torch.autograd.grad(h.sum(), x)
        with ivfast.use("reference"):
            expected = ivfast.median_bandwidth(x.double())
        assert h[0] == 1
        assert testing.error(h, expected) <= testing.TOLERANCES[torch.float32]
        assert torch.equal(dx, torch.zeros_like(dx))

    @pytest.mark.parametrize("d", [5, 64, 300])
    @pytest.mark.parametrize("n", [40, 66])
    def test_equal_rows_are_at_distance_zero_to_the_bit(self, n, d):
        x = torch.randn(1, d, device=device).expand(n, d).clone()
        x[: n // 8] = torch.randn(n // 8, d, device=device)  # three quarters of the pairs are of equal rows
        assert torch.equal(middles(x, False), torch.zeros(2, device=device))

    @pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # in the interpreter's NumPy
    def test_a_sample_of_a_few_hundred_particles(self):
        """Clusters, ties, and particles that are not finite."""
        n = size(257, 330)
        clusters = 0.01 * torch.randn(n, 3, device=device) + 4.0 * torch.randint(3, (n, 1), device=device)
        x = torch.stack([torch.randn(n, 3, device=device), clusters, whole_numbers(n, 3), whole_numbers(n, 3, 2)])
        full = bool(size(0, 1))
        found, wanted = middles(x, full).double(), expected_middles(x, full)
        assert testing.error(found[:2], wanted[:2]) <= testing.TOLERANCES[torch.float32]
        assert torch.equal(found[2:], wanted[2:])
        x[0, size(0, n - 1), 1], x[1, size(0, n - 1), 0] = float("nan"), float("inf")
        assert middles(x[:2], full).isnan().all()

    @pytest.mark.parametrize("d", [2, 64])
    def test_a_pass_adds_few_pairs_atomically(self, d):
        from ivfast.kernels import particles, selection

        n = size(257, 330)
        x, ranks = torch.randn(n, d, device=device), selection.Ranks.of(n, False)
        packed = particles.pack(x, particles.exact(x.device), selection.width(particles.padded(d)))
        low, shift = selection._window(packed, ranks)[0, 0].tolist()
        bins = (torch.pdist(x.cpu()).square().view(torch.int32) - low) >> shift
        counts = torch.bincount(bins[(bins >= 0) & (bins < selection.BINS)])
        assert counts.sum() <= 0.25 * ranks.pairs
        assert counts.max() <= 0.01 * ranks.pairs

    def test_strides(self):
        x = torch.randn(2, 5, 40, device=device).mT.requires_grad_()
        with ivfast.use("triton"):
            ours = ivfast.median_bandwidth(x)
            (dx,) = torch.autograd.grad(ours.sum(), x)
        theirs = ivfast.median_bandwidth(x.double())
        assert testing.error(ours, theirs) <= testing.TOLERANCES[torch.float32]
        assert testing.error(dx, torch.autograd.grad(theirs.sum(), x)[0]) <= testing.TOLERANCES[torch.float32]

    def test_no_sets_and_no_float64(self):
        with ivfast.use("triton"):
            assert ivfast.median_bandwidth(torch.empty(0, 4, 3, device=device)).shape == (0,)
            with pytest.raises(TypeError, match=r"in Triton takes float32.*got torch.float64"):
                ivfast.median_bandwidth(torch.randn(5, 3, dtype=torch.float64, device=device))
