"""What a run costs in addition to its steps: `python -m ivfast.bench.studies.run_cost`.

`fit` trains with progress bar, log, TensorBoard, checkpoints, FLD and the other metrics, and pictures: first as often
as the preset says, then after every epoch. Each part is timed where it happens; the rest is start and end.
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from ivfast import models, runs
from ivfast.data import Dataset, load
from ivfast.runs import report
from ivfast.train import loop
from ivfast.train.log import Bar, Log
from ivfast.train.run import Run

from ..harness import machine
from .train import images_of, settings_of

PARTS = {
    "steps": [(Run, "advance")],
    "metrics and pictures": [(Run, "look")],
    "checkpoints": [(Run, "save")],
    "log and bar": [(Run, "line"), (Log, "write"), (Bar, "report"), (Bar, "at"), (Log, "__init__"), (Log, "__exit__")],
}


class Clocks:
    """Seconds of each part of the code that runs inside."""

    def __enter__(self) -> dict[str, float]:
        self.kept, seconds = [], dict.fromkeys(PARTS, 0.0)
        for part, places in PARTS.items():
            for owner, name in places:
                function = getattr(owner, name)
                self.kept.append((owner, name, function))
                setattr(owner, name, self.clocked(part, function, seconds))
        return seconds

    @staticmethod
    def clocked(part, function, seconds):
        def call(*arguments, **keywords):
            start = time.perf_counter()
            try:
                return function(*arguments, **keywords)
            finally:
                seconds[part] += time.perf_counter() - start

        return call

    def __exit__(self, *_) -> None:
        for owner, name, function in self.kept:
            setattr(owner, name, function)


def dataset_of(setting: str) -> Dataset:
    if setting == "digits":
        return load("digits")
    images = images_of(setting)
    return Dataset(setting, images, None, images[: len(images) // 6], None, ())


def measure(system: str, setting: str, epochs: int, every: int | None) -> tuple[float, dict[str, float]]:
    """Seconds of a run and of its parts, with metrics and checkpoints every `every` epochs; None: as in the preset."""
    settings, dataset = settings_of(system, setting), dataset_of(setting)
    settings = replace(settings, epochs=epochs)
    if every:
        settings = replace(settings, evaluate_every=every, save_every=every)
    runs.use_threads(None, settings)
    network = models.build(settings, tuple(dataset.train.shape[1:]))
    evaluate = report.while_training(dataset)
    with tempfile.TemporaryDirectory() as out, Clocks() as seconds:
        start = time.perf_counter()
        loop.fit(network, dataset.train, settings, Path(out) / "run", evaluate=evaluate, draw=report.draw_samples)
        return time.perf_counter() - start, seconds


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, help="of each run (default: 250 on digits, 6 on 4,096 images of 64 × 64)")
    options = parser.parse_args(arguments)
    print(f"{machine.describe('cpu')['name']}: % of a run's time\n")
    print(f"| system | data | epochs | metrics and checkpoints every | seconds | {' | '.join(PARTS)} | start and end |")
    print("|---|---|---:|---:|---:|" + "---:|" * (len(PARTS) + 1))
    threads = torch.get_num_threads()
    for system, setting, epochs in (("ivaae-svgd", "digits", 250), ("ivaae-svgd", "mnist", 6)):
        for every in (None, 1):
            total, parts = measure(system, setting, options.epochs or epochs, every)
            cells = [f"{100 * s / total:.2f}" for s in (*parts.values(), total - sum(parts.values()))]
            named = every or f"{settings_of(system, setting).evaluate_every}, the preset"
            n = options.epochs or epochs
            print(f"| {system} | {setting} | {n} | {named} | {total:.1f} | {' | '.join(cells)} |", flush=True)
            torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
