"""What a run shows: metrics while it trains, pictures, tables of results."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from . import metrics, pictures
from .classifier import classifier_of
from .data import Dataset, load, target_of
from .models.avb import Avb
from .points import POINTS, Mixture
from .probe import probe
from .train.settings import Settings

CODES = 60_000  # FLD is taken on so many codes (S1, section 4)
NEAREST = 20_000  # codes whose nearest neighbours estimate their divergence from the prior
RECONSTRUCTED = 1_000  # test images at each look while training; `ivfast evaluate` takes all
LOOK = 2_500  # points drawn to count modes while training (Srivastava et al. 2017)
HISTOGRAM = 5_000  # points a side in the published estimator of S5's Table 1
REFERENCE = 50_000  # real images behind FID and the classifier distance


class Value(NamedTuple):
    name: str
    value: float
    meaning: str


def has_encoder(system) -> bool:
    return hasattr(system, "encode") and hasattr(system, "decode")


def while_training(dataset: Dataset) -> Callable[[object], dict[str, float]]:
    """The `evaluate` of `ivfast.train.loop.fit`, as far as the system goes: FLD of the training codes; reconstruction
    of 1,000 test images; on all of them the variational bound, the accuracy of the system's own classifier; modes of
    points."""

    def evaluate(system):
        values = {}
        if has_encoder(system):
            values["fld"] = metrics.latent_frechet_distance(metrics.codes(system, dataset.train[:CODES]))
            if dataset.name not in POINTS:
                values |= metrics.reconstruction(system, dataset.test[:RECONSTRUCTED])._asdict()
        if _mixture(dataset):
            modes = metrics.point_modes(metrics.generate(system, LOOK), _mixture(dataset))
            values |= {"modes": modes.covered, "modes_confident": modes.confident}
        if hasattr(system, "bound"):
            values["bound"] = bound_of(system, dataset)
        if hasattr(system, "classify"):
            values["accuracy"] = accuracy_of(system, dataset)
        return values

    return evaluate


def _mixture(dataset: Dataset) -> Mixture | None:
    """The modes of a set of points that has some."""
    known = POINTS.get(dataset.name)
    return known if isinstance(known, Mixture) else None


def bound_of(system, dataset: Dataset) -> float:
    return metrics.lower_bound(system, dataset.test, dataset.test_labels if system.labels == "all" else None)


def accuracy_of(system, dataset: Dataset) -> float:
    """Of ada on the target domain."""
    if system.labels == "source":
        dataset = target_of(dataset, system.settings.target, system.settings.root)
    return metrics.accuracy(system, dataset.test, dataset.test_labels)


def draw_samples(system, folder: Path, epoch: int) -> None:
    """The `draw` of `ivfast.train.loop.fit`: the same points of the prior every time, decoded."""
    if not hasattr(system, "sample"):
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    n = 64 if system.image_shape[1:] else LOOK
    pictures.samples(metrics.generate(system, n), Path(folder) / f"samples-{epoch:04d}.png")


def draw(system, dataset: Dataset, out: Path) -> dict[str, Path]:
    """Every picture of a finished run, by what it shows."""
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
        drawn["interpolations"] = pictures.interpolations(interpolated(system, z), folder / "interpolations.png")
    if has_encoder(system):
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
    points = torch.lerp(first, second, torch.linspace(0, 1, columns)[:, None])  # [rows, columns, d]
    return metrics.decoded(system, points.flatten(0, 1)).unflatten(0, (rows, columns))


def _series(log: Path) -> dict[str, list[tuple[int, float]]]:
    series: dict[str, list[tuple[int, float]]] = {}
    for kind in ("losses", "metrics"):
        for record in pictures.read_log(log):
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
    """What the command line says at the end of a run: results, files to look at, commands to type next."""
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
    commands = f"evaluate {out}", f"train --resume --out {out} {more}"
    if "samples" in drawn:
        commands = f"sample {out} -n 64", *commands
    lines = ["[bold]Look at[/bold]"]
    lines += [f"  {escape(f'{path!s:{wide}}')}  [dim]{what}[/dim]" for what, path in files.items()]
    lines += ["", "[bold]Next[/bold]", *(f"  [green]ivfast {escape(command)}[/green]" for command in commands)]
    console.print("\n".join(lines), soft_wrap=True)


def _metrics_by_epoch(looks: list[dict]) -> Table:
    """The last values, and those at the lowest FLD where that was earlier."""
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


METHODS = {  # metric -> what a system must have for it
    "bound": "bound",
    "likelihood": "proposal",
    "kl-to-prior": "encode",
    "accuracy": "classify",
}


class Evaluation:
    """Metrics of a trained system on its data set, each computed when it is asked for.

    Args:
        n: samples drawn from the system.
        inception_weights, download: as `ivfast.inception.inception`'s.
    """

    def __init__(
        self,
        system,
        dataset: Dataset,
        *,
        n: int = 10_000,
        seed: int = 0,
        inception_weights: Path | None = None,
        download: bool = False,
    ):
        self.system, self.dataset, self.n, self.seed = system, dataset, n, seed
        self.inception_weights, self.download = inception_weights, download
        self.device = system.settings.device
        self._samples: Tensor | None = None

    @property
    def samples(self) -> Tensor:
        if self._samples is None:
            if not hasattr(self.system, "sample"):
                raise ValueError(f"metrics: {self.system.settings.system} generates no images")
            self._samples = metrics.generate(self.system, self.n, self.seed)
        return self._samples

    def default(self) -> list[str]:
        """The metrics that apply to this system and data set and need nothing from outside."""
        names = ["fld", "reconstruction"] if has_encoder(self.system) else []
        if self.dataset.name in POINTS:
            planar = ["histogram"] if self.system.image_shape == (2,) and hasattr(self.system, "sample") else []
            return [*names[:1], *(["modes"] if _mixture(self.dataset) else []), *planar]
        names += [name for name, method in METHODS.items() if hasattr(self.system, method)]
        if not hasattr(self.system, "sample"):
            return names
        if self.dataset.name.startswith("stacked-"):
            return [*names, "modes"]
        if len(self.dataset.classes) < 2:
            return names
        conditional = ["conditional-accuracy"] if getattr(self.system, "classes", 0) else []
        return [*names, "classifier-distance", "classifier-score", *conditional]

    def run(self, name: str) -> list[Value]:
        """The values of one metric of `METRICS`; ValueError where it does not apply."""
        if name in ("fld", "reconstruction") and not has_encoder(self.system):
            raise ValueError(f"metrics: {name} needs an encoder, which {self.system.settings.system} has not")
        if name not in ("fld", "modes", "kl-to-prior", "histogram") and self.dataset.name in POINTS:
            raise ValueError(f"metrics: {name} is of images, and {self.dataset.name} holds points")
        if name in METHODS and not hasattr(self.system, METHODS[name]):
            raise ValueError(
                f"metrics: {name} needs a system with `{METHODS[name]}`, which {self.system.settings.system} has not"
            )
        return METRICS[name](self)

    def fld(self):
        z = metrics.codes(self.system, self.dataset.train[:CODES])
        meaning = f"{len(z):,} training codes against N(0, I) (S1)"
        return [Value("fld", metrics.latent_frechet_distance(z), meaning)]

    def reconstruction(self):
        result, n = metrics.reconstruction(self.system, self.dataset.test), len(self.dataset.test)
        return [
            Value("mse", result.mse, f"per pixel in [0, 1], {n:,} test images"),
            Value("psnr", result.psnr, f"dB, mean over {n:,} test images"),
            Value("ssim", result.ssim, f"mean over {n:,} test images"),
        ]

    def bound(self):
        given = "log p(x|y)" if self.system.labels == "all" else "log p(x)"
        whose = "as its discriminator estimates it, " if isinstance(self.system, Avb) else ""
        meaning = f"nats, variational lower bound of {given}, {whose}{len(self.dataset.test):,} test images"
        return [Value("bound", bound_of(self.system, self.dataset), meaning)]

    def likelihood(self):
        images, conditional = self.dataset.test, self.system.labels == "all"
        labels = self.dataset.test_labels if conditional else None
        value = metrics.importance_log_likelihood(self.system, images, labels)
        given = "log p(x|y)" if conditional else "log p(x)"
        return [
            Value("likelihood", value, f"nats, {given} by 100 importance-weighted codes, {len(images):,} test images")
        ]

    def kl_to_prior(self):
        z = metrics.posterior_codes(self.system, self.dataset.train[:NEAREST])
        meaning = f"nats, KL(q(z), p) by nearest neighbours, {len(z):,} training codes (S4)"
        return [Value("kl_to_prior", metrics.kl_to_prior(z), meaning)]

    def accuracy(self):
        where = "target's test images" if self.system.labels == "source" else "test images"
        return [Value("accuracy", accuracy_of(self.system, self.dataset), f"of its own classifier, {where}")]

    def conditional_accuracy(self):
        if not getattr(self.system, "classes", 0):
            raise ValueError(
                f"metrics: conditional-accuracy needs a system with classes, which {self.system.settings.system} is not"
            )
        classifier = classifier_of(self.dataset, device=self.device)
        value = metrics.conditional_accuracy(classifier, self.samples, self.device)
        meaning = f"samples of the class they were drawn for, by a classifier of accuracy {classifier.accuracy:.1%}"
        return [Value("conditional_accuracy", value, meaning)]

    def fid(self):
        real = self.dataset.train[:REFERENCE]
        value = metrics.frechet_inception_distance(
            real, self.samples, weights=self.inception_weights, download=self.download, device=self.device
        )
        return [Value("fid", value, f"{self.n:,} samples against {len(real):,} training images")]

    def classifier_distance(self):
        classifier, real = classifier_of(self.dataset, device=self.device), self.dataset.train[:REFERENCE]
        samples, test = (
            metrics.frechet_classifier_distance(classifier, real, images, self.device)
            for images in (self.samples, self.dataset.test)
        )
        accuracy = f"classifier's accuracy {classifier.accuracy:.1%}"
        return [
            Value("classifier_distance", samples, f"{self.n:,} samples, Fréchet; not FID; {accuracy}"),
            Value("classifier_distance_test", test, "the same of the test images, for comparison"),
        ]

    def classifier_score(self):
        classifier = classifier_of(self.dataset, device=self.device)
        score, real = (
            metrics.classifier_score(classifier, images, self.device) for images in (self.samples, self.dataset.test)
        )
        meaning = f"1 to {len(self.dataset.classes)}; test images have {real:.2f}"
        return [Value("classifier_score", score, meaning)]

    def probe(self):
        train, test = self.dataset, self.dataset.test
        if not has_encoder(self.system):
            raise ValueError(f"metrics: probe needs an encoder, which {self.system.settings.system} has not")
        if train.train_labels is None or train.test_labels is None or len(train.classes) < 2:
            raise ValueError(f"metrics: probe learns labels, and {train.name} has none")
        z, z_test = (metrics.codes(self.system, images) for images in (train.train, test))
        found = probe(z, train.train_labels, z_test, train.test_labels, seed=self.seed, device=self.device)
        meaning = f"of 2 x 1000 units on the codes, {found.steps[-1]:,} steps of 60 (S1); {len(test):,} test images"
        return [Value("probe_error", found.errors[-1], meaning)]

    def histogram(self):
        if self.dataset.name not in POINTS or self.system.image_shape != (2,):
            raise ValueError(f"metrics: histogram needs points in the plane, got {self.dataset.name}")
        real, fake = self.dataset.test[:HISTOGRAM], self.samples[:HISTOGRAM]
        reach = POINTS[self.dataset.name].reach
        result, floor = (metrics.histogram_divergence(real, x, reach) for x in (fake, self.dataset.test[-HISTOGRAM:]))
        counted = f"{len(fake):,} samples against {len(real):,} points, 100 x 100 cells on ±{reach:g}"
        return [
            Value("histogram_kl", result.kl, f"as published, not in nats; test points have {floor.kl:.2g}"),
            Value("histogram_jsd", result.jsd, f"as published, not in nats; test points have {floor.jsd:.2g}"),
            Value("histogram_js", result.js, f"nats, 0 to log 2; test points have {floor.js:.2g}; {counted}"),
        ]

    def modes(self):
        mixture = _mixture(self.dataset)
        if mixture:
            result = metrics.point_modes(self.samples, mixture)
            return [
                Value("modes", result.covered, f"of {len(mixture.centers)}, in the good ones of {self.n:,} samples"),
                Value("modes_kl", result.kl, "KL of their histogram to the uniform one, nats"),
                Value("modes_confident", result.confident, "share of samples within 3 deviations of a mode"),
            ]
        base = self.dataset.name.removeprefix("stacked-")
        if base == self.dataset.name:
            raise ValueError(f"metrics: modes needs a stacked data set or a mixture, got {self.dataset.name}")
        settings = self.system.settings
        digits = load(base, settings.root, self.dataset.train.shape[-1])
        result = metrics.modes(classifier_of(digits, device=self.device), self.samples, device=self.device)
        return [
            Value("modes", result.covered, f"of 1,000, in the confident ones of {self.n:,} samples"),
            Value("modes_kl", result.kl, "KL of their histogram to the uniform one, nats"),
            Value("modes_confident", result.confident, "share of samples, all three digits at p >= .9"),
        ]


METRICS: dict[str, Callable[[Evaluation], list[Value]]] = {
    "fld": Evaluation.fld,
    "reconstruction": Evaluation.reconstruction,
    "bound": Evaluation.bound,
    "likelihood": Evaluation.likelihood,
    "kl-to-prior": Evaluation.kl_to_prior,
    "accuracy": Evaluation.accuracy,
    "conditional-accuracy": Evaluation.conditional_accuracy,
    "fid": Evaluation.fid,
    "classifier-distance": Evaluation.classifier_distance,
    "classifier-score": Evaluation.classifier_score,
    "probe": Evaluation.probe,
    "modes": Evaluation.modes,
    "histogram": Evaluation.histogram,
}
