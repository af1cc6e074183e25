"""What a run reports as it goes: log.jsonl, TensorBoard, a progress bar, seconds."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

from .._extra import needs
from . import files

with needs("ivfast.train"):
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

FILE = "log.jsonl"


class Log:
    """Appends lines to `out/log.jsonl` and scalars to `out/tensorboard/`.

    A line is {"kind": "losses", step, epoch, losses, learning_rates, images_per_second, seconds}, {"kind": "metrics",
    step, epoch, metrics} or, of how steps are taken, {"kind": "capture", step, captured, why}. "partial" marks the last
    line of a run that ended between two log intervals.
    """

    def __init__(self, out: Path, *, tensorboard: bool, resume_at: int | None):
        self.path = Path(out) / FILE
        self.history = _kept(self.path, resume_at)
        files.replace(self.path, "".join(json.dumps(line) + "\n" for line in self.history).encode())
        self.file = open(self.path, "a", buffering=1)  # noqa: SIM115  closed by __exit__
        self.events, self.writer = Path(out) / "tensorboard", None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

            purge = None if resume_at is None else resume_at + 1
            self.writer = SummaryWriter(str(self.events), purge_step=purge)

    def write(self, line: dict[str, object]) -> None:
        self.history.append(line)
        with _named(self.path):
            self.file.write(json.dumps(line) + "\n")
        if self.writer is not None:
            with _named(self.events):
                for group in ("losses", "learning_rates", "metrics"):
                    for name, value in line.get(group, {}).items():
                        self.writer.add_scalar(f"{group}/{name}", value, line["step"])

    def has_metrics(self, step: int) -> bool:
        return any(line["kind"] == "metrics" and line["step"] == step for line in self.history)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, kind, *_) -> None:
        with contextlib.suppress(OSError):  # of a line that `write` could not write
            self.file.close()
        if self.writer is not None:
            # what is wrong with the run comes before what that does to the rest of its events
            with contextlib.nullcontext() if kind is None else contextlib.suppress(OSError), _named(self.events):
                self.writer.close()


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """An OSError says of which file it is."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


class Quiet:
    """The log of a rank that is not the first: nothing is written."""

    def __init__(self):
        self.history: list[dict[str, object]] = []

    def write(self, line: dict[str, object]) -> None:
        self.history.append(line)

    def has_metrics(self, step: int) -> bool:
        return True  # which the first rank looks after

    def __enter__(self) -> "Quiet":
        return self

    def __exit__(self, *_) -> None:
        pass


def read_log(path: Path) -> list[dict]:
    """The records of a log; a last line that a crash has cut short is left out.

    Raises:
        ValueError: a whole line that is no record; the message names the file and the line.
    """
    records = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            raise ValueError(f"{path}: line {number} is not a record of a log: {line[:60].decode(errors='replace')!r}")
        records.append(record)
    return records


def _kept(path: Path, resume_at: int | None) -> list[dict[str, object]]:
    """The lines of an earlier part of the run that its checkpoint covers; those after it are run again."""
    if resume_at is None or not path.exists():
        return []
    return [line for line in read_log(path) if line["step"] <= resume_at and not line.get("partial")]


class Bar:
    """Steps done, rate, time left and the latest losses; nothing at all where `shown` is False.

    What is no terminal, such as a batch job's output, gets a line every `EVERY` seconds. An output that can no longer
    be written, such as a closed terminal, does not stop the run.
    """

    EVERY = 60.0

    def __init__(self, total: int, done: int, *, shown: bool, console: Console | None = None):
        console = console or Console()
        wide = [BarColumn(bar_width=20), TextColumn("{task.fields[rate]}")] if console.width >= 110 else []
        rest = Column(ratio=1, no_wrap=True, overflow="ellipsis")  # of the width: the losses are what is cut short
        self.progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            *wide,
            TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}", table_column=rest),
            disable=not shown,
            console=console,
            expand=True,
            auto_refresh=False,  # by a thread, which would print a traceback where the output is gone
        )
        self.total, self.moved, self.told = total, 0.0, time.perf_counter()
        self.task = self.progress.add_task("train", total=total, completed=done, rate="", losses="")

    def __enter__(self) -> "Bar":
        with contextlib.suppress(OSError):
            self.progress.start()
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(OSError):
            self.progress.stop()

    def at(self, step: int) -> None:
        now = time.perf_counter()
        if now - self.moved > 0.1 or step == self.total:  # an update costs as much as a few kernel launches
            self.moved = now
            with contextlib.suppress(OSError):
                self.progress.update(self.task, completed=step, refresh=True)

    def note(self, text: str) -> None:
        if not self.progress.disable:
            with contextlib.suppress(OSError):
                self.progress.console.print(text, markup=False)

    def report(self, step: int, losses: dict[str, float], images_per_second: float) -> None:
        # "discriminator/intervention" as "d/interv": three of them fit into 80 columns
        short = {name: f"{name[0]}/{name.partition('/')[2][:6]}" for name in losses}
        text = "  ".join(f"{short[name]} {value:.3g}" for name, value in losses.items())
        rate = f"{images_per_second:,.0f} images/s"
        now = time.perf_counter()
        console, due = self.progress.console, step < self.total and now - self.told >= self.EVERY
        with contextlib.suppress(OSError):
            self.progress.update(self.task, losses=text, rate=rate)
            if due and not (console.is_terminal or console.is_jupyter or self.progress.disable):
                self.told = now
                console.print(f"step {step:,}/{self.total:,}  {rate}  {text}", markup=False, soft_wrap=True)


class Clock:
    """Seconds of training, without saving and looking, over all parts of a resumed run."""

    def __init__(self, seconds: float, step: int):
        self.before, self.start, self.mark, self.step = seconds, time.perf_counter(), time.perf_counter(), step

    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.start

    def read(self, step: int) -> tuple[float, float]:
        """Seconds so far, and steps per second since the last reading."""
        now = time.perf_counter()
        rate = (step - self.step) / max(now - self.mark, 1e-9)
        self.mark, self.step = now, step
        return self.before + now - self.start, rate

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        spent = time.perf_counter() - began
        self.start += spent
        self.mark += spent
