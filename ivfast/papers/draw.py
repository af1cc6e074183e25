"""Figures of the experiments, without a display."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..runs.pictures import GRID, tile


@contextlib.contextmanager
def panels(path: Path, count: int, title: str, size: tuple[float, float] = (4.6, 3.4)) -> Iterator[Sequence]:
    """Yield the axes of `count` panels side by side; write the figure to `path` at the end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(size[0] * count, 0.085 * len(title)), size[1] + 0.4), dpi=110, layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    yield axes
    figure.suptitle(title, fontsize=12)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def style(axes, title: str = "", x: str = "", y: str = "") -> None:
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=9)
    axes.grid(**GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def curve(axes, x: Sequence[float], runs: Sequence[Sequence[float]], label: str, **keywords) -> None:
    """The mean over runs, and a band from the lowest to the highest."""
    if not runs:
        return
    y = np.asarray(runs, dtype=float)
    if len(x) == 1:
        keywords["marker"] = "o"
    (line,) = axes.plot(x, y.mean(0), label=label, linewidth=1.5, **keywords)
    if len(y) > 1:
        axes.fill_between(x, y.min(0), y.max(0), color=line.get_color(), alpha=0.2, linewidth=0)


def points(axes, labels: Sequence[str], runs: Sequence[Sequence[float]], label: str, shift: float = 0.0, **keywords):
    """The mean over runs, and a bar from the lowest to the highest, at the positions of `labels`."""
    shown = [(i + shift, np.asarray(values, dtype=float)) for i, values in enumerate(runs) if len(values)]
    if shown:
        x, values = zip(*shown, strict=True)
        mean = np.array([v.mean() for v in values])
        reach = np.array([[v.mean() - v.min(), v.max() - v.mean()] for v in values]).T
        axes.errorbar(x, mean, reach, fmt="o", markersize=5, capsize=3, label=label, **keywords)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlim(-0.5, len(labels) - 0.5)


def logarithmic(axes) -> None:
    """A logarithmic value axis with plain numbers, also between powers of ten if it spans few."""
    from matplotlib.ticker import NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}" if high < 10 * low else NullFormatter())
    axes.tick_params(which="minor", labelsize=8)


def grid(axes, images: Tensor, title: str) -> None:
    """A square grid of images `[n, C, H, W]`."""
    axes.imshow(tile(images, width=480).permute(1, 2, 0).numpy())
    axes.set_title(title, fontsize=11)
    axes.axis("off")


def thin(values: Sequence[float], most: int = 200) -> tuple[list[int], list[float]]:
    """Means over at most `most` equal intervals, and the steps at their middles."""
    parts = torch.tensor(values, dtype=torch.float64).tensor_split(min(most, len(values)))
    ends = np.cumsum([len(part) for part in parts])
    middles = [int(end - (len(part) + 1) // 2) for end, part in zip(ends, parts, strict=True)]
    return middles, [float(part.mean()) for part in parts]
