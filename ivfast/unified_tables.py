"""S3's tables on any labelled data set: each system beside its importance-weighted or adversary-activated form.

A tenth of the training images is held out; the temperature of an activated system is the one of `TEMPERATURES` with the
best value there (S3 selects it "through cross-validation", section G.2). Values are of test images, or of samples.
"""

import dataclasses
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import metrics, models, runs
from .classifier import classifier_of
from .data import Dataset, stratified
from .train.loop import fit
from .train.phase import System

TEMPERATURES = (1.0, 1.5, 3.0, 5.0)
SAMPLES = 10_000


class Row(NamedTuple):
    system: str
    share: float  # of the images or, where the system is semi-supervised, of the labels
    seed: int
    temperature: float
    value: float


def table2(dataset: Dataset, seeds: Iterable[int] = range(5), **changes) -> Iterator[Row]:
    """S3 Table 2, left and middle: the classifier score of GAN and IWGAN, accuracy of the conditional samples.

    Args:
        changes: of the presets' settings, as `epochs=10`.
    """
    classifier = classifier_of(dataset)
    for seed in seeds:
        for name in ("gan", "iwgan", "cgan", "iwcgan"):
            system = trained(name, dataset, seed=seed, **changes)
            device = system.settings.device
            measure = metrics.conditional_accuracy if system.classes else metrics.classifier_score
            samples = metrics.generate(system, SAMPLES, seed)
            yield Row(name, 1.0, seed, 1.0, measure(classifier.to(device), samples, device))


def table3(
    dataset: Dataset, shares: Iterable[float] = (0.01, 0.1, 1.0), seeds: Iterable[int] = (0,), **changes
) -> Iterator[Row]:
    """S3 Table 3: variational lower bounds on test images, in nats, trained on shares of the images."""

    def bound(system: System, images: Tensor, labels: Tensor) -> float:
        return metrics.lower_bound(system, images, labels if system.labels == "all" else None)

    pairs = (("vae", "aavae"), ("cvae", "aacvae"), ("svae", "aasvae"))
    for names in pairs:
        semi_supervised = models.SYSTEMS[names[0]].labels == "some"
        kept = [share for share in shares if share < 1 or not semi_supervised]  # with all labels, it is none
        yield from compare(dataset, names, bound, kept, seeds, **changes)


def table4(
    dataset: Dataset, shares: Iterable[float] = (0.01, 0.1), seeds: Iterable[int] = range(5), **changes
) -> Iterator[Row]:
    """S3 Table 4 (and 2, right): accuracy of the semi-supervised systems on test images, by the share of labels."""
    return compare(dataset, ("svae", "aasvae"), metrics.accuracy, shares, seeds, **changes)


def compare(
    dataset: Dataset,
    names: Iterable[str],
    measure: Callable[[System, Tensor, Tensor], float],
    shares: Iterable[float],
    seeds: Iterable[int],
    **changes,
) -> Iterator[Row]:
    """A row for each share, seed and system: `measure(system, images, labels)` on test images, higher is better."""
    dataset, images, labels = held_out(dataset)
    for share in shares:
        for seed in seeds:
            for name in names:
                activated = hasattr(models.SYSTEMS[name], "weighted")
                kind = "label_share" if models.SYSTEMS[name].labels == "some" else "data_share"
                best = max(
                    (
                        trained(name, dataset, seed=seed, temperature=t, **{kind: share}, **changes)
                        for t in (TEMPERATURES if activated else (1.0,))
                    ),
                    key=lambda system: measure(system, images, labels),
                )
                value = measure(best, dataset.test, dataset.test_labels)
                yield Row(name, share, seed, best.settings.temperature, value)


def held_out(dataset: Dataset) -> tuple[Dataset, Tensor, Tensor]:
    """The data set without a tenth of each class of its training images, and those images and labels."""
    rows = stratified(dataset.train_labels, 0.1)
    kept = torch.ones(len(dataset.train), dtype=torch.bool).index_fill(0, rows, False)
    rest = dataset._replace(train=dataset.train[kept], train_labels=dataset.train_labels[kept])
    return rest, dataset.train[rows], dataset.train_labels[rows]


def trained(name: str, dataset: Dataset, **changes) -> System:
    """The system after its preset's training with `changes`, in batches of no more images than there are."""
    settings = dataclasses.replace(models.preset(name, dataset.name), tensorboard=False, **changes)
    settings = runs.with_classes(settings, dataset)
    shape = tuple(dataset.train.shape[1:])
    images, labels = runs.training_set(models.build(settings, shape), dataset)
    settings = dataclasses.replace(settings, batch_size=min(settings.batch_size, len(images)))
    system = models.build(settings, shape)
    labels = None if labels is None else labels.to(settings.device)
    with tempfile.TemporaryDirectory() as out:
        fit(system, images.to(settings.device), settings, out, labels=labels, progress=False)
    return system


def markdown(rows: Iterable[Row]) -> str:
    """Mean ± standard deviation over the seeds, a line for each share and system."""
    groups: dict[tuple[float, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.share, row.system), []).append(row)
    lines = ["| share | system | value | seeds | temperatures |", "|---|---|---|---|---|"]
    for (share, system), group in groups.items():
        values = [row.value for row in group]
        spread = f" ± {statistics.stdev(values):.3g}" if len(values) > 1 else ""
        temperatures = ", ".join(f"{row.temperature:g}" for row in group) if system.startswith("aa") else ""
        lines.append(
            f"| {share:.0%} | {system} | {statistics.mean(values):.4g}{spread} | {len(group)} | {temperatures} |"
        )
    return "\n".join(lines) + "\n"
