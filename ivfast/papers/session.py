"""What an experiment receives (options, data, stored runs) and returns (tables, figures, notes)."""

import dataclasses
import functools
import json
import math
import multiprocessing
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .. import _check, data, models, runs
from ..train.loop import NonFiniteLoss, NonFiniteWeights, fit
from ..train.phase import System
from ..train.settings import Settings
from . import Experiment, find

ROWS = "rows.jsonl"
ELSEWHERE = ("root", "device")  # settings for where a run takes place, not what it computes


class Spread(NamedTuple):
    """A measured value over seeds."""

    values: tuple[float, ...]
    diverged: int = 0

    def __str__(self) -> str:
        lost = f"{self.diverged} diverged" if self.diverged else ""
        if not self.values:
            return lost or "–"
        if not all(map(math.isfinite, self.values)):  # such as the KL of a histogram without samples
            return ", ".join(filter(None, (*(f"{value:.4g}" for value in self.values), lost)))
        text = f"{statistics.fmean(self.values):.4g}"
        if len(self.values) > 1:
            text += f" ± {statistics.stdev(self.values):.2g}"
        return ", ".join(filter(None, (text, lost)))


Cell = str | float | Spread | None


class Table(NamedTuple):
    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Cell, ...]]


class Findings(NamedTuple):
    tables: list[Table]
    figures: dict[str, Path]  # what it shows -> PNG
    notes: list[str] = []  # noqa: RUF012


class Job(NamedTuple):
    """One training run with one seed; `extra` holds everything else that its values depend on, JSON-serialisable."""

    settings: Settings
    extra: dict[str, object] = {}  # noqa: RUF012

    def key(self) -> dict[str, object]:
        settings = {k: v for k, v in self.settings.to_dict().items() if k not in ELSEWHERE}
        return json.loads(json.dumps({"settings": settings, **self.extra}))


class Values(NamedTuple):
    """The result of a job; `values` has only "diverged" if training diverged."""

    job: Job
    values: dict[str, object]


@dataclass
class Session:
    """Options of one run of an experiment.

    Attributes:
        seeds: the seeds that each system is trained with.
        full: the paper's size; becomes False if the paper's data is not found.
        data: name of the data set.
        steps, samples: override the experiment's number of steps per training and probe, and of samples per value.
        workers: processes that train in parallel.
    """

    experiment: Experiment
    seeds: tuple[int, ...]
    full: bool
    data: str
    root: str
    device: str
    out: Path
    steps: int | None
    samples: int | None
    workers: int
    download: bool
    console: Console
    notes: list[str] = field(default_factory=list)

    def say(self, note: str) -> None:
        """Print a note now, and add it to the report."""
        self.notes.append(note)
        self.console.print(f"[yellow]{note}[/yellow]", soft_wrap=True)

    def load(self, system: str) -> data.Dataset:
        """The data set at the size of the system's preset. If its files are missing, the experiment says so and uses
        its small data set, at the small size."""
        models.check_data(system, self.data)
        try:
            size = models.preset(system, self.data).image_size
            return data.load(self.data, self.root, size, download=self.download)
        except data.DataNotFound as error:
            if self.data == self.experiment.data:
                raise
            self.say(f"{error} Running on {self.experiment.data} instead, at the small size.")
            self.data, self.full = self.experiment.data, False
            return data.load(self.data)

    def need_labels(self, dataset: data.Dataset) -> None:
        if dataset.train_labels is None or len(dataset.classes) < 2:
            raise ValueError(f"--data: {self.experiment.name} needs labels, and {self.data} has none")

    def settings(self, system: str, seed: int, **changes: object) -> Settings:
        """The preset for the data with `changes`, and with `steps` if given."""
        if self.steps is not None:
            changes["steps"] = self.steps
        given = {"seed": seed, "device": self.device, "root": str(self.root), "tensorboard": False, "save_every": 10**6}
        return dataclasses.replace(models.preset(system, self.data), **{**given, **changes})

    def length(self, steps: int) -> int:
        return steps if self.steps is None else self.steps

    def count(self, samples: int) -> int:
        return samples if self.samples is None else self.samples

    def values(self, function: Callable[[Job], dict[str, object]], jobs: Sequence[Job]) -> list[Values]:
        """`function(job)` for each job, in order; jobs with the same settings in rows.jsonl are not run again."""
        path = self.out / ROWS
        kept = {json.dumps(row["key"], sort_keys=True): row["values"] for row in _read(path)}
        name = f"{self.experiment.name}/{function.__name__}"
        keys = [{"experiment": name, **job.key()} for job in jobs]
        texts = [json.dumps(key, sort_keys=True) for key in keys]
        todo = [i for i, text in enumerate(texts) if text not in kept]
        if len(todo) < len(jobs):
            self.console.print(f"{path} already has {len(jobs) - len(todo)} of {len(jobs)} runs", soft_wrap=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task("runs", total=len(todo))
            tasks = [(i, function, jobs[i]) for i in todo]
            for i, values, times in _results(tasks, min(self.workers, len(tasks))):
                kept[texts[i]] = values
                self.out.mkdir(parents=True, exist_ok=True)  # not before a job's settings have been found right
                with path.open("a") as file:
                    file.write(json.dumps({"key": keys[i], "values": values, **times}) + "\n")
                bar.advance(task)
        return [Values(job, kept[text]) for job, text in zip(jobs, texts, strict=True)]


def start(
    name: str,
    *,
    seeds: Iterable[int] | None = None,
    full: bool = False,
    data: str | None = None,
    root: str | Path = "data",
    device: str | None = None,
    out: Path | None = None,
    steps: int | None = None,
    samples: int | None = None,
    workers: int | None = None,
    download: bool = False,
    console: Console | None = None,
) -> Session:
    """The session of an experiment, with checked options; None means the experiment's own value.

    Raises:
        ValueError: an unknown experiment, data set or device, or no seeds.
    """
    experiment = find(name)
    if data is not None:
        if not experiment.data:
            raise ValueError(f"--data: {name} is computed exactly and takes no data set")
        runs.known_data(data)
    seeds = tuple(range(experiment.full_seeds if full else experiment.seeds) if seeds is None else seeds)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds must be different numbers, at least one, got {', '.join(map(str, seeds)) or 'none'}")
    for seed in seeds:
        _check.count("--seeds", seed, at_least=0)
    if steps is not None:
        _check.count("steps", steps)
    if samples is not None:
        _check.count("samples", samples, at_least=2)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    runs.check_device(device)
    out = Path(out or Path("papers") / name)
    if workers is None:
        workers = (os.cpu_count() or 1) if device == "cpu" else 1
    _check.count("workers", workers)
    data = data or (experiment.paper_data if full else experiment.data)
    console = console or Console(quiet=True)
    return Session(experiment, seeds, full, data, str(root), device, out, steps, samples, workers, download, console)


@functools.lru_cache(1)
def _dataset(name: str, root: str, image_size: int | None) -> data.Dataset:
    return data.load(name, root, image_size)


def dataset_of(settings: Settings) -> data.Dataset:
    """The data set that a job trains on."""
    return _dataset(settings.data, settings.root, settings.image_size)


def trained(settings: Settings, dataset: data.Dataset, evaluate: Callable | None = None) -> tuple[System, list[dict]]:
    """The trained system in evaluation mode, with averaged weights if it keeps them, and the lines of the log."""
    settings = runs.with_classes(settings, dataset)
    shape = tuple(dataset.train.shape[1:])
    images, labels = runs.training_set(models.build(settings, shape), dataset)
    settings = dataclasses.replace(settings, batch_size=_batch(settings, len(images)))
    system = models.build(settings, shape)
    labels = None if labels is None else labels.to(settings.device)
    with tempfile.TemporaryDirectory() as out:
        images = images.to(settings.device)
        history = fit(system, images, settings, out, labels=labels, evaluate=evaluate, progress=False)
        return runs.load_system(out, settings.device)[0], history


def _batch(settings: Settings, images: int) -> int:
    """The batch size of the settings, or the number of images in whole packs if that is smaller."""
    packing = getattr(settings, "packing", 1)  # a GAN's
    return min(settings.batch_size, images // packing * packing)


def spread(found: Iterable[Values], name: str) -> Spread:
    """One value over several runs."""
    rows = [row.values for row in found]
    return Spread(tuple(float(row[name]) for row in rows if name in row), sum("diverged" in row for row in rows))


def _read(path: Path) -> list[dict]:
    """The rows of complete lines; the last line may have been cut short."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    if lines and not lines[-1].endswith("\n"):
        path.write_text("".join(lines[:-1]))
        lines = lines[:-1]
    return [json.loads(line) for line in lines]


def _results(tasks: list, workers: int):
    """Yield (i, values, times) of each task as it finishes, in this process or in several."""
    if workers <= 1:
        threads = torch.get_num_threads()
        try:
            yield from map(_call, tasks)
        except KeyboardInterrupt as stop:  # the message from fit names a folder that is gone
            raise KeyboardInterrupt("finished runs are kept: the same command continues") from stop
        finally:
            torch.set_num_threads(threads)
        return
    with multiprocessing.get_context("spawn").Pool(workers, _start_worker) as pool:
        try:
            yield from pool.imap_unordered(_call_in_worker, tasks)
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt("finished runs are kept: the same command continues") from stop


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its workers


def _call_in_worker(task):
    try:
        return _call(task)
    except KeyboardInterrupt:  # fit listens for it
        raise SystemExit(130) from None


def _call(task: tuple[int, Callable, Job]) -> tuple[int, dict[str, object], dict[str, float]]:
    i, function, job = task
    if torch.device(job.settings.device).type == "cpu":
        torch.set_num_threads(1)
    begin, spent = time.perf_counter(), time.process_time()
    try:
        values = function(job)
    except (NonFiniteLoss, NonFiniteWeights) as error:
        values = {"diverged": str(error)}
    except ValueError as error:
        if "has diverged" not in str(error):  # raised by metrics, on codes or images that are not finite
            raise
        values = {"diverged": str(error)}
    times = {"seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - spent}
    return i, values, {name: round(value, 2) for name, value in times.items()}
