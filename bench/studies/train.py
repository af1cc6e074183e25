"""A training step of S1's systems against eager PyTorch scripts: `python -m ivfast.bench.studies.train`.

The scripts are in `eager.py`: `eager` updates D, E and G one after the other, `eager-joint` updates E and G from one
backward pass. `check` compares every loss and all weights over some steps before anything is timed. On two cores, a
system takes half a minute with MLPs and a quarter of an hour with convolutions.
"""

import argparse
import copy
import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from rich.progress import track
from torch import Tensor

from ivfast import models, runs
from ivfast.data import load
from ivfast.train.batches import Batches
from ivfast.train.run import Run
from ivfast.train.settings import Settings

from ..harness import command, machine, memory, tables
from ..harness.results import Results, Row, groups
from .eager import SCRIPTS

STEPS = 50  # of each provider, at least
BLOCK = 0.5  # seconds of steps in a row, as in training: caches and the heap then belong to the provider
# Float32 sums in another order. Losses are compared over max(1, |loss|): the unbiased MMD is a difference of sums of
# order 1. Weights are compared by how far they moved: Adam's first steps are lr times a gradient's sign, and a
# gradient that is zero except for rounding has the sign of its rounding.
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-5, 5e-3
# In one of sixty draws of wae-mmd the weights' error was 6e-3, in the others 3e-6 to 3e-5: rounding moved a unit across
# the kink of its activation. In float64, scripts and systems agree to 1e-13 in every draw, as a test checks.
DRAWS = 3
JOINT = {"eager": False, "eager-joint": True}


class Setting(NamedTuple):
    about: str
    shape: tuple[int, int, int]
    batch_size: int | None = None  # in place of the preset's


SETTINGS = {
    "mnist": Setting("S1's settings for MNIST: MLPs; synthetic images", (1, 64, 64)),
    "digits": Setting("the preset: MLPs; scikit-learn's digits", (1, 8, 8)),
    "cifar10": Setting("S1's settings for CIFAR-10: convolutions; synthetic images", (3, 64, 64), 32),
}


def settings_of(system: str, setting: str) -> Settings:
    settings = replace(models.preset(system, setting), device="cpu", ema=0.0)  # which no paper has
    return replace(settings, batch_size=SETTINGS[setting].batch_size or settings.batch_size)


def images_of(setting: str) -> Tensor:
    if setting == "digits":
        return load("digits").train
    return torch.randint(256, (4096, *SETTINGS[setting].shape), dtype=torch.uint8)


def run_of(settings: Settings, images: Tensor) -> Run:
    system = models.build(settings, tuple(images.shape[1:]))
    system.train()
    return Run(system, images, settings, Path(), None)


def check(settings: Settings, images: Tensor, joint: bool) -> tuple[float, float]:
    """Errors of a script against ivfast, in the first of `DRAWS` draws within the tolerances, or else in the last."""
    for _ in range(DRAWS):
        errors = compare(settings, images, joint)
        if within(errors):
            break
    return errors


def within(errors: tuple[float, float]) -> bool:
    return errors[0] <= LOSS_TOLERANCE and errors[1] <= WEIGHT_TOLERANCE


def compare(settings: Settings, images: Tensor, joint: bool, steps: int = 3) -> tuple[float, float]:
    """The largest error of a loss in any step, and the largest relative error of the change of a network's weights.

    Weights, batches and noise are the same, and drawn anew for each call. Batches have two images less: the number
    of distances is then odd, and torch.median, which takes the lower of two middle values, finds the middle.
    """
    first, *seeds = torch.randint(1 << 31, (1 + steps,)).tolist()
    settings = replace(settings, batch_size=settings.batch_size - 2, seed=first)
    run = run_of(settings, images)
    script = SCRIPTS[settings.system](run.system, images, joint)
    start = copy.deepcopy(run.system.modules)
    batches = Batches(images, settings.batch_size, settings.stream("order"))  # those of the run
    of_losses, of_weights = [], []
    for seed in seeds:
        torch.manual_seed(seed)
        run.advance()
        torch.manual_seed(seed)
        losses = script.step(*batches.next())
        ours = run.record.values[run.record.rows - 1].tolist()
        for (phase, name), value in zip(run.record.names, ours, strict=True):
            of_losses.append(abs(losses[phase][name].item() - value) / max(1.0, abs(value)))
    for name, network in start.items():
        before, ours, theirs = (
            torch.cat([p.detach().flatten() for p in n.parameters()])
            for n in (network, run.system.modules[name], script.networks[name])
        )
        of_weights.append(float((theirs - ours).norm() / (ours - before).norm()))
    return largest(of_losses), largest(of_weights)


def largest(errors: list[float]) -> float:
    return float(torch.tensor(errors).max())  # NaN if one is


def step_of(run: Run) -> Callable[[], None]:
    """A step of `ivfast train`: losses are read, and checked, once per line of the log."""

    def advance():
        run.advance()
        if run.step % run.settings.log_every == 0:
            run.record.read(run.step)
            run.record.clear()

    return advance


def in_turns(calls: dict[str, Callable], steps: int, deadline: float) -> dict[str, list[float]]:
    """Seconds of single steps; the providers run in turns, in a rotating order."""
    blocks = {}
    for name, call in calls.items():
        call()
        blocks[name] = max(1, math.ceil(BLOCK / timed(call)))
    samples = {name: [] for name in calls}
    names = list(calls)
    gc.collect()
    gc.disable()
    try:
        while True:
            for name in names:
                samples[name] += [timed(calls[name]) for _ in range(blocks[name])]
            names.append(names.pop(0))
            if min(map(len, samples.values())) >= steps or time.monotonic() > deadline:
                return samples
    finally:
        gc.enable()


def timed(call: Callable) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Parts:
    """Where a run's steps spend their time: clocks around the run's own functions."""

    def __init__(self, run: Run):
        self.samples: dict[str, list[float]] = {}
        self.run = run
        phases = run.system.phases
        run.batches.gather = self.clocked("batch", run.batches.gather)
        run.share = self.clocked("share", run.share)
        names = {loss: phase.name for phase, loss in zip(phases, run.losses, strict=True)}
        run.losses = [self.clocked(f"{names[loss]} loss", loss) for loss in run.losses]
        for phase in phases:
            phase.optimizer.step = self.clocked(f"{phase.name} optimizer", phase.optimizer.step)
        update = run.update
        run.update = lambda phase, loss, shared: self.clocked(f"{phase.name} update", update)(phase, loss, shared)
        run.record.write = self.clocked("record", run.record.write)
        if run.average is not None:
            run.average.update = self.clocked("average", run.average.update)

    def clocked(self, name: str, function: Callable) -> Callable:
        def call(*arguments):
            start = time.perf_counter()
            result = function(*arguments)
            self.samples.setdefault(name, []).append(time.perf_counter() - start)
            return result

        return call

    def milliseconds(self) -> dict[str, float]:
        """Medians by part, in the order of a step; the backward pass is an update minus its loss and optimizer."""
        medians = {name: statistics.median(values) * 1e3 for name, values in self.samples.items()}
        found = {name: medians[name] for name in ("batch", "share")}
        for phase in self.run.system.phases:
            loss, optimizer, update = (medians[f"{phase.name} {part}"] for part in ("loss", "optimizer", "update"))
            found |= {f"{phase.name} loss": loss, f"{phase.name} backward": update - loss - optimizer}
            found[f"{phase.name} optimizer"] = optimizer
        return found | {name: medians[name] for name in ("record", "average") if name in medians}


def checked(settings: Settings, images: Tensor, name: str) -> dict[str, float]:
    of_losses, of_weights = errors = check(settings, images, JOINT[name])
    if not within(errors):
        raise ArithmeticError(f"{name} is not {settings.system}: losses {of_losses:.1e}, weights {of_weights:.1e}")
    return {"error": of_losses, "weight_error": of_weights}


def measure(system: str, setting: str, steps: int, deadline: float) -> list[Row]:
    settings, images = settings_of(system, setting), images_of(setting)
    errors = {name: checked(settings, images, name) for name in JOINT}
    run = run_of(settings, images)
    scripts = {name: SCRIPTS[system](run.system, images, joint) for name, joint in JOINT.items()}
    calls = {"ivfast": step_of(run), **{name: script.advance for name, script in scripts.items()}}
    samples = in_turns(calls, steps, deadline)
    peaks = {name: memory.growth(call) for name, call in calls.items()} if memory.supported() else {}
    parts = Parts(run)
    for _ in range(min(steps, 20)):
        calls["ivfast"]()
    size, threads = [settings.batch_size, *images.shape[1:]], torch.get_num_threads()
    about = {"op": system, "size": size, "dtype": "float32", "pass": setting, "threads": threads}
    rows = []
    for name, seconds in samples.items():
        row = about | {"provider": name, "kind": "peer" if name in JOINT else "ivfast", "steps": len(seconds)}
        row |= {"us": statistics.median(seconds) * 1e6, "least_us": min(seconds) * 1e6, "peak_bytes": peaks.get(name)}
        rows.append(row | (errors[name] if name in JOINT else {"parts_ms": parts.milliseconds()}))
    return rows


def markdown(report: dict) -> str:
    about = ", ".join(f"{k} {v}" for k, v in report["machine"].items() if k != "name")
    lines = [f"# A training step: {report['machine']['name']}", "", about, ""]
    for session in report["sessions"]:
        versions = ", ".join(f"{k} {v}" for k, v in session["versions"].items())
        late = f" Not started for lack of time: {'; '.join(session['not_started'])}." if session["not_started"] else ""
        lines += [f"Session {session['id']}, {session['date']}: {versions}.{late}", ""]
    lines += [
        "The table shows the median time of a step including its data, in ms. Providers run in turns in one process;",
        "each script is checked against ivfast's losses and weights first. `eager` is Algorithm 1 of S1 (IVAAE): it",
        "updates the discriminator D, the encoder E and the decoder G, each with its own passes. `eager-joint`",
        "updates E and G from one backward pass (`bench/studies/eager.py`). Peak is memory above the level before the",
        "step, in MB. No provider averages its weights, as the preset for digits would.",
        "",
        *(f"- {name}: {setting.about}" for name, setting in SETTINGS.items()),
        "",
        "| system | setting | batch | threads | steps | ivfast | eager | eager-joint | eager / ivfast "
        "| eager-joint / ivfast | peak ivfast | peak eager |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    split = []
    for (system, size, _, setting), rows in groups(report["rows"]).items():
        by_name = {row["provider"]: row for row in rows}
        mine, eager, joint = (by_name[name] for name in ("ivfast", "eager", "eager-joint"))
        cells = [f"{row['us'] / 1e3:.2f}" for row in (mine, eager, joint)]
        cells += [f"{row['us'] / mine['us']:.2f}" for row in (eager, joint)]
        cells += [tables.megabytes(row["peak_bytes"]) for row in (mine, eager)]
        steps = min(row["steps"] for row in (mine, eager, joint))
        batch = " × ".join(map(str, size))
        lines.append(f"| {system} | {setting} | {batch} | {mine['threads']} | {steps} | {' | '.join(cells)} |")
        parts = mine["parts_ms"]
        told = ", ".join(f"{name} {ms:.2f} ({ms / sum(parts.values()):.0%})" for name, ms in parts.items())
        split.append(f"- {system}, {setting}: {told}")
    return "\n".join([*lines, "", "Where the time of ivfast's step goes, ms:", "", *split, ""])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", metavar="SYSTEM[:SETTING]", help="such as ivaae-svgd:mnist (default: all)")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="finish the current job after this time and start no more"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="of each provider; fewer are saved only with --out")
    parser.add_argument("--threads", type=int, help="CPU threads (default: as in `ivfast train`, 1 for small networks)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the results")
    options = parser.parse_args(arguments)
    every = [(system, setting) for setting in SETTINGS for system in SCRIPTS]
    unknown = set(options.jobs).difference(SCRIPTS, map(":".join, every))
    if unknown:
        known = f"SYSTEM of {', '.join(SCRIPTS)}, SETTING of {', '.join(SETTINGS)}"
        parser.error(f"jobs are SYSTEM or SYSTEM:SETTING ({known}), got {', '.join(sorted(unknown))}")
    jobs = [job for job in every if not options.jobs or {job[0], ":".join(job)} & set(options.jobs)]
    deadline = time.monotonic() + 60 * options.minutes
    if options.threads:
        torch.set_num_threads(options.threads)
    described = machine.describe("cpu")
    session = {"date": machine.today(), "versions": machine.versions(), "not_started": []}
    here = command.folder(options.out, options.steps < STEPS)
    results = Results(described, session, here and here / f"train-{described['name']}.json")
    for system, setting in track(jobs, "training"):
        if time.monotonic() > deadline:
            session["not_started"].append(f"{system} {setting}")
            continue
        torch.set_num_threads(described["threads"])
        runs.use_threads(options.threads, settings_of(system, setting))
        results.add(measure(system, setting, options.steps, deadline))
    results.write()
    text = markdown(results.report())
    if results.path:
        results.path.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
