"""Likelihoods of images under a system with a decoder, in nats."""

import math

import torch
from torch import Tensor

from .. import _check
from .systems import BATCH, evaluating, to_float


def lower_bound(system, images: Tensor, labels: Tensor | None = None, seed: int = 0) -> float:
    """Mean of the variational lower bound over uint8 images, in nats, with one code per image.

    Args:
        labels: int64 `[n]`, for systems that need all labels; their bound is on log p(x|y).

    Source: S3 Table 3.
    """
    images, bounds = images.split(BATCH), []
    labels = [None] * len(images) if labels is None else labels.split(BATCH)
    with evaluating(system, seed) as device:
        for x, y in zip(images, labels, strict=True):
            bounds.append(system.bound(to_float(x.to(device)), None if y is None else y.to(device)).double().cpu())
    return float(torch.cat(bounds).mean())


def importance_log_likelihood(
    system, images: Tensor, labels: Tensor | None = None, *, draws: int = 100, seed: int = 0
) -> float:
    """Mean of log (1/K) Σ_k p(x|z_k) p(z_k) / r(z_k|x) over images, in nats, z_k from the Gaussian r of `proposal`.

    On average a lower bound on log p(x), tight as K grows. With K = 1 and r = q(z|x) it is the variational bound.

    Args:
        system: has Bernoulli pixels and a Gaussian to draw codes from: a VAE's posterior, or its moments for AVB.
        labels: int64 `[n]`, for systems that need all labels; the result is then log p(x|y).
        draws: K.

    Source: Burda et al. 2015, Eq. 8.
    """
    _check.count("draws", draws)
    images, values = images.split(BATCH), []
    labels = [None] * len(images) if labels is None else labels.split(BATCH)
    with evaluating(system, seed) as device:
        for x, y in zip(images, labels, strict=True):
            x = to_float(x.to(device))
            given = () if y is None else (system.one_hot(y.to(device)),)
            mu, logvar = (moment.double() for moment in system.proposal(x, *given))
            total = mu.new_full((len(x),), -math.inf)
            for _ in range(draws):
                noise = torch.randn_like(mu)
                z = mu + (0.5 * logvar).exp() * noise
                log_ratio = 0.5 * (noise.square() + logvar - z.square()).sum(1)  # log p(z) − log r(z|x)
                total = torch.logaddexp(total, log_ratio - system.surprise(x, z.float(), *given))
            values.append((total - math.log(draws)).cpu())
    return float(torch.cat(values).mean())


def quadrature_log_likelihood(system, x: Tensor, *, span: float = 6.0, cells: int = 300) -> Tensor:
    """log ∫ p(x|z) p(z) dz for images or points `[n]`, float64, on a grid of codes in one or two dimensions.

    Args:
        span, cells: the grid covers ±span, with `cells` steps per dimension.

    Raises:
        ValueError: codes with more than two dimensions.
    """
    d = system.latent_dim
    if d > 2:
        raise ValueError(f"quadrature needs codes of one or two dimensions, got {d}")
    with evaluating(system) as device:
        axis = torch.linspace(-span, span, cells + 1, dtype=torch.float64, device=device)
        z = torch.cartesian_prod(*[axis] * d).view(-1, d)
        log_prior = -0.5 * z.square().sum(1) + d * math.log(2 * span / cells) - d / 2 * math.log(2 * math.pi)
        values = []
        for row in to_float(x.to(device)):
            parts = z.float().split(16 * BATCH)
            surprise = torch.cat([system.surprise(row.expand(len(part), *row.shape), part).double() for part in parts])
            values.append(torch.logsumexp(log_prior - surprise, 0))
    return torch.stack(values).cpu()
