"""Streaming statistics across processes."""

import subprocess
import sys

import pytest
import torch

import ivfast
from ivfast.testing import error

RANK = """
import sys, torch, torch.distributed as dist, ivfast
rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
x = torch.load(f"{folder}/x.pt")
mine = x.tensor_split([100])[rank] if rank < 2 else x[:0]  # uneven shares, and a rank that has seen nothing
stats = ivfast.GaussianStatistics(x.shape[1]).update(mine).all_reduce()
torch.save((stats.count, stats.mean, stats.covariance), f"{folder}/{rank}.pt")
dist.barrier()
dist.destroy_process_group()
"""


def test_all_reduce_gives_every_rank_the_statistics_of_all_samples(tmp_path):
    x = torch.randn(301, 6, dtype=torch.float64) * 3 + 100
    torch.save(x, tmp_path / "x.pt")
    command = [sys.executable, "-c", RANK]
    ranks = [subprocess.Popen([*command, str(rank), "3", str(tmp_path)], cwd="/") for rank in range(3)]
    assert [rank.wait(120) for rank in ranks] == [0, 0, 0]
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)]
    for count, mean, covariance in results:
        assert count == 301
        assert error(mean, x.mean(0)) < 1e-13
        assert error(covariance, torch.cov(x.mT)) < 1e-12
        assert torch.equal(mean, results[0][1])


def test_statistics_refuse_what_does_not_fit():
    stats = ivfast.GaussianStatistics(3)
    with pytest.raises(ValueError, match="other must have d = 3, got d = 4"):
        stats.merge(ivfast.GaussianStatistics(4))
