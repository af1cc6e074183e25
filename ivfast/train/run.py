"""The state of a run and one step of it."""

import contextlib
import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from . import checkpoint
from .average import Average, floating_state
from .batches import Batches, fits
from .checkpoint import CheckpointError
from .log import Clock
from .phase import Phase, System
from .record import Record
from .settings import Settings

# What may differ between a checkpoint and the run that goes on from it: none of it changes a step that has been run.
RESUMABLE = frozenset(
    ("epochs", "steps", "root", "device", "data_memory", "compile", "evaluate_every", "save_every", "tensorboard")
)  # fmt: skip


class NonFiniteWeights(ArithmeticError):
    """A weight is NaN or infinite although the losses were not; no checkpoint was written from it."""


class Run:
    """The state of a run, all of which goes into its checkpoint, and one step of it."""

    def __init__(self, system: System, images: Tensor, settings: Settings, out: Path, labels: Tensor | None):
        self.system, self.settings, self.out = system, settings, out
        self.device = torch.device(settings.device)
        _seed(settings.stream("noise"), self.device)
        self.batches = self.batches_of(images, labels)
        self.record = Record(settings.log_every, settings.device)
        self.average = Average(system, settings.ema) if settings.ema else None
        self.step, self.seconds = 0, 0.0
        self.checkpoint: Path | None = None  # the last good one
        self.rates = [[group["lr"] for group in phase.optimizer.param_groups] for phase in system.phases]
        prepare = functools.partial(torch.compile, dynamic=False) if settings.compile else (lambda f: f)
        self.share = prepare(system.share)
        self.losses = [prepare(phase.loss) if phase.compile else phase.loss for phase in system.phases]
        self.every_parameter = {p for phase in system.phases for p in phase.parameters}

    def batches_of(self, images: Tensor, labels: Tensor | None) -> Batches:
        """Batches of images that live on the device, or of those that do not fit there."""
        settings, stream_to = self.settings, None
        if images.device.type == "cpu":
            if fits(images, self.device, settings.data_memory):
                images = images.to(self.device)
            else:
                stream_to = self.device
        seed = settings.stream("order")
        return Batches(images, settings.batch_size, seed, labels, flip=settings.flip, stream_to=stream_to)

    def advance(self) -> None:
        """One step: a batch, the shared forward, then each phase that is due."""
        if self.step % self.batches.per_epoch == 0 or self.step == 0:
            self.set_rates()
        batch = self.batches.next()
        with self.autocast():
            shared = self.share(*batch)
        terms = {}
        for phase, loss in zip(self.system.phases, self.losses, strict=True):
            if self.step % phase.interval == 0:
                terms[phase.name] = self.update(phase, loss, shared)
        self.record.write(terms)
        if self.average is not None:
            self.average.update(self.step)
        self.step += 1

    def update(self, phase: Phase, loss: Callable, shared: object) -> dict[str, Tensor]:
        # one autocast per phase: its cache of cast weights must not outlive their update
        with self.only(phase), self.autocast():
            terms = loss(shared)
        phase.optimizer.zero_grad(set_to_none=True)
        total = functools.reduce(operator.add, terms.values())
        total.backward(inputs=phase.parameters, retain_graph=phase.retain_graph)
        phase.optimizer.step()
        return terms

    def only(self, phase: Phase) -> contextlib.AbstractContextManager[None]:
        """A compiled loss differentiates by all that requires gradients, so what the phase does not move must not."""
        return _frozen(self.every_parameter.difference(phase.parameters)) if self.settings.compile else _NOTHING

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        if self.settings.precision == "fp32":
            return _NOTHING
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def set_rates(self) -> None:
        factor = self.settings.learning_rate_factor(self.step // self.batches.per_epoch)
        for phase, rates in zip(self.system.phases, self.rates, strict=True):
            for group, rate in zip(phase.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor

    def line(self, losses: dict[str, float], clock: Clock) -> dict[str, object]:
        rates = {phase.name: phase.optimizer.param_groups[0]["lr"] for phase in self.system.phases}
        seconds, steps_per_second = clock.read(self.step)
        return {
            "kind": "losses",
            "step": self.step,
            "epoch": (self.step - 1) // self.batches.per_epoch + 1,
            "losses": losses,
            "learning_rates": rates,
            "images_per_second": steps_per_second * self.settings.batch_size,
            "seconds": seconds,
        }

    def look(self, evaluate, draw, epoch: int) -> dict[str, float]:
        """Metrics and pictures: on averaged weights, in evaluation mode, without a trace in the random state."""
        if evaluate is None and draw is None:
            return {}
        averaged = _NOTHING if self.average is None else self.average.swapped()
        with torch.random.fork_rng(devices=cuda_devices(self.settings.device)), torch.no_grad(), averaged:
            self.system.train(False)
            try:
                metrics = {} if evaluate is None else dict(evaluate(self.system))
                if draw is not None:
                    folder = self.out / "pictures"
                    folder.mkdir(exist_ok=True)
                    draw(self.system, folder, epoch)
            finally:
                self.system.train()
        return metrics

    def save(self, clock: Clock) -> None:
        """Write the checkpoint, from finite losses and weights alone."""
        self.record.read(self.step, self.checkpoint)
        values = floating_state(self.system)
        finite = torch.stack([value.isfinite().all() for value in values.values()])
        if not bool(finite.all()):
            name = list(values)[int((~finite).nonzero()[0])]
            kept = f"the last good checkpoint is {self.checkpoint}" if self.checkpoint else "no checkpoint was written"
            raise NonFiniteWeights(f"the weight {name} is not finite after step {self.step}; {kept}")
        tensors = {
            "weights": torch.nn.ModuleDict(self.system.modules).state_dict(),
            "average": {} if self.average is None else self.average.values,
            "optimizer": checkpoint.optimizer_tensors(self.system),
            "batches": self.batches.state(),
            "record": self.record.state(),
            "random": checkpoint.random_state(self.settings.device),
        }
        about = {
            "step": self.step,
            "seconds": clock.seconds(),
            "settings": self.settings.to_dict(),
            "image_shape": list(self.system.image_shape),
            "record": self.record.description(),
        }
        path = self.out / checkpoint.LAST
        checkpoint.write(path, {f"{part}/{k}": v for part, values in tensors.items() for k, v in values.items()}, about)
        self.checkpoint = path

    def load(self) -> None:
        """Take up the checkpoint in `out`."""
        path = self.out / checkpoint.LAST
        saved = checkpoint.read(path)
        same_settings(self.settings, checkpoint.settings_of(saved, path), f"those in {path}", RESUMABLE)
        checkpoint.load_weights(self.system, saved.part("weights"), path)
        if self.average is not None:
            for name, value in saved.part("average").items():
                self.average.values[name].copy_(value)
        checkpoint.load_optimizers(self.system, saved.part("optimizer"))
        try:
            self.batches.load(saved.part("batches"))
        except ValueError as error:
            raise CheckpointError(path, str(error)) from error
        self.record.load(saved.part("record"), saved.about["record"])
        checkpoint.load_random_state(saved.part("random"), self.settings.device)
        self.step, self.seconds, self.checkpoint = saved.about["step"], saved.about["seconds"], path
        self.set_rates()


_NOTHING = contextlib.nullcontext()


@contextlib.contextmanager
def _frozen(parameters) -> Iterator[None]:
    """None of `parameters` requires gradients inside."""
    moved = [p for p in parameters if p.requires_grad]
    for p in moved:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in moved:
            p.requires_grad_(True)


def same_settings(settings: Settings, other: Settings, whose: str, may_differ: frozenset[str]) -> None:
    for field in dataclasses.fields(Settings):
        ours, theirs = getattr(settings, field.name), getattr(other, field.name)
        if ours != theirs and field.name not in may_differ:
            raise ValueError(f"settings.{field.name} must match {whose}: {theirs!r}, got {ours!r}")


def cuda_devices(device: str) -> list[torch.device]:
    return [torch.device(device)] if torch.device(device).type == "cuda" else []


def _seed(seed: int, device: torch.device) -> None:
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
