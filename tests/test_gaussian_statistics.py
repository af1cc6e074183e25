"""Streaming statistics: against NumPy in float64, in any split, merged and across processes."""

import copy
import functools
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import as_ranks, run_script

import ivfast
from ivfast import GaussianStatistics
from ivfast.testing import error

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def normal(n, d, dtype=torch.float64):
    """Correlated samples with different scales and means."""
    x = torch.randn(n, d, dtype=torch.float64) @ (torch.eye(d, dtype=torch.float64) + 0.3 * torch.randn(d, d).double())
    return (x * torch.linspace(0.5, 2, d, dtype=torch.float64) + torch.randn(d).double()).to(dtype)


def of(x):
    return GaussianStatistics(x.shape[1], device=x.device).update(x)


def deviation(stats, x):
    """Largest error of a mean in units of σ_i, and of a covariance in units of σ_i σ_j."""
    x = x.double().cpu().numpy()
    mean = x[0] + (x - x[0]).mean(0)  # NumPy's own sum is rounded by n ε μ
    covariance = np.atleast_2d(np.cov(x, rowvar=False))
    scale = np.sqrt(np.diag(covariance))
    scale[scale == 0] = 1  # two samples in half precision may agree in a column
    assert stats.count == len(x)
    assert torch.equal(stats.covariance, stats.covariance.mT)
    return (
        float(np.abs((stats.mean.cpu().numpy() - mean) / scale).max()),
        float(np.abs((stats.covariance.cpu().numpy() - covariance) / np.outer(scale, scale)).max()),
    )


def assert_right(stats, x, dtype=torch.float32):
    """In float32, variances of a few hundred samples are off by up to 1e-6, and by 1.6e-6 where the few values of
    bfloat16 round in the same direction."""
    allowed = 1e-12 if dtype == torch.float64 else 3e-6
    assert max(deviation(stats, x)) < allowed, deviation(stats, x)


def equal(a, b):
    return a.count == b.count and torch.equal(a.mean, b.mean) and torch.equal(a.covariance, b.covariance)


class TestUpdate:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("n", "d"), [(2, 1), (2, 5), (3, 300), (300, 1), (4097, 5), (9000, 5), (700, 300)])
    def test_against_numpy(self, n, d, dtype):
        x = normal(n, d, dtype)
        assert_right(of(x), x, dtype)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_any_split_gives_the_same(self, dtype):
        x = normal(1500, 7, dtype)
        sizes = torch.randint(0, 400, (6,)).tolist()
        for batches in (
            x.split(1),
            x.split(256),
            x.split(1499),
            x.tensor_split(np.cumsum(sizes).clip(0, 1500).tolist()),
        ):
            stats = GaussianStatistics(7)
            for batch in batches:
                stats.update(batch)
            assert_right(stats, x, dtype)

    @pytest.mark.parametrize("batch", [64, 5000])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    def test_a_mean_of_ten_thousand_deviations(self, dtype, batch):
        """Here Σxxᵀ − nμμᵀ would amplify its rounding 1e8 times; x itself is already rounded."""
        x = (normal(5000, 6) + 1e4).to(dtype)
        stats = GaussianStatistics(6)
        for part in x.split(batch):
            stats.update(part)
        mean, covariance = deviation(stats, x)
        # σ is at least 0.3; each of 79 merges rounds μ = 1e4 by up to 9e-13, a random walk of 8e-12
        assert mean < (3e-11 if dtype == torch.float64 else 3e-6)
        assert covariance < (1e-11 if dtype == torch.float64 else 3e-6)

    @pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-18, 1e18, 1e30])
    def test_scales_whose_squares_are_out_of_the_range_of_float32(self, scale):
        x = (normal(600, 5) * torch.tensor([scale, 1, scale, 1, 1], dtype=torch.float64)).float()
        assert_right(of(x), x)

    def test_differences_out_of_the_range_of_float32(self):
        x = torch.tensor([[3e38], [-3e38]]).repeat(400, 1)
        assert_right(of(x), x)

    def test_a_constant_dimension(self, monkeypatch):
        """Zero variance is no reason to leave float32."""
        x = normal(600, 4, torch.float32)
        x[:, 2] = 0.1
        monkeypatch.setattr(GaussianStatistics, "_add_products", lambda self, x: self._upper.add_(x.mT @ x))
        stats = of(x)
        assert not stats.covariance[2].any()
        assert float(stats.mean[2]) == float(x[0, 2])

    @pytest.mark.parametrize("at", [0, 2000, -1])
    @pytest.mark.parametrize("size", [100.0, 4e3, 1e5, 1e9])
    def test_an_outlier(self, size, at):
        """Next to the outlier's square the others are rounded, mostly in the same direction: up to 2.4e-4 of the
        variance in one float32 chain, which the sum in blocks detects."""
        x = normal(4000, 3, torch.float32)
        x[at] = size
        mean, covariance = deviation(of(x), x)
        # the mean is c, within 4 σ of it, plus a float32 sum in blocks of values up to 63 σ: 63 σ · 4 ε
        assert mean < 1.5e-5
        assert covariance < 4e-6

    def test_a_few_large_samples_hold_the_variance(self):
        """No outlier, but a chain that is full after 64 samples: then 4,000 squares of half a last digit each."""
        x = torch.cat([normal(64, 3, torch.float32), 1e-3 * normal(4000, 3, torch.float32)])
        assert_right(of(x), x)

    def test_nan_stays(self):
        x = normal(600, 3, torch.float32)
        x[5, 1] = float("nan")
        stats = of(x)
        assert stats.mean.isnan().tolist() == [False, True, False]
        assert torch.equal(stats.covariance.isnan(), (torch.arange(3) == 1) | (torch.arange(3) == 1)[:, None])

    def test_no_samples_and_one(self):
        stats = GaussianStatistics(3).update(torch.empty(0, 3))
        assert stats.count == 0
        x = normal(1, 3)
        stats.update(x)
        assert stats.count == 1
        assert torch.equal(stats.mean, x[0])
        assert not stats.scatter.any()
        assert_right(stats.update(torch.empty(0, 3)).update(x + 1), torch.cat([x, x + 1]), torch.float64)

    @pytest.mark.parametrize("few", [100, 600])
    def test_strides(self, few):
        x = normal(2 * few, 10, torch.float32)
        for view in (x[::2], x[:, ::2], x[:few, :few].mT[:5].mT, x[:1].expand(few, 10) + 0 * x[:few]):
            assert equal(of(view), of(view.contiguous()))

    def test_samples_are_left_alone_and_no_graph_is_kept(self):
        x = normal(600, 4, torch.float32).requires_grad_()
        before = x.detach().clone()
        stats = of(x).update(x)
        assert torch.equal(x, before)
        assert not stats.mean.requires_grad
        assert not stats.covariance.requires_grad

    @pytest.mark.parametrize("n", [100, 600])
    def test_inference_mode(self, n):
        x = normal(n, 4, torch.float32)
        with torch.inference_mode():
            stats = of(x * 1)
            state, both = stats.state_dict(), stats + stats
        assert equal(both, stats + stats)
        assert both.update(x).count == 3 * n
        stats.update(x).merge(stats)
        assert stats.count == 4 * n
        again = GaussianStatistics(4)
        again.load_state_dict(state)
        again.update(x)
        assert again.count == 2 * n

    def test_lower_precision_of_products_is_not_taken_over(self):
        x = normal(2000, 64, torch.float32)
        before = torch.get_float32_matmul_precision()
        try:
            for precision in ("medium", "high"):
                torch.set_float32_matmul_precision(precision)
                assert_right(of(x), x)
        finally:
            torch.set_float32_matmul_precision(before)

    def test_the_same_bits_twice(self):
        x = normal(5000, 20, torch.float32)
        assert equal(of(x), of(x))


class TestMerge:
    def test_associative_and_commutative(self):
        x = normal(1000, 5) + 1e3
        a, b, c = (of(part) for part in x.tensor_split([3, 500]))
        for merged in ((a + b) + c, a + (b + c), c + a + b, sum([a, b, c]), copy.deepcopy(a).merge(b).merge(c)):
            mean, covariance = deviation(merged, x)
            assert mean < 1e-12  # μ = 1e3 σ is rounded by 1e-13 σ
            assert covariance < 1e-11

    def test_with_nothing_and_with_itself(self):
        x = normal(50, 3)
        stats, empty = of(x), GaussianStatistics(3)
        assert equal(stats + empty, stats)
        assert equal(empty + stats, stats)
        assert empty.count == 0  # a sum is a copy
        assert (empty + empty).count == 0
        assert_right(stats.merge(stats), torch.cat([x, x]), torch.float64)

    def test_sums_are_copies(self):
        parts = [of(normal(10, 2)) for _ in range(2)]
        before = parts[0].state_dict()
        total = sum(parts)
        sum(parts[:1]).update(normal(5, 2))
        total.update(normal(5, 2))
        assert all(torch.equal(before[name], x) for name, x in parts[0].state_dict().items())


class TestErrors:
    @pytest.mark.parametrize(
        ("call", "kind", "said"),
        [
            (lambda s: GaussianStatistics(0), ValueError, "d must be an integer >= 1, got 0"),
            (lambda s: s.update(torch.zeros(4)), ValueError, r"x must have shape \[n, 3\], got \(4,\)"),
            (lambda s: s.update(torch.zeros(4, 2)), ValueError, r"x must have shape \[n, 3\], got \(4, 2\)"),
            (lambda s: s.update(torch.zeros(4, 3).int()), TypeError, "x must be float32, float64"),
            (lambda s: s.merge(GaussianStatistics(4)), ValueError, "other must have d = 3, got d = 4"),
            (lambda s: s.merge(3), TypeError, "other must be GaussianStatistics, got int"),
            (lambda s: s + 3, TypeError, "unsupported operand"),
            (lambda s: s.covariance, ValueError, "covariance needs at least 2 samples, got 0"),
            (lambda s: s.load_state_dict({"mean": s.mean}), KeyError, "state must hold count, mean and scatter"),
            (
                lambda s: s.load_state_dict(GaussianStatistics(2).state_dict()),
                ValueError,
                r"state\['mean'\] must have shape \(3,\), got \(2,\)",
            ),
            (
                lambda s: s.load_state_dict(s.state_dict() | {"count": torch.tensor(-1)}),
                ValueError,
                r"state\['count'\] must be an integer >= 0, got -1",
            ),
        ],
    )
    def test_name_the_argument(self, call, kind, said):
        with pytest.raises(kind, match=said):
            call(GaussianStatistics(3))

    def test_without_a_count_there_are_distances_alone(self):
        stats = GaussianStatistics(3)
        stats.load_state_dict({"mean": torch.zeros(3), "covariance": torch.eye(3)})
        own = of(normal(10, 3))
        for name, call in (
            ("self", lambda: stats.update(normal(2, 3))),
            ("other", lambda: own.merge(stats)),
            ("self", lambda: stats.scatter),
        ):
            with pytest.raises(ValueError, match=f"{name} must have a count of samples"):
                call()
        expected = ivfast.frechet_distance(own.mean, own.covariance, stats.mean, torch.eye(3).double())
        assert float(own.frechet_distance(stats)) == float(expected)


def said(stats):
    before = stats.state_dict()
    with pytest.raises(ValueError) as raised:
        stats.all_reduce()
    assert all(torch.equal(before[name], x) for name, x in stats.state_dict().items())
    return str(raised.value)


def rank_main(rank, world, folder):
    x = torch.load(f"{folder}/x.pt")
    mine = x.tensor_split([100])[rank] if rank < 2 else x[:0]  # uneven shares, and a rank that has seen nothing
    stats = GaussianStatistics(x.shape[1]).update(mine).all_reduce()
    other = said(GaussianStatistics(3 if rank == 1 else 2))
    unknown = GaussianStatistics(2)
    if rank == 0:
        unknown.load_state_dict({"mean": torch.zeros(2), "covariance": torch.eye(2)})
    nothing = GaussianStatistics(2).all_reduce().count
    torch.save((stats.count, stats.mean, stats.covariance, other, said(unknown), nothing), f"{folder}/{world}{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_all_reduce_gives_every_rank_the_statistics_of_all_samples(tmp_path):
    x = torch.randn(301, 6, dtype=torch.float64) * 3 + 100
    torch.save(x, tmp_path / "x.pt")
    run_script(__file__, tmp_path)
    for world in (2, 3):
        results = [torch.load(tmp_path / f"{world}{rank}.pt") for rank in range(world)]
        for count, mean, covariance, other, unknown, nothing in results:
            assert count == 301
            assert error(mean, x.mean(0)) < 1e-13
            assert error(covariance, torch.cov(x.mT)) < 1e-12
            assert torch.equal(mean, results[0][1])
            assert torch.equal(covariance, results[0][2])
            assert other == "d must match that of rank 0: 2, got 3 on rank 1"
            assert unknown == "rank 0 has statistics without a count of samples, which cannot be merged"
            assert nothing == 0


if __name__ == "__main__":
    for ranks in (2, 3):
        as_ranks(ranks, functools.partial(rank_main, world=ranks, folder=sys.argv[1]), sys.argv[1])
