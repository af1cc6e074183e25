"""Fréchet distances between images in the features of a network: FID, and distances in any other features."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..ops.gaussian_statistics import GaussianStatistics
from .classifier import Classifier
from .systems import BATCH, evaluation_mode, to_float


def distance_between(first: GaussianStatistics, second: GaussianStatistics) -> Tensor:
    """Fréchet distance between two sets of features, a float64 scalar.

    Raises:
        ValueError: a feature that is not finite, or fewer than two samples.
    """
    for statistics in (first, second):
        if not bool(statistics.mean.isfinite().all()):
            raise ValueError("features must be finite, got NaN or infinity")
    return first.frechet_distance(second)


def feature_distance(features: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, device="cpu") -> float:
    """Fréchet distance between the features of two sets of uint8 images, for any extractor `[n, C, H, W] -> [n, d]`.

    `features` gets uint8 batches on `device`, in evaluation mode if it is a network. Source: Heusel et al. 2017.

    Raises:
        TypeError: images that are not uint8.
    """
    return ReferenceDistance(features, real, device)(fake)


class ReferenceDistance:
    """`feature_distance` to one reference set, whose features are computed once.

    Args:
        features, real, device: as for `feature_distance`.
    """

    def __init__(self, features: Callable[[Tensor], Tensor], real: Tensor, device="cpu"):
        self.features, self.device = features, device
        self.reference = feature_statistics(features, real, device)

    def __call__(self, fake: Tensor) -> float:
        return float(distance_between(self.reference, feature_statistics(self.features, fake, self.device)))


@torch.no_grad()
def feature_statistics(features: Callable[[Tensor], Tensor], images: Tensor, device="cpu") -> GaussianStatistics:
    """Mean and covariance of the features of uint8 images, streamed; errors are those of `feature_distance`."""
    bytes_only("images", images)
    statistics = None
    with evaluation_mode(features):
        for batch in images.split(BATCH if images.shape[-1] <= 96 else 50):
            x = features(batch.to(device))
            statistics = statistics or GaussianStatistics(x.shape[1], device=x.device)
            statistics.update(x)
    return statistics


def bytes_only(name: str, images: Tensor) -> None:
    """Other numbers might be meant for [0, 1], [-1, 1] or [0, 255], which give different features without an error."""
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        given = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"{name} must be uint8, 0 to 255, got {given}")


def frechet_inception_distance(
    real: Tensor,
    fake: Tensor,
    *,
    weights: str | Path | None = None,
    download: bool = False,
    features: int = 2048,
    device="cpu",
) -> float:
    """FID between two sets of uint8 images; one-channel images are repeated to three channels.

    Other arguments and errors are those of `ivfast.metrics.inception.inception`. With fewer than 2,048 images per side
    the covariances are rank-deficient: the distance is exact, but biased upwards.
    """
    extract = InceptionFeatures(weights, download=download, features=features).to(device)
    return feature_distance(extract, real, fake, device)


class InceptionFeatures(nn.Module):
    """Inception's features `[n, d]` of uint8 images `[n, C, H, W]` with 1 or 3 channels, always float32 and never in
    training mode.

    Arguments and errors are those of `ivfast.metrics.inception.inception`; images of another dtype raise TypeError, of
    another shape ValueError.
    """

    def __init__(self, weights: str | Path | None = None, *, download: bool = False, features: int = 2048):
        from .inception import inception

        super().__init__()
        self.network = inception(weights, download=download, features=features)
        self.num_features = features

    def train(self, mode: bool = True) -> "InceptionFeatures":
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        bytes_only("images", images)
        if images.dim() != 4:
            raise ValueError(f"images must have shape [n, C, H, W], got {tuple(images.shape)}")
        if images.shape[1] not in (1, 3):
            raise ValueError(f"images must have 1 or 3 channels, got {images.shape[1]}")
        # Inception works at 299 x 299: batches of 50, as in pytorch-fid
        parts = (x.expand(-1, 3, -1, -1).float() / 255 for x in images.split(50))
        with torch.autocast(images.device.type, enabled=False):
            return torch.cat([self.network(x)[0].mean((2, 3)) for x in parts])


def frechet_classifier_distance(classifier: Classifier, real: Tensor, fake: Tensor, device="cpu") -> float:
    """Fréchet distance in the penultimate features of a classifier trained on the data set itself.

    This is not FID and is not comparable with FID or across data sets, because each classifier has its own scale.
    Compare it with the distance between training and test images in the same features.
    """
    return feature_distance(ClassifierFeatures(classifier), real, fake, device)


class ClassifierFeatures(nn.Module):
    """A classifier's penultimate features `[n, FEATURES]` of uint8 images."""

    def __init__(self, classifier: Classifier):
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier.features(to_float(images))
