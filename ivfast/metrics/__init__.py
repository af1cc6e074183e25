"""Metrics of a trained system: FLD, reconstruction, FID, and distances in a classifier's features.

Images are uint8 `[n, C, H, W]`; systems take and return floats in [-1, 1]. A system is what `ivfast.models.build`
returns; systems without an encoder have no `encode`.

`FrechetInceptionDistance` and `FrechetLatentDistance` are these distances as torchmetrics metrics; accessing them
raises ImportError if torchmetrics is not installed.
"""

from .._extra import needs
from .classes import Modes, accuracy, classifier_score, conditional_accuracy, modes, point_modes, probabilities
from .features import (
    ClassifierFeatures,
    InceptionFeatures,
    ReferenceDistance,
    distance_between,
    feature_distance,
    feature_statistics,
    frechet_classifier_distance,
    frechet_inception_distance,
)
from .histogram import HistogramDivergence, histogram_divergence
from .images import Reconstruction, reconstruction, structural_similarity
from .latent import distance_to_prior, kl_to_prior, latent_frechet_distance
from .likelihood import importance_log_likelihood, lower_bound, quadrature_log_likelihood
from .systems import BATCH, codes, decoded, generate, posterior_codes, to_bytes, to_float

__all__ = [
    "BATCH",
    "ClassifierFeatures",
    "HistogramDivergence",
    "InceptionFeatures",
    "Modes",
    "Reconstruction",
    "ReferenceDistance",
    "accuracy",
    "classifier_score",
    "codes",
    "conditional_accuracy",
    "decoded",
    "distance_between",
    "distance_to_prior",
    "feature_distance",
    "feature_statistics",
    "frechet_classifier_distance",
    "frechet_inception_distance",
    "generate",
    "histogram_divergence",
    "importance_log_likelihood",
    "kl_to_prior",
    "latent_frechet_distance",
    "lower_bound",
    "modes",
    "point_modes",
    "posterior_codes",
    "probabilities",
    "quadrature_log_likelihood",
    "reconstruction",
    "structural_similarity",
    "to_bytes",
    "to_float",
]


def __getattr__(name: str):
    if name not in ("FrechetInceptionDistance", "FrechetLatentDistance"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with needs(f"{__name__}.{name}"):
        from . import torchmetrics
    return getattr(torchmetrics, name)
