"""Fréchet distance straight from fewer samples than dimensions, in float64: `ivfast bench frechet_samples`."""

import math

import torch

import ivfast

from .harness import peers
from .harness.problem import FORWARD, Problem, Provider


def by_statistics(function):
    """As the packages do it: means and covariances first. NaN where the package refuses its own root as complex."""

    def call(x, y):
        try:
            return function(*(s for z in (x, y) for s in (z.mean(0), torch.cov(z.mT))))
        except ValueError:
            return torch.tensor(torch.nan)

    return call


ANY = math.inf  # their answers for singular covariances are off, or none; timed for what their users wait

PROBLEM = Problem(
    op="frechet_distance_from_samples",
    axes="n×d",
    sizes=((50, 192),),
    long_sizes=((500, 2048),),
    draw=lambda size: (torch.randn(size), torch.randn(size) + 0.3),
    output=lambda size: (),
    function=ivfast.frechet_distance_from_samples,
    peers=(
        Provider("pytorch-fid", by_statistics(peers.pytorch_fid), packages=("pytorch_fid",), devices=("cpu",),
                 tolerance=ANY),
        Provider("torchmetrics", by_statistics(peers.torchmetrics_fid), packages=("torchmetrics",), tolerance=ANY),
    ),
    passes=(FORWARD,),
    dtypes=(torch.float64,),
    tolerance=1e-10,
)  # fmt: skip


def test_frechet_from_samples(timed):
    timed()
