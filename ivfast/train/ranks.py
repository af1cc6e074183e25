"""A run on several ranks of `torch.distributed`, which does what one process does with the same batches.

Every rank has the first one's weights and the same generators in the same states. It draws the order and the noise of
the whole batch and takes its own rows (`Part`). Losses over pairs of samples are those of the whole batch
(`ivfast.distributed`), the others are means over a rank's rows, of which all have equally many: the mean over the ranks
of either, and of its gradient, is the whole batch's. What a network draws by itself (dropout) would be alike on all
ranks, and is refused.
"""

import contextlib
import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import ivfast
from ivfast.ops import _collectives

from .phase import Part, System
from .spread import Ops, OwnDraws, SpreadPart, WholeBatchNorm


class RankLost(RuntimeError):
    """Another rank was killed, or cannot be reached; the message says where the run stands and how to resume it."""


class Ranks:
    """The ranks of the default group, or one that is alone. What they agree on waits for all of them."""

    def __init__(self):
        together = dist.is_available() and dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
        self.first = self.rank == 0
        self.norms: list[tuple[nn.Module, type]] = []  # those of the system, and what they were before

    def take(self, system: System) -> None:
        """Let `system` compute the losses of the whole batch, until `release`.

        Raises:
            ValueError: settings that several ranks cannot follow.
        """
        if self.world == 1:
            return
        settings = system.settings
        if settings.batch_size % (self.world * system.packing):
            packs = f" times packing = {system.packing}" if system.packing > 1 else ""
            raise ValueError(
                f"batch_size must be a multiple of the {self.world} ranks{packs}, got {settings.batch_size}"
            )
        if settings.compile:
            raise ValueError("compile works in one process only: the exchange between ranks is not compiled")
        networks = nn.ModuleDict(system.modules)
        for value in networks.state_dict().values():
            dist.broadcast(value, 0)
        for module in networks.modules():
            if isinstance(module, _BatchNorm):
                self.norms.append((module, type(module)))
                module.__class__ = WholeBatchNorm  # in place: networks refer to their layers by more than one name
        system.part = SpreadPart(self.rank, self.world)
        system.ops = Ops(system.part)

    def release(self, system: System) -> None:
        """Leave `system` as `take` found it."""
        for module, before in self.norms:
            module.__class__ = before
        self.norms = []
        system.part, system.ops = Part(), ivfast

    @contextlib.contextmanager
    def alone(self, system: System) -> Iterator[None]:
        """What one rank does by itself inside, such as an evaluation, draws what one process would."""
        spread = system.part, system.ops
        system.part, system.ops = Part(), ivfast
        try:
            yield
        finally:
            system.part, system.ops = spread

    def checked(self, step: Callable[..., None], where: Callable[[], str]) -> Callable[..., None]:
        """`step`, whose first call raises RuntimeError for numbers that the system draws alike on every rank."""
        if self.world == 1:
            return step
        guard: contextlib.AbstractContextManager = OwnDraws(where)

        def take(*arguments):
            nonlocal guard
            with guard:
                step(*arguments)
            guard = contextlib.nullcontext()

        return take

    @contextlib.contextmanager
    def training(self, out: Path, checkpoint: Callable[[], Path | None]) -> Iterator[None]:
        """Raises RankLost where another rank is lost inside; `checkpoint` is the last one of the run in `out`."""
        try:
            yield
        except _collectives.LostRank as lost:
            last = checkpoint()
            kept = (
                f"the last checkpoint is {last}" if last else "no checkpoint had been written, so the run starts over"
            )
            raise RankLost(
                f"rank {self.rank} of {self.world} lost another one ({lost}); {kept}; "
                f"resume, on any number of ranks, with: ivfast train --resume --out {shlex.quote(str(out))}"
            ) from lost

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
