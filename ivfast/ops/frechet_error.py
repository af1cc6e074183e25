"""A Fréchet distance with a bound on its error, from matrix products alone: what a GPU computes, on any device."""

from typing import NamedTuple

import torch
from torch import Tensor

from .frechet import checked, squared_norm, total_variance
from .frechet_products import covariance_trace_by_products
from .polar_products import EPS


class BoundedDistance(NamedTuple):
    distance: Tensor
    error: Tensor


@torch.no_grad()
def bounded_frechet_distance(mu1: Tensor, sigma1: Tensor, mu2: Tensor, sigma2: Tensor) -> BoundedDistance:
    """`frechet_distance` and a bound on its absolute error, both `[...]` in float64 and without gradient.

    The bound takes the arguments as exact. It consists of the distance between an upper and a lower bound on
    Tr √(Σ₁Σ₂), of what eigenvalues that count as 0 may contribute, and of rounding, to first order. A distance is NaN
    where the bound without rounding exceeds about 2e-5 √(Tr Σ₁ Tr Σ₂); it says by how much. No operator is called that
    waits for the device.

    Arguments and errors are those of `frechet_distance`.
    """
    mu1, sigma1, mu2, sigma2 = (x.double() for x in checked(mu1, sigma1, mu2, sigma2))
    found = covariance_trace_by_products(sigma1, sigma2)
    others = squared_norm(mu1 - mu2) + total_variance(sigma1, sigma2)
    rounding = EPS * (mu1.shape[-1] ** 0.5 + 4) * (others + squared_norm(mu1) + squared_norm(mu2))
    return BoundedDistance(others - 2 * found.trace, 2 * found.error + rounding)
