"""A step of training as a CUDA graph, which repeats the kernels of one step with a single launch.

A graph keeps the arguments that its kernels were captured with, and runs no Python. So a step may read only tensors
that stay where they are, whatever changes from step to step must stand in one of them, and nothing may wait for the
device; `Watch` looks for that. What a step makes itself, gradients included, lies in the graph's own memory.
"""

import functools
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from .phase import System
from .settings import Settings
from .watch import CannotCapture, Watch

WARM_UP = 3  # steps of each pattern of phases before its graph: one fills caches and states, two are compared

Due = tuple[bool, ...]  # which phases run


def choose(settings: Settings) -> tuple[bool, str]:
    """Whether to capture, and why; ValueError where it is asked for and the device has no graphs."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        if settings.capture:
            raise ValueError("capture works in one process only: the exchange between ranks is not captured")
        return False, "ranks exchange data between the kernels"
    if torch.device(settings.device).type != "cuda":
        if settings.capture:
            raise ValueError(f"capture needs a CUDA device, the run is on {settings.device}; use --no-capture")
        return False, f"CUDA graphs need a CUDA device, the run is on {settings.device}"
    if settings.capture is None and settings.compile:
        return False, "compiled phases are captured only with --capture"
    if settings.capture is None:
        return True, "the default on CUDA: one launch per step"
    return settings.capture, "requested by --capture" if settings.capture else "turned off by --no-capture"


def fixed_rate(system: System) -> CannotCapture | None:
    """An optimizer whose learning rate is a number, which a graph would keep whatever the milestones say."""
    for phase in system.phases if system.settings.milestones else ():
        if not all(isinstance(group["lr"], Tensor) for group in phase.optimizer.param_groups):
            reason = "has a number as its learning rate, which milestones change: make it a tensor"
            return CannotCapture(f"phase {phase.name!r}", type(phase.optimizer).__name__, reason)
    return None


class Graphs(Protocol):
    """What captures: `CudaGraphs`, or a stand-in for it in a test."""

    def warm_up(self, body: Callable[[], None]) -> None: ...

    def capture(self, body: Callable[[], None]) -> Callable[[], None]: ...


class CudaGraphs:
    """Graphs on one device that share their memory: a step keeps nothing there that another one reads."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def warm_up(self, body: Callable[[], None]) -> None:
        """Run on the stream that captures, as autograd ties nodes to the stream that made them."""
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            self.stream.wait_stream(current)
            with torch.cuda.stream(self.stream):
                body()
            current.wait_stream(self.stream)

    def capture(self, body: Callable[[], None]) -> Callable[[], None]:
        """A function that repeats `body`, which is not run; the default generator goes on with each repetition."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            body()
        return functools.partial(self._replay, graph)

    def _replay(self, graph: "torch.cuda.CUDAGraph") -> None:
        with torch.cuda.device(self.device):
            graph.replay()


class Captured:
    """Takes steps: of each pattern of phases `WARM_UP` as they are, which count like any other, then by its graph.

    Args:
        body: the step, given which phases are due.
        where: the part of the step that `body` is in.
        required: raise CannotCapture for what the watch finds, after a whole step, rather than go on without graphs.
        watched: look at each call of an operator while warming up; not under `torch.compile`, which it would undo.

    Attributes:
        graphs: pattern -> its graph.
        refused: what kept the step from being captured; None where nothing did.

    Raises:
        CannotCapture: also where the device refuses what the watch let pass.
    """

    def __init__(self, body: Callable[[Due], None], where, graphs: Graphs, *, required: bool, watched: bool = True):
        self.body, self.where, self.maker, self.required, self.watched = body, where, graphs, required, watched
        self.graphs: dict[Due, Callable[[], None]] = {}
        self.refused: CannotCapture | None = None
        self._ran: dict[Due, int] = {}
        self._watches: dict[Due, Watch] = {}

    def __call__(self, due: Due) -> None:
        if self.refused:
            return self.body(due)
        if due not in self.graphs:
            ran = self._ran[due] = self._ran.get(due, 0) + 1
            if ran <= WARM_UP:
                return self._warm_up(due, ran)
            self._capture(due)
        self.graphs[due]()

    def _warm_up(self, due: Due, ran: int) -> None:
        body = functools.partial(self.body, due)
        if not self.watched or ran == 1:
            return self.maker.warm_up(body)
        watch = self._watches.setdefault(due, Watch(self.where))
        self.maker.warm_up(functools.partial(watch.step, body))
        self.refuse(watch.objection)

    def _capture(self, due: Due) -> None:
        self._watches.pop(due, None)  # not under it: what a watch holds makes autograd copy gradients
        try:
            self.graphs[due] = self.maker.capture(functools.partial(self.body, due))
        except RuntimeError as error:
            # no way back: a capture that failed leaves PyTorch's generator in the middle of it
            first = error.__context__ or error  # ending such a capture fails too
            at = traceback.extract_tb(first.__traceback__)[-1]
            reason = f"failed: {str(first).partition(chr(10))[0]}; the system trains with --no-capture"
            op = f"{at.name} ({Path(at.filename).name}:{at.lineno})"
            raise CannotCapture(self.where(), op, reason) from error

    def refuse(self, objection: CannotCapture | None) -> None:
        """Go on without graphs, for good; nothing to be refused changes nothing."""
        if objection is None:
            return
        if self.required:
            raise objection
        self.refused = objection
        self.graphs.clear()
