"""Metrics of samples by a classifier: accuracy, score, modes covered."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.points import Mixture
from .classifier import Classifier
from .systems import BATCH, evaluating, evaluation_mode, to_float


@torch.no_grad()
def probabilities(classifier: Callable[[Tensor], Tensor], images: Tensor, device="cpu") -> Tensor:
    """Class probabilities `[n, classes]`, float64, by a network in evaluation mode."""
    with evaluation_mode(classifier):
        logits = torch.cat([classifier(to_float(x.to(device))).cpu() for x in images.split(BATCH)])
    return logits.double().softmax(1)


def accuracy(system, images: Tensor, labels: Tensor) -> float:
    """Share of uint8 images that the system's own classifier labels correctly (S3 Table 2, right)."""
    with evaluating(system) as device:
        best = torch.cat([system.classify(to_float(x.to(device))).argmax(1).cpu() for x in images.split(BATCH)])
    return float((best == labels).double().mean())


def conditional_accuracy(classifier: Classifier, images: Tensor, device="cpu") -> float:
    """Share of class-conditional images from `generate` that a classifier assigns to the intended class.

    Source: S3 Table 2, middle, and section G.1.
    """
    p = probabilities(classifier, images, device)
    return float((p.argmax(1) == torch.arange(len(p), device=p.device) % p.shape[1]).double().mean())


def classifier_score(classifier: Callable[[Tensor], Tensor], images: Tensor, device="cpu") -> float:
    """exp E KL(p(y|x) ‖ p(y)): the formula of the Inception score, between 1 and the number of classes.

    Args:
        classifier: any network from images in [-1, 1] to logits `[n, classes]`. With Inception this is the Inception
            score, with `ivfast.metrics.classifier.classifier_of(dataset)` the score of the data set's own classifier.

    Source: Salimans et al. 2016; S3 (On Unifying) scores MNIST this way.
    """
    p = probabilities(classifier, images, device)
    log_p = p.clamp_min(1e-300).log()
    return float((p * (log_p - p.mean(0).clamp_min(1e-300).log())).sum(1).mean().exp())


class Modes(NamedTuple):
    covered: int  # modes with a confident sample
    kl: float  # from the histogram of confident samples to the uniform one, nats
    confident: float  # share of samples that belong to a mode with confidence


def modes(classifier: Classifier, images: Tensor, *, confidence: float = 0.9, device="cpu") -> Modes:
    """Mode coverage of stacked images `[n, 3, H, W]`, by a ten-class classifier applied to each channel.

    Even pixel noise "covers" 1,000 modes, so samples count only if all three digits have `confidence`.

    Source: S2 (IVGAN), stacked MNIST; Metz et al. 2017.
    """
    n = len(images)
    p = probabilities(classifier, images.flatten(0, 1)[:, None], device).view(n, 3, -1)
    best, digit = p.max(2)
    sure = (best >= confidence).all(1)
    return _coverage(digit @ digit.new_tensor([100, 10, 1]), sure, 1000)


def point_modes(points: Tensor, mixture: Mixture, *, within: float = 3.0) -> Modes:
    """Mode coverage of points `[n, d]`: a point counts for its nearest centre if it lies `within` this many standard
    deviations (for centres without spread, within half the distance between the nearest two).

    Source: Srivastava et al. 2017 and Lin et al. 2018, who call such points "high quality"; both use 3.
    """
    distance, mode = torch.cdist(points.double(), mixture.centers.double()).min(1)
    reach = within * mixture.deviation or float(torch.pdist(mixture.centers).min()) / 2
    return _coverage(mode, distance <= reach, len(mixture.centers))


def _coverage(mode: Tensor, sure: Tensor, modes: int) -> Modes:
    histogram = torch.bincount(mode[sure], minlength=modes).double()
    q = histogram / histogram.sum().clamp_min(1)
    kl = float((q * (q * modes).clamp_min(1e-300).log()).sum()) if bool(sure.any()) else float("inf")
    return Modes(int((histogram > 0).sum()), kl, float(sure.double().mean()))
