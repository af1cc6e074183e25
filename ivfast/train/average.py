"""Exponential moving average of the weights."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from .phase import System


class Average:
    """The moving average of every parameter and floating buffer of a system.

    avg ← avg + (1 − β)(weight − avg) with β = min(decay, (1 + step)/(10 + step)), which forgets the initial weights.
    """

    def __init__(self, system: System, decay: float):
        self.decay = decay
        self.live = floating_state(system)
        self.values = {name: value.detach().clone() for name, value in self.live.items()}
        self._live, self._values = list(self.live.values()), list(self.values.values())
        self.beta: float | None = None
        # 1 − β as a tensor, so that a captured step can follow it
        self.weights = {value.dtype: value.new_empty(()) for value in self._values}
        self._weights = [self.weights[value.dtype] for value in self._values]

    def set_decay(self, step: int) -> None:
        """`step` is the number of steps completed before the next `update`."""
        beta = min(self.decay, (1 + step) / (10 + step))
        if beta != self.beta:
            self.beta = beta
            for weight in self.weights.values():
                weight.fill_(1 - beta)

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(self._values, self._live, self._weights)

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """The system runs on its averaged weights inside, and gets its own back bit for bit."""
        kept = [value.clone() for value in self._live]
        try:
            with torch.no_grad():
                torch._foreach_copy_(self._live, self._values)
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self._live, kept)


def floating_state(system: System) -> dict[str, Tensor]:
    """Parameters and floating buffers by name, a shared one once, as tensors that do not require gradients."""
    tree = torch.nn.ModuleDict(system.modules)
    named = [*tree.named_parameters(), *tree.named_buffers()]
    return {name: value.detach() for name, value in named if value.is_floating_point()}
