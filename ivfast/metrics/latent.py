"""How far codes are from the prior N(0, I)."""

import math

import torch
from torch import Tensor

from .. import _check
from .._extra import needs
from ..ops.gaussian_statistics import GaussianStatistics
from .features import distance_between


def latent_frechet_distance(z: Tensor) -> float:
    """FLD of codes `[n, d]` to the prior N(0, I) (S1, section 4).

    Raises:
        ValueError: a code that is not finite.
    """
    if not bool(z.isfinite().all()):
        raise ValueError("codes must be finite; the encoder has diverged")
    return float(distance_to_prior(GaussianStatistics(z.shape[1]).update(z.double())))


@needs("ivfast.metrics.kl_to_prior")
def kl_to_prior(z: Tensor, neighbours: int = 5) -> float:
    """KL(q(z) ‖ N(0, I)) in nats for codes `[n, d]` drawn from q, from the distances r to the k-th nearest neighbours:

    ½ E‖z‖² + (d/2) log 2π − [ψ(n) − ψ(k) + log(volume of the unit ball) + d E log r]. The bracket estimates q's
    entropy. The result is consistent but not unbiased: in many dimensions it needs many codes. Coinciding codes (k + 1
    equal ones) make it infinite, like the divergence of a distribution with atoms.

    Raises:
        ValueError: a code that is not finite, or no more codes than `neighbours`.

    Source: Kozachenko & Leonenko 1987. S4 Table 1 computes KL(q(z), p) with the ITE toolbox and does not say which of
    its estimators it uses.
    """
    from sklearn.neighbors import NearestNeighbors

    n, d = z.shape
    _check.count("neighbours", neighbours)
    if n <= neighbours:
        raise ValueError(f"codes must hold n > neighbours = {neighbours} samples, got n = {n}")
    if not bool(z.isfinite().all()):
        raise ValueError("codes must be finite; the encoder has diverged")
    z = z.double().cpu()
    distance, _ = NearestNeighbors(n_neighbors=neighbours).fit(z.numpy()).kneighbors()
    log_r = torch.from_numpy(distance[:, -1].copy()).log().mean()
    log_ball = d / 2 * math.log(math.pi) - math.lgamma(d / 2 + 1)
    counts = z.new_tensor([n, neighbours]).digamma()
    entropy = counts[0] - counts[1] + log_ball + d * log_r
    return float(0.5 * z.square().sum(1).mean() + d / 2 * math.log(2 * math.pi) - entropy)


def distance_to_prior(codes: GaussianStatistics) -> Tensor:
    """Fréchet distance of codes to N(0, I), a float64 scalar; errors are those of `distance_between`."""
    prior = GaussianStatistics(len(codes.mean), device=codes.mean.device)
    eye = torch.eye(len(codes.mean), dtype=torch.float64, device=codes.mean.device)
    prior.load_state_dict({"mean": torch.zeros_like(codes.mean), "covariance": eye})
    return distance_between(codes, prior)
