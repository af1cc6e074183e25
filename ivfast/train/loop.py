"""The only training loop. It knows phases, and nothing about models."""

import contextlib
import shlex
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .. import _defaults, _extra
from . import checkpoint, lock
from .checkpoint import CheckpointError
from .lock import RunInUse
from .log import Bar, Clock, Log, Quiet
from .phase import System
from .ranks import RankLost
from .record import NonFiniteLoss
from .run import RESUMABLE, NonFiniteWeights, Run, cuda_devices, same_settings
from .settings import Settings
from .watch import CannotCapture

__all__ = [
    "CannotCapture",
    "CheckpointError",
    "Interrupted",
    "NonFiniteLoss",
    "NonFiniteWeights",
    "RankLost",
    "RunInUse",
    "fit",
]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, SIGTERM or SIGHUP: the step was finished and the run saved.

    Attributes: out, step (where the run stands), signal (its number), history (the lines of the log).
    """

    def __init__(self, out: Path, step: int, number: int = signal.SIGINT, history: list | None = None):
        self.out, self.step, self.signal, self.history = out, step, number, history or []
        super().__init__(f"stopped after step {step}; resume with: ivfast train --resume --out {shlex.quote(str(out))}")


@_defaults.initial()
def fit(
    system: System,
    images: Tensor,
    settings: Settings,
    out: Path | str,
    *,
    labels: Tensor | None = None,
    resume: bool = False,
    evaluate: Callable[[System], dict[str, float]] | None = None,
    draw: Callable[[System, Path, int], None] | None = None,
    progress: bool = True,
) -> list[dict[str, object]]:
    """Train `system` on `images` and keep the run in the folder `out`.

    Writes `config.json`, `log.jsonl`, `tensorboard/`, `pictures/` and `checkpoints/last.safetensors`. PyTorch's global
    generators are left as they were; a default dtype, a default device and autocast of the caller do not reach inside.
    The same settings give the same run, and on the CPU a run that was stopped, or killed at any moment, and resumed
    gives the same bits.

    Where a group of `torch.distributed` is there, every rank calls with all the images, trains on its rows of each
    batch of `settings.batch_size`, and the first writes the run, which can be resumed on another number of ranks. Only
    its lines have metrics. Ctrl-C then takes effect at the next line of the log; a loss that is NaN on one rank stops
    all.

    Args:
        system: what `ivfast.models.build(settings, image_shape)` returned.
        images: uint8 `[N, C, H, W]` on the system's device or on the host, from where they are moved if they fit into
            `settings.data_memory`, else prefetched (floating tensors `[N, ...]` are passed on unscaled).
        settings: those that the system was built from.
        out: the run's folder; made where it does not exist.
        labels: int64 `[N]` for systems that read them (`System.labels`), None for others; `System.share` then gets
            (x, labels).
        resume: go on from the checkpoint in `out`; from the beginning where the run was killed before its first.
        evaluate: called with the system in evaluation mode, without gradients and on the averaged weights where EMA is
            on; returns metrics by name. Every `settings.evaluate_every` epochs and at the end.
        draw: called beside it with the system, the folder for pictures and the number of epochs completed.
        progress: show a bar.

    Returns:
        The lines of log.jsonl (see `Log`).

    Raises:
        ValueError: images of another shape or device, fewer than a batch; labels that are missing, out of range or
            not read; settings that differ from the system's or the checkpoint's; `settings.capture` where there are
            no CUDA graphs.
        CannotCapture: `settings.capture` is True and a step cannot be captured, or the device refused to; the message
            says where and why.
        FileExistsError: `out` already holds a run and `resume` is False.
        RunInUse: another process trains in `out`.
        PackageNotFound: tensorboard is not installed, and `settings.tensorboard` is True.
        NonFiniteLoss, NonFiniteWeights: training blew up; the last good checkpoint is kept.
        RankLost: another rank was killed; the message says how to resume.
        CheckpointError: a checkpoint cannot be written or read.
        Interrupted: a KeyboardInterrupt, after Ctrl-C, SIGTERM or SIGHUP (the terminal was closed); a further Ctrl-C
            stops at once.
    """
    out = Path(out)
    same_settings(settings, system.settings, "those that the system was built from", RESUMABLE - {"device"})
    _check_images(images, system)
    _check_labels(labels, system)
    _check_folder(out, resume)
    if settings.tensorboard:
        _extra.check("settings.tensorboard", "tensorboard")
    with torch.random.fork_rng(devices=cuda_devices(settings.device)):
        run = Run(system, images, settings, out, labels)
        with lock.held(out) if run.ranks.first else contextlib.nullcontext():
            _check_folder(out, resume)  # as the process left it that held the lock before
            if resume and (out / checkpoint.LAST).exists():
                run.load()
            if run.ranks.first:
                settings.save(out / "config.json")
            with run.ranks.training(out, lambda: run.checkpoint):
                return _train(run, resume, evaluate, draw, progress)


def _check_folder(out: Path, resume: bool) -> None:
    last = out / checkpoint.LAST
    if not resume and last.exists():
        raise FileExistsError(f"{out} already holds a run: resume it, or choose another folder")
    if resume and not last.exists() and not (out / "config.json").exists():
        raise CheckpointError(last, "the file does not exist")


def _check_images(images: Tensor, system: System) -> None:
    if tuple(images.shape[1:]) != system.image_shape:
        raise ValueError(f"images must have shape [N, {str(system.image_shape)[1:-1]}], got {tuple(images.shape)}")
    if images.device.type not in ("cpu", torch.device(system.settings.device).type):
        raise ValueError(f"images must be on the host or on {system.settings.device}, got {images.device}")


def _check_labels(labels: Tensor | None, system: System) -> None:
    name = system.settings.system
    if system.labels == "none":
        if labels is not None:
            raise ValueError(f"labels must be None: {name} does not read labels")
        return
    if labels is None:
        raise ValueError(f"labels must be given: {name} learns from them")
    classes = system.settings.classes
    lowest, highest = int(labels.min()), int(labels.max())
    least = 0 if system.labels == "all" else -1
    if not least <= lowest <= highest < classes:
        unknown = f"; −1 stands for no label, and {name} needs one for every image" if lowest == -1 else ""
        raise ValueError(f"labels must be {least}..{classes - 1}, got {lowest}..{highest}{unknown}")


def _train(run: Run, resume: bool, evaluate, draw, progress: bool) -> list[dict[str, object]]:
    settings, per_epoch, total = run.settings, run.batches.per_epoch, run.total
    ranks, log = run.ranks, Quiet()
    if ranks.first:
        log = Log(run.out, tensorboard=settings.tensorboard, resume_at=run.step if resume else None)
    run.system.train()
    with (
        log,
        contextlib.closing(run),
        Bar(total, run.step, shown=progress and ranks.first) as bar,
        _Interrupt() as interrupt,
    ):
        if run.batches.stream_to is not None:
            bar.note(
                f"the {len(run.batches.images):,} training images stay on the host, and their batches are prefetched"
            )

        def look_is_due() -> bool:
            return run.step == total or run.step % (per_epoch * settings.evaluate_every) == 0

        def look() -> None:
            metrics = run.look(evaluate, draw, epoch := run.step // per_epoch)
            if metrics:
                log.write({"kind": "metrics", "step": run.step, "epoch": epoch, "metrics": metrics})

        if run.step and look_is_due() and not log.has_metrics(run.step):  # stopped between the checkpoint and the look
            look()
        clock = Clock(run.seconds, run.step)
        while run.step < total:
            run.advance()
            if news := run.news():
                log.write(news)
                if run.device.type == "cuda":
                    bar.note(f"{'captured' if news['captured'] else 'not captured'}: {news['why']}")
            last = run.step == total
            logged = run.step % settings.log_every == 0 or last
            if logged:
                losses = run.record.read(run.step, run.checkpoint)
                line = run.line(losses, clock)
                if run.step % settings.log_every == 0:
                    run.record.clear()
                else:
                    line["partial"] = True
                log.write(line)
                bar.report(run.step, losses, line["images_per_second"])
            bar.at(run.step)
            # ranks hear of a signal at different steps, and agree where they wait for each other anyway
            if (ranks.world == 1 or logged) and (number := ranks.largest(interrupt.signal, run.device)):
                run.save(clock)
                raise Interrupted(run.out, run.step, number, log.history)
            with clock.paused():
                if last or run.step % (per_epoch * settings.save_every) == 0:
                    run.save(clock)
                if look_is_due():
                    look()
    return log.history


class _Interrupt:
    """Notes a SIGINT, SIGTERM or SIGHUP, so that the step can be finished; a SIGINT after that raises
    KeyboardInterrupt."""

    def __init__(self):
        self.signal = 0  # the first one's number
        self.previous = {}

    def _handle(self, number, frame) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or number

    def __enter__(self) -> "_Interrupt":
        numbers = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
            numbers.append(signal.SIGHUP)
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not one of Python's
