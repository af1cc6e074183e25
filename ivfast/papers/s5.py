"""S5, AS-IntroVAE: its Table 1 and Figure 5, with four systems trained on 8 Gaussians."""

import dataclasses
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .. import metrics
from ..data import points
from ..models import build, preset
from ..models.introspective import Vae
from ..train.loop import fit
from ..train.phase import System
from ..train.settings import Settings
from .session import Findings, Job, Session, Table, spread

DATA = "8-gaussians"
SAMPLES = 5000  # in the published estimator
# Table 1, C1: KL and JSD as published
PAPER = {
    "vae": (220.2, 110.1),
    "introvae": (192.4, 56.0),
    "s-introvae": (50.2, 16.9),
    "as-introvae": (3.4, 5.6),
}


class Row(NamedTuple):
    system: str
    seed: int
    kl: float  # as published
    jsd: float  # as published
    js: float  # nats, at most log 2
    modes: int  # of 8
    good: float  # share of samples within 3 standard deviations of a mode
    paper_kl: float
    paper_jsd: float
    seconds: float


def table1(
    *,
    systems: Iterable[str] = tuple(PAPER),
    seeds: Iterable[int] = (0,),
    steps: int | None = None,
    full: bool = False,
    **changes,
) -> list[Row]:
    """S5 Table 1, C1: divergences of samples from 8 Gaussians, for a VAE and three introspective VAEs.

    S5 does not print its settings for C1. All four systems use those of Soft-IntroVAE for this set, except IntroVAE's
    β = 1 and margin of 5 nats. On one core of a Xeon 1,000 steps took 5 (vae), 8, 11 and 12 s of processor time: one
    seed of all four takes about six minutes.

    Args:
        steps: default 10,000, or 30,000 with `full`. The first fifteenth trains a plain VAE; AS-IntroVAE's c grows to
            1 over a fifth of the steps.
        full: batches of 512 and a width of 256, as published, instead of 128 and 128.
        changes: other settings, such as `as_kernel="additive"` or `device="cuda"`; the default device is the CPU.
    """
    rows = []
    for seed in seeds:
        for system in systems:
            begin = time.perf_counter()
            trained = train(system, settings(system, seed, steps=steps, full=full, **changes))
            rows.append(_row(trained, system, seed, time.perf_counter() - begin))
    return rows


def settings(system: str, seed: int, *, steps: int | None = None, full: bool = False, **changes) -> Settings:
    """The settings for one cell of Table 1."""
    steps = steps or (30_000 if full else 10_000)
    size = {} if full else {"batch_size": 128, "width": 128}
    base = preset("s-introvae" if system == "vae" else system, DATA)
    schedule = {"steps": steps, "vae_steps": steps // 15, "anneal_steps": steps // 5}
    changes = {**size, **schedule, "seed": seed, "device": "cpu", "tensorboard": False, **changes}
    return dataclasses.replace(base, **base.own(changes))


def train(system: str, settings: Settings) -> System:
    """A system of `PAPER`, trained on 50,000 points; "vae" has the networks and initial weights of the others."""
    x = points.load(DATA, 50_000).to(settings.device)
    made = build(settings, (2,))
    if system == "vae":
        weights, made = made.modules, Vae(settings, (2,))
        for name, module in made.modules.items():
            module.load_state_dict(weights[name].state_dict())
    with tempfile.TemporaryDirectory() as out:
        fit(made, x, settings, out, progress=False)
    return made


def _row(trained: System, system: str, seed: int, seconds: float) -> Row:
    mixture = points.find(DATA)
    samples = metrics.generate(trained, SAMPLES, seed)
    divergence = metrics.histogram_divergence(points.load(DATA, SAMPLES, 1), samples, mixture.reach)
    modes = metrics.point_modes(samples, mixture)
    return Row(system, seed, *divergence, modes.covered, modes.confident, *PAPER[system], seconds)


def markdown(rows: Sequence[Row]) -> str:
    """One line per system and seed, with the paper's numbers next to ours."""
    lines = [
        "| system | seed | KL | paper | JSD | paper | JS, nats | modes | within 3 s.d. | s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| `{r.system}` | {r.seed} | {r.kl:.1f} | {r.paper_kl} | {r.jsd:.1f} | {r.paper_jsd} | {r.js:.3f} "
        f"| {r.modes} | {r.good:.0%} | {r.seconds:.0f} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def figure(
    path: Path | str,
    *,
    systems: Sequence[str] = tuple(PAPER),
    seed: int = 0,
    steps: int | None = None,
    full: bool = False,
    **changes,
) -> Path:
    """S5 Figure 5: samples of each system next to the data, from the same runs and with the same arguments as
    `table1`."""
    panels = {"data": points.load(DATA, SAMPLES, 1)}
    for system in systems:
        trained = train(system, settings(system, seed, steps=steps, full=full, **changes))
        panels[system] = metrics.generate(trained, SAMPLES, seed)
    return draw(panels, Path(path))


def draw(panels: dict[str, Tensor], path: Path) -> Path:
    """Points `[n, 2]` by name, in panels side by side that show the square of the histograms."""
    from matplotlib.figure import Figure

    reach = points.find(DATA).reach
    drawn = Figure(figsize=(2.6 * len(panels), 2.9), dpi=110, layout="constrained")
    for axes, (name, x) in zip(_axes(drawn, len(panels)), panels.items(), strict=True):
        axes.scatter(x[:, 0], x[:, 1], s=2, linewidths=0, alpha=0.4)
        axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xticks=[], yticks=[])
        outside = int((x.abs() > reach).any(1).sum())
        axes.set_title(f"{name}, {outside:,} outside" if outside else name, fontsize=10)
    drawn.savefig(path)
    return path


def _axes(figure, n: int) -> Iterator:
    return iter(figure.subplots(1, n, squeeze=False)[0])


def experiment(session: Session) -> Findings:
    """Table 1, C1, and Figure 5, for `ivfast paper s5-table1`."""
    jobs = [
        Job(settings(name, seed, steps=session.steps, full=session.full, device=session.device), {"system": name})
        for name in PAPER for seed in session.seeds
    ]  # fmt: skip
    found = session.values(row_and_samples, jobs)
    by_name = {name: [row for row in found if row.job.extra["system"] == name] for name in PAPER}
    table = Table(
        f"Table 1, C1: on {SAMPLES:,} samples",
        ("system", "KL, S5", "KL, ours", "JSD, S5", "JSD, ours", "JS, nats", "modes of 8", "within 3 s.d."),
        [
            (name, PAPER[name][0], spread(rows, "kl"), PAPER[name][1],
             *(spread(rows, value) for value in ("jsd", "js", "modes", "good")))
            for name, rows in by_name.items()
        ],
    )  # fmt: skip
    panels = {"data": points.load(DATA, 1000, 1)}
    for name, rows in by_name.items():
        samples = [row.values["samples"] for row in rows if "samples" in row.values]
        if samples:
            panels[name] = torch.tensor(samples[0])
    return Findings([table], {"S5 Fig. 5": draw(panels, session.out / "fig5.png")}, [
        "S5's KL and JSD are not divergences in nats (see `ivfast.metrics.histogram_divergence`); the proper JS is at "
        "most log 2 = .693.",
    ])  # fmt: skip


def row_and_samples(job: Job) -> dict[str, object]:
    name, seed = job.extra["system"], job.settings.seed
    system = train(name, job.settings)
    row = _row(system, name, seed, 0.0)
    samples = [[round(float(v), 3) for v in point] for point in metrics.generate(system, 1000, seed)]
    return {**{value: getattr(row, value) for value in ("kl", "jsd", "js", "modes", "good")}, "samples": samples}
