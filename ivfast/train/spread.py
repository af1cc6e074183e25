"""What a system gets in the place of its own where a batch is spread over ranks: ops, draws and batch norm."""

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

import ivfast
from ivfast import distributed
from ivfast.ops._pairwise import arithmetic

from .phase import Part


class Ops:
    """The ops that a system calls as `self.ops.…`, over the batch of all ranks; noise is this rank's rows of it."""

    def __init__(self, part: Part):
        self._part = part
        whole = "as_distance", "fld", "importance_weighted_loss", "median_bandwidth", "mmd", "multi_js_loss"
        for name in (*whole, "svgd_direction"):
            setattr(self, name, functools.partial(getattr(distributed, name), even=True))

    def __getattr__(self, name: str):
        raise NotImplementedError(f"{name} is not written for a batch that is spread over ranks")

    def blockwise_bridge(self, z: Tensor, t: int) -> Tensor:
        return ivfast.blockwise_bridge(z, t, draws=self._noise(z))

    def radial_bridge(self, z: Tensor, t: int) -> Tensor:
        return ivfast.radial_bridge(z, t, draws=self._noise(z))

    def svgd_bridge(self, z: Tensor, t: int, *, iterations: int = 2, **numbers: float) -> Tensor:
        draws = self._noise(z, (t - 1) * iterations + 1)
        return distributed.svgd_bridge(z, t, iterations=iterations, draws=draws, even=True, **numbers)

    def _noise(self, z: Tensor, *leading: int) -> Tensor:
        """`[*leading, n, d]`"""
        return self._part.draw(torch.randn, (*leading, *z.shape), dim=-2, dtype=z.dtype, device=z.device)


class SpreadPart(Part):
    """A rank's part, whose draws `OwnDraws` lets pass."""

    def draw(self, *arguments, **keywords) -> Tensor:
        with OwnDraws.allowed():
            return super().draw(*arguments, **keywords)


class OwnDraws(TorchDispatchMode):
    """Refuses random numbers inside that no `SpreadPart` draws: they would be the same for the rows of every rank."""

    off = False

    def __init__(self, where: Callable[[], str]):
        super().__init__()
        self.where = where

    @classmethod
    @contextlib.contextmanager
    def allowed(cls) -> Iterator[None]:
        cls.off = True
        try:
            yield
        finally:
            cls.off = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if torch.Tag.nondeterministic_seeded in function.tags and not self.off:
            name = function._schema.name.partition("::")[2]
            raise RuntimeError(
                f"{self.where()} calls {name}, which draws the same numbers on every rank: draw by System.randn, "
                "randn_like, rand, randint or part.draw"
            )
        return function(*args, **(kwargs or {}))


class WholeBatchNorm(_BatchNorm):
    """Batch norm by the mean and the variance over the rows of all ranks, of which each has equally many.

    Not nn.SyncBatchNorm, which needs CUDA.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        """Any `[n, C, ...]`."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        dims, shape = [d for d in range(x.dim()) if d != 1], [1, -1, *[1] * (x.dim() - 2)]
        wide = arithmetic(x)
        n = dist.get_world_size() * x.numel() // x.shape[1]
        mean = distributed.exchange.total(wide.sum(dims), None) / n
        centred = wide - mean.view(shape)
        variance = distributed.exchange.total(centred.square().sum(dims), None) / n
        self._follow(mean.detach(), variance.detach() * (n / (n - 1)))
        y = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)

    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics, where there are any."""
        if self.running_mean is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)
