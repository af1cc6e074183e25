"""Streaming Gaussian statistics of features, as Fréchet distances need them."""

import torch
from torch import Tensor

from . import _check


class GaussianStatistics:
    """Mean and covariance of samples that come in batches, by Chan's merge in float64: no Σxxᵀ − nμμᵀ.

    Args:
        d: dimension of a sample.
        device: where the statistics live.

    Source: Chan, Golub & LeVeque 1983.
    """

    def __init__(self, d: int, *, device: torch.device | str = "cpu"):
        _check.count("d", d)
        self.count = 0
        self.mean = torch.zeros(d, dtype=torch.float64, device=device)  # [d]
        self.scatter = torch.zeros(d, d, dtype=torch.float64, device=device)  # Σ (x − μ)(x − μ)ᵀ, [d, d]

    @torch.no_grad()
    def update(self, x: Tensor) -> "GaussianStatistics":
        """Take in a batch of samples `[n, d]`; raises ValueError for another d."""
        _check.floating("x", x)
        if x.dim() != 2 or x.shape[1] != self.mean.shape[0]:
            raise ValueError(f"x must have shape [n, {self.mean.shape[0]}], got {tuple(x.shape)}")
        if x.shape[0]:
            x = x.to(self.mean)
            mean = x.mean(0)
            self._merge(x.shape[0], mean, (x - mean).mT @ (x - mean))
        return self

    def merge(self, other: "GaussianStatistics") -> "GaussianStatistics":
        """Take in what `other` has seen."""
        if other.mean.shape != self.mean.shape:
            raise ValueError(f"other must have d = {self.mean.shape[0]}, got d = {other.mean.shape[0]}")
        if other.count:
            self._merge(other.count, other.mean.to(self.mean), other.scatter.to(self.scatter))
        return self

    def _merge(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.count + count
        delta = mean - self.mean
        self.scatter = self.scatter + scatter + torch.outer(delta, delta) * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total

    def all_reduce(self, group=None) -> "GaussianStatistics":
        """Merge the statistics of every rank of a `torch.distributed` group, in rank order, into each of them."""
        import torch.distributed as dist

        ranks = dist.get_world_size(group)
        packed = torch.cat((self.mean.new_tensor([self.count]), self.mean, self.scatter.flatten()))
        gathered = [torch.empty_like(packed) for _ in range(ranks)]
        dist.all_gather(gathered, packed, group=group)
        d = self.mean.shape[0]
        self.__init__(d, device=self.mean.device)
        for parts in gathered:
            if parts[0] > 0:
                self._merge(int(parts[0]), parts[1 : d + 1], parts[d + 1 :].view(d, d))
        return self

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance `[d, d]` in float64; raises ValueError before the second sample."""
        if self.count < 2:
            raise ValueError(f"covariance needs at least 2 samples, got {self.count}")
        return self.scatter / (self.count - 1)
