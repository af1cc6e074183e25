"""S4, Adversarial Variational Bayes: Table 1 and Figures 3 and 6.

Table 1's reconstruction error is per pixel. If it were a sum over the four pixels, the mutual information between x and
z, −ELBO − reconstruction − KL(q(z), p), would be 1.43 nats for both systems, but four points have at most
log 4 = 1.39.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from .. import metrics
from ..data import Dataset, points
from ..models import build, preset
from ..models.avb import Avb
from ..runs import pictures, report
from ..train.phase import System
from ..train.run import Run
from . import draw
from .session import Findings, Job, Session, Table, spread

DRAWS = 20_000  # codes from the posterior of each point
OPTIMUM = -math.log(4)  # of the log-likelihood
NAMES = "reconstruction", "elbo", "kl"


class Row(NamedTuple):
    system: str
    seed: int | None  # None for the paper's values
    log_likelihood: float  # mean of log p(x) over the four points
    reconstruction: float  # E −log p(x|z), z from the posterior, per pixel
    elbo: float
    kl: float  # KL(q(z), p)
    claimed: float  # the system's own ELBO; for AVB it relies on T
    seconds: float


PAPER = (
    Row("vae", None, -1.593, 0.091, -1.700, 0.175, -1.700, math.nan),
    Row("avb", None, -1.462, 0.021, math.nan, 0.028, -1.483, math.nan),
)


def table1(*, seeds: Iterable[int] = (0, 1), steps: int = 6000, width: int = 128, **changes) -> list[Row]:
    """S4 Table 1: the paper's rows, then a VAE with a Gaussian posterior and AVB for each seed, trained here.

    Log-likelihoods are computed by quadrature over the codes. The ELBO is −E[−log p(x|z)] − KL(q(z|x), p). The
    divergence has a closed form for a Gaussian; for AVB it is estimated by nearest neighbours
    (`ivfast.metrics.kl_to_prior`), as is KL(q(z), p) for both.

    Args:
        steps, width: for both systems; the paper's layers have 512 units.
        changes: other settings, such as `contrast="adaptive"`, which the VAE does not have.
    """
    changes = {"steps": steps, "width": width, "discriminator_width": width, **changes}
    rows = list(PAPER)
    for seed in seeds:
        for name in ("vae", "avb"):
            begin = time.perf_counter()
            system = trained(name, seed=seed, **changes)
            rows.append(measured(system, time.perf_counter() - begin))
    return rows


def trained(name: str, **changes) -> System:
    """The system after training on the four points with its preset and `changes`, on the CPU, in evaluation mode."""
    base = preset(name, "four-points")
    settings = dataclasses.replace(base, device="cpu", **base.own(changes))
    x = points.load("four-points", 50_000)
    with torch.random.fork_rng(devices=[]):
        run = Run(build(settings, tuple(x.shape[1:])), x, settings, Path(), None)
        for step in range(1, settings.steps + 1):
            run.advance()
            if step % settings.log_every == 0:
                run.record.read(step)
                run.record.clear()
    run.system.train(False)
    return run.system


def measured(system: System, seconds: float = math.nan) -> Row:
    """Table 1's row for a system trained on the four points."""
    x = points.POINTS["four-points"].centers
    many = x.repeat_interleave(DRAWS, 0)
    z = metrics.posterior_codes(system, many)
    with torch.no_grad():
        surprise = float(system.surprise(many, z).double().mean())
    claimed = metrics.lower_bound(system, many)
    if isinstance(system, Avb):
        elbo = -surprise - statistics.mean(metrics.kl_to_prior(part) for part in z.split(DRAWS))
    else:
        elbo = claimed
    return Row(
        system.settings.system,
        system.settings.seed,
        float(metrics.quadrature_log_likelihood(system, x).mean()),
        surprise / x.shape[1],
        elbo,
        metrics.kl_to_prior(z),
        claimed,
        seconds,
    )


def markdown(rows: Iterable[Row]) -> str:
    """The paper's values and the mean ± standard deviation over the seeds, one line per system."""
    lines = [
        "| | seeds | log-likelihood | reconstruction error | ELBO | the system's own ELBO | KL(q(z), p) |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, bool], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.system, row.seed is None), []).append(row)
    for (system, papers), group in groups.items():
        cells = []
        for name in ("log_likelihood", "reconstruction", "elbo", "claimed", "kl"):
            values = [getattr(row, name) for row in group]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append("–" if math.isnan(values[0]) else f"{statistics.mean(values):.3f}{spread}")
        who = f"{system}, S4" if papers else system
        lines.append(f"| {who} | {'–' if papers else len(group)} | {' | '.join(cells)} |")
    lines.append(f"| optimum | – | {OPTIMUM:.3f} | 0 | {OPTIMUM:.3f} | {OPTIMUM:.3f} | 0 |")
    return "\n".join(lines) + "\n"


def figure(systems: Mapping[str, System], out: Path, draws: int = 2500) -> Path:
    """S4 Figure 3: codes from q(z|x_i) for the four points, one colour each; one panel per system with 2-D codes."""
    from matplotlib.figure import Figure

    x = points.POINTS["four-points"].centers
    drawn = Figure(figsize=(4.6 * len(systems), 4.9), dpi=110, layout="constrained")
    for i, (title, system) in enumerate(systems.items()):
        axes = drawn.add_subplot(1, len(systems), i + 1, aspect="equal")
        z = metrics.posterior_codes(system, x.repeat_interleave(draws, 0))
        if z.shape[1] != 2:
            raise ValueError(f"systems must have codes of two dimensions, {title} has {z.shape[1]}")
        for point, codes in enumerate(z.split(draws)):
            axes.scatter(codes[:, 0], codes[:, 1], s=3, linewidths=0, alpha=0.6, color=f"C{point}")
        axes.set(xlim=(-4, 4), ylim=(-4, 4))
        axes.grid(**pictures.GRID)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(title, fontsize=12)
    drawn.savefig(out)
    return Path(out)


def interpolation(system: System, dataset: Dataset, out: Path, rows: int = 6) -> Path:
    """S4 Figure 6: decoded straight lines between the codes of pairs of test images."""
    z = metrics.codes(system, dataset.test[: 2 * rows])
    return pictures.interpolations(report.interpolated(system, z, rows), Path(out))


def experiment(session: Session) -> Findings:
    """Table 1 and Figure 3, for `ivfast paper s4-table1`."""
    steps, width = session.length(30_000 if session.full else 6000), 512 if session.full else 128
    size = {"steps": steps, "width": width, "discriminator_width": width}
    jobs = [Job(session.settings(name, seed, **size)) for name in ("vae", "avb") for seed in session.seeds]
    found = session.values(row_and_codes, jobs)
    by_name = {name: [row for row in found if row.job.settings.system == name] for name in ("vae", "avb")}
    columns = ("log_likelihood", "reconstruction", "elbo", "claimed", "kl")
    rows = []
    for paper in PAPER:
        printed = [getattr(paper, name) for name in columns]
        rows.append((f"{paper.system}, S4", *(None if math.isnan(value) else value for value in printed)))
        rows.append((f"{paper.system}, ours", *(spread(by_name[paper.system], name) for name in columns)))
    rows.append(("optimum", OPTIMUM, 0.0, OPTIMUM, OPTIMUM, 0.0))
    table = Table(
        f"Table 1: after {steps:,} steps, width {width}",
        ("", "log-likelihood", "reconstruction error", "ELBO", "the system's own ELBO", "KL(q(z), p)"),
        rows,
    )
    path = session.out / "fig3.png"
    with draw.panels(path, 2, "S4 Fig. 3: codes of the four points", (4.0, 4.0)) as axes:
        for panel, (name, rows) in zip(axes, by_name.items(), strict=True):
            for codes in next((row.values["codes"] for row in rows if "codes" in row.values), []):
                panel.scatter(*zip(*codes, strict=True), s=3, linewidths=0, alpha=0.6)
            panel.set(xlim=(-4, 4), ylim=(-4, 4), aspect="equal")
            draw.style(panel, name)
    return Findings([table], {"S4 Fig. 3": path})


def row_and_codes(job: Job) -> dict[str, object]:
    s = job.settings
    system = trained(s.system, seed=s.seed, steps=s.steps, width=s.width, discriminator_width=s.discriminator_width)
    row = measured(system)
    z = metrics.posterior_codes(system, points.POINTS["four-points"].centers.repeat_interleave(500, 0))
    codes = [[[round(float(v), 3) for v in code] for code in part] for part in z.split(500)]
    names = ("log_likelihood", "reconstruction", "elbo", "claimed", "kl")
    return {**{name: getattr(row, name) for name in names}, "codes": codes}
