"""Fréchet latent distance of codes to the prior and its gradient: `ivfast bench fld`."""

import torch

import ivfast

from .harness import peers
from .harness.problem import Problem, Provider


def eager(z):
    """By the eigenvalues of the covariance, a set at a time."""
    if z.dim() > 2:
        return torch.stack([eager(part) for part in z])
    mu, covariance = z.mean(0), torch.cov(z.mT)
    roots = torch.linalg.eigvalsh(covariance).clamp_min(0).sqrt()
    return mu.square().sum() + covariance.trace() + z.shape[1] - 2 * roots.sum()


PROBLEM = Problem(
    op="fld",
    axes="n×d",
    sizes=((1000, 16), (1000, 64), (1000, 128), (256, 100, 32)),
    long_sizes=((10_000, 128), (60_000, 64)),
    draw=lambda size: (1.5 * torch.randn(size) + 0.5,),
    output=lambda size: size[:-2],
    function=ivfast.fld,
    peers=(Provider("eager", eager), Provider("compile", peers.compiled(eager), compiles=True)),
)


def test_fld(timed):
    timed()
