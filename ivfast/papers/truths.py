"""Claims of the papers that can be checked without a download: known values, and short runs on known distributions."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .. import metrics
from ..data import points
from ..models import build, preset
from ..ops.multi_js import multi_js_divergence
from ..train.run import Run, cuda_devices
from ..train.settings import Settings


class Squares(NamedTuple):
    two: float  # JS(X_0, X_1), nats
    four: float  # JS(X_0, X_1, Y_1, Y_2)


def square_fitting(a: float, cells: int = 40) -> Squares:
    """The divergences of S2's Example 1 at the optimal classifier: JS₂ = log 2 for every a, JS₄ = (1 + a) log 2.

    The paper prints −(log 2) a − Const, which its own squares do not give.

    Args:
        a: shift of β relative to α, in [0, 1]; exact if `cells`·a is an integer.
        cells: points along each side of a square.
    """
    corners = torch.tensor([[0, 0], [a, 1], [0, 1], [a, 0]], dtype=torch.float64)  # of α, β, γ₁, γ₂
    middle = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
    unit = torch.cartesian_prod(middle, middle)

    def divergence(corners: Tensor) -> float:
        x = (corners[:, None] + unit).flatten(0, 1)  # [C·n, 2], n points of each square
        inside = ((x[:, None] > corners) & (x[:, None] < corners + 1)).all(2)
        return float(multi_js_divergence(inside.double().sub(1).mul(1e4)))  # log p_c(x) up to a constant

    return Squares(divergence(corners[:2]), divergence(corners))


class Coverage(NamedTuple):
    system: str
    seed: int
    covered: int
    kl: float  # nats, from the good samples' histogram to the uniform one
    confident: float  # share of good samples, within 3 deviations of a mode
    seconds: float


def coverage(
    systems: Iterable[str], *, data: str = "ring", seeds: Iterable[int] = (0, 1, 2), samples: int = 2500, **changes
) -> list[Coverage]:
    """Modes of a mixture in `ivfast.data.points` that S2's systems cover after training: IVGAN against its base GAN.

    Args:
        changes: settings that override the preset's, such as `steps=5000`.

    Source: the measure of Srivastava et al. 2017 and Lin et al. 2018, on 2,500 samples; S2 does not use this set.
    """
    return [
        modes_after_training(
            dataclasses.replace(preset(system, data), data=data, seed=seed, device="cpu", **changes), samples=samples
        )
        for system, seed in itertools.product(systems, seeds)
    ]


def modes_after_training(
    settings: Settings, *, samples: int = 2500, draw: Callable[[Tensor], None] | None = None
) -> Coverage:
    """Modes of the mixture `settings.data` that a system covers after training; `draw` gets the samples."""
    x, mixture = points.load(settings.data, 50_000), points.find(settings.data)

    def count(system) -> dict[str, float]:
        drawn = metrics.generate(system, samples)
        if draw is not None:
            draw(drawn)
        return metrics.point_modes(drawn, mixture)._asdict()

    begin = time.perf_counter()
    with torch.random.fork_rng(devices=cuda_devices(settings.device)):
        system = build(settings, tuple(x.shape[1:]))
        run = Run(system, x.to(settings.device), settings, Path(), None)
        for step in range(1, (settings.steps or settings.epochs * run.batches.per_epoch) + 1):
            run.advance()
            if step % settings.log_every == 0:
                run.record.read(step)
                run.record.clear()
        modes = run.look(count, None, 0)
    return Coverage(settings.system, settings.seed, **modes, seconds=time.perf_counter() - begin)
