"""Losses on the device: written every step without waiting for it, read and checked once per log interval."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .phase import Phase


class NonFiniteLoss(ArithmeticError):
    """A term of a loss became NaN or infinite.

    Attributes: term, phase, step (the number of steps completed with it, so from 1), value, checkpoint (the last
    good one's path, or None).
    """

    def __init__(self, term: str, phase: str, step: int, value: float, checkpoint=None):
        self.term, self.phase, self.step, self.value, self.checkpoint = term, phase, step, value, checkpoint
        kept = f"the last good checkpoint is {checkpoint}" if checkpoint else "no checkpoint was written before"
        super().__init__(f"the term {term!r} of phase {phase!r} became {value} at step {step}; {kept}")


class Record:
    """A buffer `[log_every, terms]` on `device`, with a column for each term of each phase.

    `mean` is over the ranks of a run, of which each writes its own losses.
    """

    def __init__(self, log_every: int, device: str, mean: Callable[[Tensor], Tensor] = lambda values: values):
        self.log_every, self.device, self.mean = log_every, device, mean
        self.names: list[tuple[str, str]] = []  # (phase, term)
        self.values = torch.empty(0)
        self.zero = torch.zeros((), device=device)
        self.row = torch.zeros(1, dtype=torch.int64, device=device)  # `rows` on the device: a captured step counts on
        self.rows = 0
        self.ran: dict[str, int] = {}  # phase -> steps of this interval in which it ran

    def name(self, terms: dict[str, dict[str, Tensor]]) -> None:
        """Make a column for each of `terms`; the first step, in which every phase runs, calls this."""
        self.names = [(phase, term) for phase, values in terms.items() for term in values]
        self.values = torch.zeros(self.log_every, len(self.names), device=self.device)

    def write(self, terms: dict[str, dict[str, Tensor]]) -> None:
        """One step on the device: phase -> term -> scalar. Phases that did not run are absent."""
        if not self.names:
            self.name(terms)
        row = []
        for phase, term in self.names:
            values = terms.get(phase)
            row.append(self.zero if values is None else values[term].detach().float())
        self.values.index_copy_(0, self.row, torch.stack(row).unsqueeze(0))
        self.row.add_(1)

    def count(self, phases: Iterable[str]) -> None:
        """The same step on the host: the phases that ran."""
        for phase in phases:
            self.ran[phase] = self.ran.get(phase, 0) + 1
        self.rows += 1

    def read(self, step: int, checkpoint=None) -> dict[str, float]:
        """Means since the last `clear` by "phase/term", after a check of each entry; `step` is the last one's number.

        This waits for the device. Raises NonFiniteLoss for the first entry that is not finite.
        """
        values = self.mean(self.values[: self.rows]).to("cpu", torch.float64)
        finite = values.isfinite()
        if not bool(finite.all()):
            row, column = (int(i) for i in (~finite).nonzero()[0])
            phase, term = self.names[column]
            raise NonFiniteLoss(term, phase, step - self.rows + row + 1, float(values[row, column]), checkpoint)
        total = values.sum(0).tolist()
        return {
            f"{phase}/{term}": total[i] / self.ran[phase] if self.ran.get(phase) else math.nan
            for i, (phase, term) in enumerate(self.names)
            if self.ran.get(phase)
        }

    def clear(self) -> None:
        self.rows, self.ran = 0, {}
        self.row.zero_()

    def state(self) -> dict[str, Tensor]:
        return {"values": self.mean(self.values[: self.rows])}

    def description(self) -> dict[str, object]:
        return {"names": [list(name) for name in self.names], "ran": dict(self.ran)}

    def check(self, state: dict[str, Tensor], description: dict, step: int, phases: Iterable[Phase]) -> None:
        """Raises ValueError for a state, of the right shape, that is not one after `step` steps of `phases`."""
        values, names, rows = state["values"], [tuple(name) for name in description["names"]], len(state["values"])
        intervals = {phase.name: phase.interval for phase in phases}
        if len({*names}) != len(names) or {phase for phase, _ in names} != intervals.keys():
            raise ValueError(f"the field record.names must be of losses of {[*intervals]}, each once, it is {names}")
        ran = {phase: sum(i % every == 0 for i in range(step - rows, step)) for phase, every in intervals.items()}
        ran = {phase: count for phase, count in ran.items() if count}
        if description["ran"] != ran:
            raise ValueError(f"the field record.ran must be {ran} after step {step}, it is {description['ran']}")
        if not bool(values.isfinite().all()):
            raise ValueError("the tensor record/values must be finite, it has NaN or infinity")

    def load(self, state: dict[str, Tensor], description: dict[str, object]) -> None:
        self.names = [(phase, term) for phase, term in description["names"]]
        self.ran = dict(description["ran"])
        self.values = torch.zeros(self.log_every, len(self.names), device=self.device)
        self.rows = len(state["values"])
        self.row.fill_(self.rows)
        self.values[: self.rows] = state["values"].to(self.device)
