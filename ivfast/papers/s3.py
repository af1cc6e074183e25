"""S3, "On Unifying Deep Generative Models": its tables on any labelled data set, and Lemma 1 by quadrature.

Each system is compared with its importance-weighted or adversary-activated form.

A tenth of the training images is held out. The temperature of an activated system is the one of `TEMPERATURES` with the
best value there (S3 selects it "through cross-validation", section G.2). Values are for test images or for samples.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import metrics, models
from ..data import Dataset, stratified
from ..metrics.classifier import classifier_of
from ..train.phase import System
from . import draw, session
from .session import Findings, Job, Session, Table, dataset_of, spread

TEMPERATURES = (1.0, 1.5, 3.0, 5.0)
FEWER = (1.0, 3.0)  # at the small size
SAMPLES = 10_000
# (system, data) -> mean and standard deviation, Table 2
TABLE2 = {
    ("gan", "mnist"): "8.34 ± .03", ("iwgan", "mnist"): "8.45 ± .4", ("gan", "svhn"): "5.18 ± .03",
    ("iwgan", "svhn"): "5.34 ± .03", ("gan", "cifar10"): "7.86 ± .05", ("iwgan", "cifar10"): "7.89 ± .04",
    ("cgan", "mnist"): ".985 ± .002", ("iwcgan", "mnist"): ".987 ± .002", ("cgan", "svhn"): ".797 ± .005",
    ("iwcgan", "svhn"): ".798 ± .006",
}  # fmt: skip
# share -> bound in nats on MNIST, Table 3, as far as our copy of the paper is legible
TABLE3 = {
    "vae": {0.01: -122.89, 0.1: -104.49, 1.0: -92.53}, "aavae": {0.01: -122.15, 0.1: -103.05, 1.0: -92.42},
    "svae": {0.01: -108.22, 0.1: -99.44},
}  # fmt: skip
# share -> accuracy on MNIST, Table 4
TABLE4 = {"svae": {0.01: 0.9412, 0.1: 0.9768}, "aasvae": {0.01: 0.9425, 0.1: 0.9797}}
PAIRS = {"vae": "aavae", "cvae": "aacvae", "svae": "aasvae"}


class Row(NamedTuple):
    system: str
    share: float  # of the images or, for a semi-supervised system, of the labels
    seed: int
    temperature: float
    value: float


def table2(
    dataset: Dataset,
    seeds: Iterable[int] = range(5),
    names: Iterable[str] = ("gan", "iwgan", "cgan", "iwcgan"),
    samples: int = SAMPLES,
    **changes,
) -> Iterator[Row]:
    """S3 Table 2, left and middle: the classifier score of GAN and IWGAN, and the accuracy of conditional samples.

    Args:
        changes: to the presets' settings, such as `epochs=10`.
    """
    classifier = classifier_of(dataset)
    for seed in seeds:
        for name in names:
            system = trained(name, dataset, seed=seed, **changes)
            device = system.settings.device
            measure = metrics.conditional_accuracy if system.classes else metrics.classifier_score
            images = metrics.generate(system, samples, seed)
            yield Row(name, 1.0, seed, 1.0, measure(classifier.to(device), images, device))


def bound(system: System, images: Tensor, labels: Tensor) -> float:
    return metrics.lower_bound(system, images, labels if system.labels == "all" else None)


def compare(
    dataset: Dataset,
    names: Iterable[str],
    measure: Callable[[System, Tensor, Tensor], float],
    shares: Iterable[float],
    seeds: Iterable[int],
    temperatures: Iterable[float] = TEMPERATURES,
    **changes,
) -> Iterator[Row]:
    """One row per share, seed and system: `measure(system, images, labels)` on test images; higher is better."""
    dataset, images, labels = held_out(dataset)
    for share in shares:
        for seed in seeds:
            for name in names:
                activated = hasattr(models.SYSTEMS[name], "weighted")
                kind = "label_share" if models.SYSTEMS[name].labels == "some" else "data_share"
                best = max(
                    (
                        trained(name, dataset, seed=seed, temperature=t, **{kind: share}, **changes)
                        for t in (temperatures if activated else (1.0,))
                    ),
                    key=lambda system: measure(system, images, labels),
                )
                value = measure(best, dataset.test, dataset.test_labels)
                yield Row(name, share, seed, getattr(best.settings, "temperature", 1.0), value)


def held_out(dataset: Dataset) -> tuple[Dataset, Tensor, Tensor]:
    """The data set without a tenth of the training images of each class, and the images and labels held out."""
    rows = stratified(dataset.train_labels, 0.1)
    kept = torch.ones(len(dataset.train), dtype=torch.bool).index_fill(0, rows, False)
    rest = dataset._replace(train=dataset.train[kept], train_labels=dataset.train_labels[kept])
    return rest, dataset.train[rows], dataset.train_labels[rows]


def trained(name: str, dataset: Dataset, **changes) -> System:
    """The system trained with its preset and those of `changes` that it has, in batches no larger than the data set."""
    base = models.preset(name, dataset.name)
    settings = dataclasses.replace(base, tensorboard=False, **base.own(changes))
    return session.trained(settings, dataset)[0]


def gans(at: Session) -> Findings:
    dataset = at.load("gan")
    at.need_labels(dataset)
    classifier = classifier_of(dataset, device=at.device)
    changes = {} if at.full else {"steps": at.length(3000)}
    changes = {**changes, "evaluate_every": 10**6}
    extra = {"samples": at.count(SAMPLES)}
    names = ("gan", "iwgan", "cgan", "iwcgan")
    jobs = [Job(at.settings(name, seed, **changes), extra) for name in names for seed in at.seeds]
    found = at.values(scored, jobs)
    by_name = {name: [row for row in found if row.job.settings.system == name] for name in names}
    score = metrics.classifier_score(classifier, dataset.test, at.device)
    here = f"ours, {at.data}"
    tables = [
        Table(title, ("system", *(f"S3 {data}" for data in sets), here), [
            (name, *(TABLE2.get((name, data.lower())) for data in sets), spread(by_name[name], "value"))
            for name in pair
        ])
        for title, sets, pair in (
            (f"Inception score formula; ours uses a classifier of {at.data} (test images: {score:.3g})",
             ("MNIST", "SVHN", "CIFAR10"), names[:2]),
            ("Share of conditional samples classified as their class, by a classifier with accuracy "
             f"{classifier.accuracy:.3f}",
             ("MNIST", "SVHN"), names[2:]),
        )
    ]  # fmt: skip
    path = at.out / "table2.png"
    with draw.panels(path, 2, f"S3 Table 2 on {at.data}", (3.6, 3.0)) as axes:
        for panel, pair, what in zip(axes, (names[:2], names[2:]), ("classifier score", "accuracy"), strict=True):
            values = [spread(by_name[name], "value").values for name in pair]
            draw.points(panel, pair, values, "mean, lowest and highest")
            draw.style(panel, what)
    return Findings(tables, {"S3 Table 2": path})


def scored(job: Job) -> dict[str, object]:
    (row,) = table2(dataset_of(job.settings), [job.settings.seed], [job.settings.system], job.extra["samples"],
                    **_changes(job.settings))  # fmt: skip
    return {"value": row.value}


def bounds(at: Session) -> Findings:
    jobs = _paired(at, PAIRS, (0.01, 0.1, 1.0), "bound")
    return _compared(at, jobs, "bound", TABLE3, "Table 3: lower bound on test images, nats")


def accuracies(at: Session) -> Findings:
    jobs = _paired(at, {"svae": "aasvae"}, (0.01, 0.1), "accuracy")
    return _compared(at, jobs, "accuracy", TABLE4, "Table 4: accuracy on test images")


def _paired(at: Session, pairs: dict[str, str], shares: Iterable[float], measure: str) -> list[Job]:
    at.need_labels(at.load("vae"))
    changes = {} if at.full else {"steps": at.length(800)}
    extra = {"measure": measure, "temperatures": TEMPERATURES if at.full else FEWER}
    jobs = []
    for names in pairs.items():
        some = models.SYSTEMS[names[0]].labels == "some"
        kind = "label_share" if some else "data_share"
        jobs += [
            Job(at.settings(name, seed, **{kind: share}, **changes, evaluate_every=10**6), extra)
            for share in shares if share < 1 or not some for seed in at.seeds for name in names
        ]  # fmt: skip
    return jobs


def measured(job: Job) -> dict[str, object]:
    settings, measure = job.settings, {"bound": bound, "accuracy": metrics.accuracy}[job.extra["measure"]]
    rows = compare(dataset_of(settings), [settings.system], measure, [_share(settings)], [settings.seed],
                   job.extra["temperatures"], **_changes(settings))  # fmt: skip
    (row,) = rows
    return {"value": row.value, "temperature": row.temperature}


def _share(settings) -> float:
    return settings.data_share * getattr(settings, "label_share", 1.0)


def _changes(settings) -> dict[str, object]:
    """Settings that differ from their preset, except those that `compare` sets itself."""
    preset = models.preset(settings.system, settings.data).to_dict()
    own = ("seed", "data_share", "label_share", "temperature", "tensorboard")
    return {name: getattr(settings, name) for name, value in settings.to_dict().items()
            if name not in own and value != preset[name]}  # fmt: skip


def _compared(at: Session, jobs: list[Job], value: str, paper: dict, title: str) -> Findings:
    found = at.values(measured, jobs)
    groups: dict[tuple[str, float], list] = {}
    for row in found:
        groups.setdefault((row.job.settings.system, _share(row.job.settings)), []).append(row)
    rows = []
    for (system, share), group in groups.items():
        temperatures = ", ".join(f"{row.values['temperature']:g}" for row in group if "temperature" in row.values)
        rows.append((system, f"{share:.0%}", paper.get(system, {}).get(share), spread(group, "value"),
                     temperatures if system in PAIRS.values() else None))  # fmt: skip
    table = Table(title, ("system", "share", "S3, MNIST", f"ours, {at.data}", "temperature"), rows)
    pairs = {base: activated for base, activated in PAIRS.items() if any(base == system for system, _ in groups)}
    path = at.out / f"{at.experiment.name.removeprefix('s3-')}.png"
    heading = f"The activated adversary's gain, {at.data} and S3's MNIST"
    with draw.panels(path, len(pairs), heading, (3.6, 3.0)) as axes:
        for panel, (base, activated) in zip(axes, pairs.items(), strict=True):
            shares = [share for system, share in groups if system == base]
            labels = [f"{share:.0%}" for share in shares]
            draw.points(panel, labels, [_gains(groups, base, activated, s) for s in shares], "ours", 0.08)
            printed = [paper[activated][s] - paper[base][s] if s in paper.get(activated, {}) else None for s in shares]
            if any(gain is not None for gain in printed):
                known = [[] if gain is None else [gain] for gain in printed]
                draw.points(panel, labels, known, "S3", -0.08, color="0.4")
            panel.axhline(0, color="0.4", linewidth=1)
            draw.style(panel, f"{activated} − {base}", "share of the data", value)
            panel.legend(fontsize=8)
    notes = ["The images differ, so only the sign of the gain can be compared with S3, not its size."]
    if any(paper.get(system, {}).get(share) is None for system, share in groups):
        notes.append("S3's missing numbers are illegible in our copy of the paper.")
    return Findings([table], {"the gain": path}, notes)


def _gains(groups: dict, base: str, activated: str, share: float) -> list[float]:
    """The gains over the seeds that both have."""
    values = [
        {row.job.settings.seed: row.values["value"] for row in groups[name, share] if "value" in row.values}
        for name in (base, activated)
    ]
    return [values[1][seed] - values[0][seed] for seed in values[0] if seed in values[1]]


def lemma1(at: Session) -> Findings:
    """p_g = N(θ, 1.3²), p_data = N(0, 1): ∇θ of Eq. 10's two sides at θ₀, and of Eq. 14's right side."""
    thetas = [-2.0, -0.5, 0.5, 1.0, 1.7, 3.0]
    rows, series = [], {name: [] for name in DISCRIMINATORS}
    for name in DISCRIMINATORS:
        for theta in thetas:
            sides = gradients(theta, name)
            series[name].append(sides)
            fourteenth = sides.eq14 if name == "optimal" else None
            left, right = (round(side, 12) + 0.0 for side in sides[:2])  # show rounding errors as zeros
            rows.append((name, theta, left, right, fourteenth, f"{abs(sides.left - sides.right):.0e}"))
    table = Table(
        "Gradients with respect to θ at θ₀",
        ("discriminator", "θ₀", "−∇ E log q^r(y|x)", "∇ (E KL − JSD), Eq. 10", "∇ (½ KL − JSD), Eq. 14", "difference"),
        rows,
    )
    path = at.out / "lemma1.png"
    with draw.panels(path, 2, "S3 Lemma 1 on 1-D Gaussians") as (densities, curves):
        p_data, p_g = _normal(0.0, 1.0), _normal(torch.tensor(3.0), 1.3)
        q = torch.sigmoid(_logits("logistic", p_data, p_g)) * (p_data + p_g) / 2
        shown = (GRID > -5) & (GRID < 8)
        for p, label, line in (
            (p_data, "p_data", "-"),
            (p_g, "p_g, θ₀ = 3", "-"),
            (q / _integral(q), "qʳ(x | y = 0), logistic D", "--"),
        ):
            densities.plot(GRID[shown], p[shown], line, label=label)
        draw.style(densities, "S3 Fig. 2: p_g moves towards qʳ(x|y = 0)", "x")
        densities.legend(fontsize=8)
        for name, sides in series.items():
            (line,) = curves.plot(thetas, [s.left for s in sides], label=f"left side, {name} D")
            curves.plot(thetas, [s.right for s in sides], "o", color=line.get_color())
        curves.plot([], [], "o", color="0.4", label="right sides, Eq. 10")
        draw.style(curves, "gradient with respect to θ at θ₀", "θ₀")
        curves.legend(fontsize=8)
    return Findings([table], {"S3 Fig. 2, and both sides": path}, [
        "Eq. 10 holds for every discriminator, Eq. 14 only for the optimal one; a uniform one gives 0, as S3 says. "
        "Eq. 24, whose gradient is the lemma, lacks the normaliser of q^r(x|y), a constant in θ.",
    ])  # fmt: skip


GRID = torch.linspace(-14, 14, 20001, dtype=torch.float64, device="cpu")
DISCRIMINATORS = ("optimal", "logistic", "uniform")


class Sides(NamedTuple):
    left: float
    right: float
    eq14: float


def gradients(theta: float, discriminator: str) -> Sides:
    """∂/∂θ at θ₀ of both sides of Eq. 10, and of Eq. 14's right side."""
    variable = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
    p_data, p_g, p_g0 = _normal(0.0, 1.0), _normal(variable, 1.3), _normal(variable.detach(), 1.3)
    logits = _logits(discriminator, p_data, p_g0)
    left = 0.5 * _integral(p_g * F.softplus(-logits)) + 0.5 * _integral(p_data * F.softplus(logits))
    prior = (p_g0 + p_data) / 2  # p_θ0(x)
    posterior = [q * prior / _integral(q * prior) for q in (logits.sigmoid(), (-logits).sigmoid())]  # q^r(x|y)
    right = 0.5 * _kl(p_g, posterior[0]) + 0.5 * _kl(p_data, posterior[1]) - _jsd(p_g, p_data)
    eq14 = 0.5 * _kl(p_g, p_data) - _jsd(p_g, p_data)
    slopes = (torch.autograd.grad(side, variable, retain_graph=True)[0] for side in (left, right, eq14))
    return Sides(*map(float, slopes))


def _logits(discriminator: str, p_data: Tensor, p_g: Tensor) -> Tensor:
    """Logits of the probability of "real", at the points of the grid."""
    return {
        "optimal": p_data.log() - p_g.log(),
        "logistic": 0.8 - 1.1 * GRID,
        "uniform": torch.zeros_like(GRID),
    }[discriminator]


def _normal(mean, scale: float) -> Tensor:
    return torch.distributions.Normal(torch.as_tensor(mean, dtype=torch.float64), scale).log_prob(GRID).exp()


def _integral(values: Tensor) -> Tensor:
    return torch.trapezoid(values, GRID)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return _integral(p * (p.log() - q.log()))


def _jsd(p: Tensor, q: Tensor) -> Tensor:
    m = (p + q) / 2
    return 0.5 * (_kl(p, m) + _kl(q, m))
