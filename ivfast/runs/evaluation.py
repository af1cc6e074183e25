"""Metrics of a trained system on its data set, for `ivfast evaluate`."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from .. import _check, _defaults, metrics
from ..data import Dataset, load, target_of
from ..data.points import POINTS, Mixture
from ..metrics.classifier import Classifier, classifier_of
from ..metrics.probe import probe
from ..models.avb import Avb

CODES = 60_000  # number of codes for FLD (S1, section 4)
NEAREST = 20_000  # number of codes for the nearest-neighbour estimate of their divergence from the prior
HISTOGRAM = 5_000  # points per side in the published estimator of S5's Table 1
REFERENCE = 50_000  # training images behind FID and the classifier distance
NEIGHBOURS = 5  # of the nearest-neighbour estimate
LEAST = {"fld": 2, "kl-to-prior": NEIGHBOURS + 1, "fid": 2, "classifier-distance": 2}  # training images


class Value(NamedTuple):
    name: str
    value: float
    meaning: str


def has_encoder(system) -> bool:
    return hasattr(system, "encode") and hasattr(system, "decode")


def mixture_of(dataset: Dataset) -> Mixture | None:
    """The modes of a point set, if it has any."""
    known = POINTS.get(dataset.name)
    return known if isinstance(known, Mixture) else None


def bound_of(system, dataset: Dataset) -> float:
    return metrics.lower_bound(system, dataset.test, dataset.test_labels if system.labels == "all" else None)


def judged(system, dataset: Dataset, *, download: bool = False) -> Dataset:
    """The data set whose test images the system's own classifier is judged by: for ada, the target domain."""
    if system.labels == "source":
        return target_of(dataset, system.settings.target, system.settings.root, download=download)
    return dataset


METHODS = {  # metric -> the method that a system must have for it
    "bound": "bound",
    "likelihood": "proposal",
    "kl-to-prior": "encode",
    "accuracy": "classify",
}


class Evaluation:
    """Metrics of a trained system on its data set, each computed on request. Samples, networks and the features of the
    training images, the one reference of distances, are computed once.

    Args:
        n: number of samples drawn from the system.
        inception_weights, download: as in `ivfast.metrics.inception.inception`; data sets are fetched too.
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
        _check.count("n", n)
        _check.count("seed", seed, at_least=0)
        self.system, self.dataset, self.n, self.seed = system, dataset, n, seed
        self.inception_weights, self.download = inception_weights, download
        self.device = system.settings.device

    @functools.cached_property
    def samples(self) -> Tensor:
        if not hasattr(self.system, "sample"):
            raise ValueError(f"metrics: {self.system.settings.system} does not generate images")
        return metrics.generate(self.system, self.n, self.seed)

    @functools.cached_property
    def classifier(self) -> Classifier:
        return classifier_of(self.dataset, device=self.device)

    @functools.cached_property
    def classifier_reference(self) -> metrics.ReferenceDistance:
        return metrics.ReferenceDistance(
            metrics.ClassifierFeatures(self.classifier), self.dataset.train[:REFERENCE], self.device
        )

    @functools.cached_property
    def inception_reference(self) -> metrics.ReferenceDistance:
        extract = metrics.InceptionFeatures(self.inception_weights, download=self.download).to(self.device)
        return metrics.ReferenceDistance(extract, self.dataset.train[:REFERENCE], self.device)

    def default(self) -> list[str]:
        """The metrics that apply to this system and data set and need no other files; see `missing`."""
        names = ["fld", "reconstruction"] if has_encoder(self.system) else []
        if self.dataset.name in POINTS:
            planar = ["histogram"] if self.system.image_shape == (2,) and hasattr(self.system, "sample") else []
            return [*names[:1], *(["modes"] if mixture_of(self.dataset) else []), *planar]
        names += [name for name, method in METHODS.items() if hasattr(self.system, method)]
        if not hasattr(self.system, "sample"):
            return names
        if self.dataset.name.startswith("stacked-"):
            return [*names, "modes"]
        if len(self.dataset.classes) < 2:
            return names
        conditional = ["conditional-accuracy"] if getattr(self.system, "classes", 0) else []
        return [*names, "classifier-distance", "classifier-score", *conditional]

    def missing(self, name: str) -> str | None:
        """Why a metric of `METRICS` cannot be computed; None if nothing is known to be missing."""
        system, least = self.system.settings.system, LEAST.get(name, 0)
        if name in ("fld", "reconstruction") and not has_encoder(self.system):
            return f"{name} needs an encoder, which {system} does not have"
        if name not in ("fld", "modes", "kl-to-prior", "histogram") and self.dataset.name in POINTS:
            return f"{name} needs images, and {self.dataset.name} holds points"
        if name in METHODS and not hasattr(self.system, METHODS[name]):
            return f"{name} needs a system with `{METHODS[name]}`, and {system} has none"
        if len(self.dataset.train) < least:
            return f"{name} needs {least} training images or more, got {len(self.dataset.train)}"
        return None

    @_defaults.initial()
    def run(self, name: str) -> list[Value]:
        """The values of one metric of `METRICS`; ValueError if it does not apply."""
        if reason := self.missing(name):
            raise ValueError(f"metrics: {reason}")
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
        return [Value("kl_to_prior", metrics.kl_to_prior(z, NEIGHBOURS), meaning)]

    def accuracy(self):
        where = "target's test images" if self.system.labels == "source" else "test images"
        of = judged(self.system, self.dataset, download=self.download)
        value = metrics.accuracy(self.system, of.test, of.test_labels)
        return [Value("accuracy", value, f"of its own classifier, {where}")]

    def conditional_accuracy(self):
        if not getattr(self.system, "classes", 0):
            raise ValueError(
                f"metrics: conditional-accuracy needs a system with classes, and {self.system.settings.system} has none"
            )
        value = metrics.conditional_accuracy(self.classifier, self.samples, self.device)
        meaning = (
            f"samples of the class they were drawn for, by a classifier of accuracy {self.classifier.accuracy:.1%}"
        )
        return [Value("conditional_accuracy", value, meaning)]

    def fid(self):
        n = min(len(self.dataset.train), REFERENCE)
        value = self.inception_reference(self.samples)
        return [Value("fid", value, f"{self.n:,} samples against {n:,} training images")]

    def classifier_distance(self):
        accuracy = f"classifier's accuracy {self.classifier.accuracy:.1%}"
        value = self.classifier_reference(self.samples)
        found = [Value("classifier_distance", value, f"{self.n:,} samples, Fréchet; not FID; {accuracy}")]
        if len(self.dataset.test) >= 2:
            test = self.classifier_reference(self.dataset.test)
            found.append(Value("classifier_distance_test", test, "the same of the test images, for comparison"))
        return found

    def classifier_score(self):
        score, real = (
            metrics.classifier_score(self.classifier, images, self.device)
            for images in (self.samples, self.dataset.test)
        )
        meaning = f"1 to {len(self.dataset.classes)}; test images score {real:.2f}"
        return [Value("classifier_score", score, meaning)]

    def probe(self):
        train, test = self.dataset, self.dataset.test
        if not has_encoder(self.system):
            raise ValueError(f"metrics: probe needs an encoder, which {self.system.settings.system} does not have")
        if train.train_labels is None or train.test_labels is None or len(train.classes) < 2:
            raise ValueError(f"metrics: probe needs labels, and {train.name} has none")
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
            Value("histogram_kl", result.kl, f"as published, not in nats; test points score {floor.kl:.2g}"),
            Value("histogram_jsd", result.jsd, f"as published, not in nats; test points score {floor.jsd:.2g}"),
            Value("histogram_js", result.js, f"nats, 0 to log 2; test points score {floor.js:.2g}; {counted}"),
        ]

    def modes(self):
        mixture = mixture_of(self.dataset)
        if mixture:
            result = metrics.point_modes(self.samples, mixture)
            return [
                Value("modes", result.covered, f"of {len(mixture.centers)}, by {self.n:,} samples"),
                Value("modes_kl", result.kl, "KL of their histogram to the uniform one, nats"),
                Value("modes_confident", result.confident, "share of samples within 3 deviations of a mode"),
            ]
        base = self.dataset.name.removeprefix("stacked-")
        if base == self.dataset.name:
            raise ValueError(f"metrics: modes needs a stacked data set or a mixture, got {self.dataset.name}")
        settings = self.system.settings
        digits = load(base, settings.root, self.dataset.train.shape[-1], download=self.download)
        result = metrics.modes(classifier_of(digits, device=self.device), self.samples, device=self.device)
        return [
            Value("modes", result.covered, f"of 1,000, counting confident samples among {self.n:,}"),
            Value("modes_kl", result.kl, "KL of their histogram to the uniform one, nats"),
            Value("modes_confident", result.confident, "share of samples with all three digits at p >= .9"),
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
