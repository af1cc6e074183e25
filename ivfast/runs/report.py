"""The output of a run: metrics during training, pictures, tables of results."""

import shlex
from collections.abc import Callable
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from .. import metrics
from ..data import Dataset
from ..data.points import POINTS
from ..train.log import read_log
from ..train.settings import Settings
from . import pictures
from .evaluation import CODES, LEAST, Value, bound_of, has_encoder, judged, mixture_of

RECONSTRUCTED = 1_000  # test images per evaluation during training; `ivfast evaluate` takes all
LOOK = 2_500  # points drawn to count modes during training (Srivastava et al. 2017)


def while_training(dataset: Dataset) -> Callable[[object], dict[str, float]]:
    """The `evaluate` of `ivfast.train.loop.fit`, with the metrics that the system supports: FLD of the training codes;
    reconstruction of 1,000 test images; the variational bound and the accuracy of the system's own classifier on all
    test images; modes of points."""

    target: dict[str, Dataset] = {}  # read once

    def evaluate(system):
        values = {}
        if has_encoder(system):
            if len(dataset.train) >= LEAST["fld"]:
                values["fld"] = metrics.latent_frechet_distance(metrics.codes(system, dataset.train[:CODES]))
            if dataset.name not in POINTS:
                values |= metrics.reconstruction(system, dataset.test[:RECONSTRUCTED])._asdict()
        if mixture_of(dataset):
            modes = metrics.point_modes(metrics.generate(system, LOOK), mixture_of(dataset))
            values |= {"modes": modes.covered, "modes_confident": modes.confident}
        if hasattr(system, "bound"):
            values["bound"] = bound_of(system, dataset)
        if hasattr(system, "classify"):
            if "of" not in target:
                target["of"] = judged(system, dataset)
            of = target["of"]
            values["accuracy"] = metrics.accuracy(system, of.test, of.test_labels)
        return values

    return evaluate


def draw_samples(system, folder: Path, epoch: int) -> None:
    """The `draw` of `ivfast.train.loop.fit`: decodes the same points of the prior every time."""
    if not hasattr(system, "sample"):
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    n = 64 if system.image_shape[1:] else LOOK
    pictures.samples(metrics.generate(system, n), Path(folder) / f"samples-{epoch:04d}.png")


def draw(system, dataset: Dataset, out: Path) -> dict[str, Path]:
    """Draw every picture of a finished run; returns paths by content."""
    folder, settings = Path(out) / "pictures", system.settings
    folder.mkdir(parents=True, exist_ok=True)
    title = f"{settings.system} on {settings.data}, d = {settings.latent_dim}"
    points, drawn = dataset.name in POINTS, {}
    if hasattr(system, "sample"):
        samples = metrics.generate(system, LOOK if points else 64)
        drawn["samples"] = pictures.samples(samples, folder / "samples.png")
    if has_encoder(system) and not points:
        x = dataset.test[:36]
        z = metrics.codes(system, x)
        drawn["reconstructions"] = pictures.reconstructions(
            x, metrics.decoded(system, z), folder / "reconstructions.png"
        )
        if len(z) >= 2:
            drawn["interpolations"] = pictures.interpolations(interpolated(system, z), folder / "interpolations.png")
    if has_encoder(system) and len(dataset.train) >= 2:
        codes = metrics.codes(system, dataset.train[:CODES])
        drawn["covariance of the codes"] = pictures.covariance(codes, folder / "covariance.png", title)
    series = _series(Path(out) / "log.jsonl")
    if series:
        drawn["losses and metrics"] = pictures.curves(series, folder / "curves.png", title)
    return drawn


def interpolated(system, z: Tensor, rows: int = 6, columns: int = 12) -> Tensor:
    """Decoded z_i + a (z_j − z_i), a = 0..1, for the first pairs of codes: `[rows, columns, C, H, W]`."""
    rows = min(rows, len(z) // 2)
    first, second = z[:rows, None], z[rows : 2 * rows, None]
    steps = torch.linspace(0, 1, columns, dtype=z.dtype, device=z.device)
    points = torch.lerp(first, second, steps[:, None])  # [rows, columns, d]
    return metrics.decoded(system, points.flatten(0, 1)).unflatten(0, (rows, columns))


def _series(log: Path) -> dict[str, list[tuple[int, float]]]:
    series: dict[str, list[tuple[int, float]]] = {}
    for kind in ("losses", "metrics"):
        for record in read_log(log):
            for name, value in record.get(kind, {}).items():
                series.setdefault(name, []).append((record["step"], value))
    return series


def values_table(title: str, values: list[Value]) -> Table:
    table = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("metric", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("", style="dim")
    for name, value, meaning in values:
        table.add_row(name, f"{value:.4g}", meaning)
    return table


def print_end(
    console: Console, settings: Settings, out: Path, history: list[dict], seconds: float, drawn: dict[str, Path]
) -> None:
    """Print the end of a run on the command line: results, files to look at, commands to type next."""
    looks = [record for record in history if record["kind"] == "metrics"]
    steps = max((record["step"] for record in history), default=0)
    console.print(
        f"\n[bold]{settings.system}[/bold] on {settings.data}: {steps:,} steps, {seconds:.1f} s in this session"
    )
    if looks:
        console.print(_metrics_by_epoch(looks))
    files = {**drawn, "log, one JSON record per line": out / "log.jsonl", "settings": out / "config.json"}
    wide = max(len(str(path)) for path in files.values())
    more = f"--steps {2 * settings.steps}" if settings.steps else f"--epochs {2 * settings.epochs}"
    run = shlex.quote(str(out))
    commands = f"evaluate {run}", f"train --resume --out {run} {more}"
    if "samples" in drawn:
        commands = f"sample {run} -n 64", *commands
    lines = ["[bold]Look at[/bold]"]
    lines += [f"  {escape(f'{path!s:{wide}}')}  [dim]{what}[/dim]" for what, path in files.items()]
    lines += ["", "[bold]Next[/bold]", *(f"  [green]ivfast {escape(command)}[/green]" for command in commands)]
    console.print("\n".join(lines), soft_wrap=True)


def _metrics_by_epoch(looks: list[dict]) -> Table:
    """The last values, and those at the lowest FLD if that was earlier."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", "epoch", "step", *looks[-1]["metrics"]):
        table.add_column(column, justify="right")
    best = min(looks, key=lambda look: look["metrics"].get("fld", 0.0))
    shown = {"at the end": looks[-1]}
    if "fld" in best["metrics"] and best is not looks[-1]:
        shown = {"lowest fld": best, **shown}
    for label, look in shown.items():
        cells = (f"{value:.4g}" for value in look["metrics"].values())
        table.add_row(label, str(look["epoch"]), f"{look['step']:,}", *cells)
    return table
