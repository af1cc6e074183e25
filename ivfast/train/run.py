"""The state of a run and one step of it."""

import contextlib
import functools
import operator
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..data import same_classes
from ..optim import Adam
from . import checkpoint, restore
from .average import Average, floating_state
from .batches import Batches, fits
from .capture import Captured, CudaGraphs, choose, fixed_rate
from .log import Clock
from .phase import Phase, System
from .ranks import Ranks
from .record import Record
from .settings import Settings

# What may differ between a checkpoint and the run that goes on from it: none of it changes a step that has been run.
RESUMABLE = frozenset(name for name, entry in Settings.declared().items() if entry.resumable)


class NonFiniteWeights(ArithmeticError):
    """A weight is NaN or infinite although the losses were not; no checkpoint was written from it."""


class Run:
    """The state of a run, all of which goes into its checkpoint, and one step of it."""

    def __init__(self, system: System, images: Tensor, settings: Settings, out: Path, labels: Tensor | None):
        self.system, self.settings, self.out = system, settings, out
        self.ranks = Ranks()
        self.ranks.take(system)
        self.device = torch.device(settings.device)
        _seed(settings.stream("noise"), self.device)
        self.batches = self.batches_of(images, labels)
        self.total = settings.steps if settings.steps is not None else settings.epochs * self.batches.per_epoch
        system.plan(self.total)
        self.record = Record(settings.log_every, settings.device, self.ranks.mean)
        self.average = Average(system, settings.ema) if settings.ema else None
        self.step, self.seconds = 0, 0.0
        self.checkpoint: Path | None = None  # the last good one
        self.rates = [
            [float(group.get("initial_lr", group["lr"])) for group in phase.optimizer.param_groups]
            for phase in system.phases
        ]
        self.factor = 1.0  # of the milestones, on every rate
        prepare = functools.partial(torch.compile, dynamic=False) if settings.compile else (lambda f: f)
        self.share = prepare(system.share)
        self.losses = [prepare(phase.loss) if phase.compile else phase.loss for phase in system.phases]
        self.fuse()
        self.every_parameter = {p for phase in system.phases for p in phase.parameters}
        self.place = "the batch"  # the part of the step that runs
        captures, self.why = choose(settings)
        self.captured = self._captured() if captures else None
        self.take = self.captured or self.ranks.checked(self.body, lambda: self.place)
        self.said: tuple[bool, str] | None = None

    def _captured(self) -> Captured:
        required = self.settings.capture is True
        captured = Captured(
            self.body,
            lambda: self.place,
            CudaGraphs(self.device),
            required=required,
            watched=not self.settings.compile,
        )
        captured.refuse(fixed_rate(self.system))
        return captured

    def news(self) -> dict[str, object] | None:
        """A line for the log where it has been decided how steps are taken."""
        if self.captured is None:
            now = False, self.why
        elif self.captured.refused:
            now = False, str(self.captured.refused)
        else:
            now = (True, self.why) if self.captured.graphs else self.said
        if now == self.said:
            return None
        self.said = now
        return {"kind": "capture", "step": self.step, "captured": now[0], "why": now[1]}

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

    def fuse(self) -> None:
        """Let optimizers make the gradients of large linear layers, where nothing else looks at those."""
        settings = self.settings
        if self.device.type != "cpu" or settings.precision != "fp32" or settings.compile or self.ranks.world > 1:
            return
        for phase in self.system.phases:
            if phase.compile and isinstance(phase.optimizer, Adam):  # not where a loss differentiates twice
                phase.optimizer.fuse(self.system.modules.values())

    def close(self) -> None:
        """End what runs beside the steps, and leave the system as others take it."""
        self.batches.close()
        self.ranks.release(self.system)
        for phase in self.system.phases:
            if isinstance(phase.optimizer, Adam):
                phase.optimizer.unfuse()

    def advance(self) -> None:
        """One step: what changes goes into tensors that stay in place, then `body` runs, or its graph."""
        if self.step % self.batches.per_epoch == 0 or self.step == 0:
            self.set_rates()
        self.batches.turn()
        if self.average is not None:
            self.average.set_decay(self.step)
        due = tuple(self.step % phase.interval == 0 for phase in self.system.phases)
        self.take(due)
        self.record.count(phase.name for phase, now in zip(self.system.phases, due, strict=True) if now)
        self.step += 1

    def body(self, due: tuple[bool, ...]) -> None:
        """The step on the device: a batch, the shared forward, then each phase that is due."""
        self.place = "the batch"
        batch = self.ranks.rows(self.batches.gather())
        self.place = "the shared forward"
        with self.autocast():
            shared = self.share(*batch)
        terms = {}
        for phase, loss, now in zip(self.system.phases, self.losses, due, strict=True):
            if now:
                self.place = f"phase {phase.name!r}"
                terms[phase.name] = self.update(phase, loss, shared)
        self.place = "the record of losses"
        self.record.write(terms)
        if self.average is not None:
            self.place = "the moving average"
            self.average.update()

    def update(self, phase: Phase, loss: Callable, shared: object) -> dict[str, Tensor]:
        # one autocast per phase: its cache of cast weights must not outlive their update
        with self.only(phase), self.autocast():
            terms = loss(shared)
        phase.optimizer.zero_grad(set_to_none=True)
        total = functools.reduce(operator.add, terms.values())
        total.backward(inputs=phase.parameters, retain_graph=phase.retain_graph)
        self.ranks.average_gradients(phase.parameters)
        phase.optimizer.step()
        return terms

    def only(self, phase: Phase) -> contextlib.AbstractContextManager[None]:
        """A compiled loss differentiates by all that requires gradients, so what the phase does not move must not."""
        return _frozen(self.every_parameter.difference(phase.parameters)) if self.settings.compile else _NOTHING

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        if self.settings.precision == "fp32":
            return _NOTHING
        return _bfloat16(self.device.type)

    def set_rates(self) -> None:
        self.factor = self.settings.learning_rate_factor(self.step // self.batches.per_epoch)
        for phase, rates in zip(self.system.phases, self.rates, strict=True):
            for group, rate in zip(phase.optimizer.param_groups, rates, strict=True):
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate * self.factor)
                else:
                    group["lr"] = rate * self.factor

    def line(self, losses: dict[str, float], clock: Clock) -> dict[str, object]:
        rates = {phase.name: own[0] * self.factor for phase, own in zip(self.system.phases, self.rates, strict=True)}
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
        if not self.ranks.first or (evaluate is None and draw is None):
            return {}
        averaged = _NOTHING if self.average is None else self.average.swapped()
        random = torch.random.fork_rng(devices=cuda_devices(self.settings.device))
        with random, torch.no_grad(), averaged, self.ranks.alone(self.system):
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
        """Write the checkpoint, from finite losses and weights alone: the first rank's, which is the others' too."""
        self.record.read(self.step, self.checkpoint)
        values = floating_state(self.system)
        finite = torch.stack([value.isfinite().all() for value in values.values()])
        if not bool(finite.all()):
            name = list(values)[int((~finite).nonzero()[0])]
            kept = f"the last good checkpoint is {self.checkpoint}" if self.checkpoint else "no checkpoint was written"
            raise NonFiniteWeights(f"the weight {name} is not finite after step {self.step}; {kept}")
        tensors = {
            "weights": checkpoint.weights_of(self.system),
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
            "class_names": list(self.system.class_names),
            "record": self.record.description(),
            "optimizer": checkpoint.optimizer_indices(self.system),
        }
        path = self.out / checkpoint.LAST
        if self.ranks.first:
            flat = {f"{part}/{k}": v for part, values in tensors.items() for k, v in values.items()}
            checkpoint.write(path, flat, about)
        self.checkpoint = path

    def load(self) -> None:
        """Take up the checkpoint in `out`, after a check of all of it.

        Raises:
            CheckpointError: it is not one, damaged, or does not fit this run.
            ValueError: settings that differ from the checkpoint's.
        """
        path = self.out / checkpoint.LAST
        saved = checkpoint.read(path)
        same_settings(self.settings, checkpoint.settings_of(saved, path), f"those in {path}", RESUMABLE)
        if (names := saved.about.get("class_names")) and self.system.class_names:
            same_classes("the data set", self.system.class_names, str(path), names)
        restore.check(self, saved, path)
        checkpoint.load_weights(self.system, saved.part("weights"), path)
        if self.average is not None:
            for name, value in saved.part("average").items():
                self.average.values[name].copy_(value)
        checkpoint.load_optimizers(self.system, saved.part("optimizer"))
        self.batches.load(saved.part("batches"))
        self.record.load(saved.part("record"), saved.about["record"])
        checkpoint.load_random_state(saved.part("random"), self.settings.device)
        self.step, self.seconds, self.checkpoint = saved.about["step"], saved.about["seconds"], path
        self.set_rates()


_NOTHING = contextlib.nullcontext()


@contextlib.contextmanager
def _bfloat16(kind: str) -> Iterator[None]:
    with torch.autocast(kind, dtype=torch.bfloat16):
        yield
    torch.clear_autocast_cache()  # PyTorch keeps it until the outermost autocast ends, which may be the caller's


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
    for name in settings.declared():
        ours, theirs = getattr(settings, name), getattr(other, name, None)  # another system is found at `system`
        if ours != theirs and name not in may_differ:
            raise ValueError(f"settings.{name} must match {whose}: {theirs!r}, got {ours!r}")


def cuda_devices(device: str) -> list[torch.device]:
    return [torch.device(device)] if torch.device(device).type == "cuda" else []


def _seed(seed: int, device: torch.device) -> None:
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
