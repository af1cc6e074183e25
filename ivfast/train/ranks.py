"""A run on several ranks of `torch.distributed`, which does what one process does with the same batches.

Every rank has the same weights and the same generators in the same states. It draws the order and the noise of the
whole batch and takes its own rows. Losses over pairs of samples are those of the whole batch (`ivfast.distributed`),
the others are means over a rank's rows, of which all have equally many: the mean over the ranks of either, and of its
gradient, is the whole batch's. What a network draws by itself (dropout) is alike on all ranks.
"""

import functools
import os
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

import ivfast
from ivfast import distributed
from ivfast.ops import _collectives

from .phase import System


class Ranks:
    """The ranks of the default group, or one that is alone. What they agree on waits for all of them."""

    def __init__(self):
        together = dist.is_available() and dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
        self.first = self.rank == 0

    def take(self, system: System) -> None:
        """Let `system` compute the losses of the whole batch.

        Raises:
            ValueError: settings that several ranks cannot follow.
        """
        if self.world == 1:
            return
        settings = system.settings
        if settings.batch_size % self.world:
            raise ValueError(f"batch_size must be a multiple of the {self.world} ranks, got {settings.batch_size}")
        if settings.compile:
            raise ValueError("compile works in one process only: the exchange between ranks is not compiled")
        for name, module in system.modules.items():
            if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules()):
                if torch.device(settings.device).type != "cuda":
                    raise ValueError(f"{name} normalises over the batch, which works across ranks only on CUDA devices")
                system.modules[name] = nn.SyncBatchNorm.convert_sync_batchnorm(module)
        system.ops = Ops(self)

    def rows(self, whole: Sequence[Tensor]) -> Sequence[Tensor]:
        """This rank's rows of each tensor of a batch."""
        return [x.chunk(self.world)[self.rank] for x in whole] if self.world > 1 else whole

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by its mean over the ranks, in one flat exchange.

        Not DistributedDataParallel: a phase goes backward by its own parameters alone (`backward(inputs=…)`), through
        networks that are not called from one forward, and DDP's hooks run for neither.
        """
        if self.world == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        _collectives.all_reduce(flat)
        flat /= self.world
        parts = flat.split([g.numel() for g in gradients])
        torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])

    def mean(self, x: Tensor) -> Tensor:
        """The mean over the ranks: NaN on all where it is NaN on one."""
        if self.world == 1:
            return x
        x = x.clone()
        _collectives.all_reduce(x)
        return x / self.world

    def largest(self, number: int, device: torch.device | str) -> int:
        if self.world == 1:
            return number
        numbers = torch.tensor(number, device=device)
        _collectives.all_reduce(numbers, "MAX")
        return int(numbers)

    def same(self, value: object) -> object:
        """The first rank's value."""
        if self.world == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def first_alone(self, function: Callable[[], object]) -> object:
        """Call `function` on the first rank before the others, which then find on disk what it has left there."""
        if self.world > 1 and not self.first:
            dist.barrier()
        result = function()
        if self.world > 1 and self.first:
            dist.barrier()
        return result


class Ops:
    """The ops that a system calls as `self.ops.…`, over the batch of all ranks; noise is this rank's rows of it."""

    def __init__(self, ranks: Ranks):
        self._ranks = ranks
        for name in ("as_distance", "fld", "median_bandwidth", "mmd", "multi_js_loss", "svgd_direction"):
            setattr(self, name, functools.partial(getattr(distributed, name), even=True))

    def __getattr__(self, name: str):
        raise NotImplementedError(f"{name} does not support a batch that is split over ranks")

    def blockwise_bridge(self, z: Tensor, t: int) -> Tensor:
        return ivfast.blockwise_bridge(z, t, draws=self.randn_like(z))

    def radial_bridge(self, z: Tensor, t: int) -> Tensor:
        return ivfast.radial_bridge(z, t, draws=self.randn_like(z))

    def svgd_bridge(self, z: Tensor, t: int, *, iterations: int = 2, **numbers: float) -> Tensor:
        draws = self._draws((t - 1) * iterations + 1, *z.shape, like=z)
        return distributed.svgd_bridge(z, t, iterations=iterations, draws=draws, even=True, **numbers)

    def randn_like(self, z: Tensor) -> Tensor:
        return self._draws(*z.shape, like=z)

    def _draws(self, *shape: int, like: Tensor) -> Tensor:
        """This rank's rows of standard normal draws, which have its `shape [..., n, d]`."""
        *leading, n, d = shape
        whole = torch.randn(*leading, n * self._ranks.world, d, dtype=like.dtype, device=like.device)
        return whole.narrow(-2, n * self._ranks.rank, n)


def join(device: str) -> Ranks:
    """Join the group that `torchrun` describes in the environment; one process is alone.

    Raises:
        ValueError: a device by number, where each rank takes the GPU of its own.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ and not dist.is_initialized():
        cuda = torch.device(device).type == "cuda"
        if cuda:
            if torch.device(device).index is not None:
                raise ValueError(f"--device must be cpu or cuda under torchrun, got {device}")
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if cuda else "gloo")
    return Ranks()


def leave() -> None:
    """Leave the group, where there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
