"""Fréchet distance between means and covariances, as FID takes it, in float64: `ivfast bench frechet`.

Of n samples in d dimensions; with n > d the covariances have full rank.
"""

import torch

import ivfast

from .harness import peers
from .harness.problem import FORWARD, Problem, Provider


def draw(size):
    n, d = size
    samples = (torch.randn(n, d) @ (torch.eye(d) + 0.5 * torch.randn(d, d) / d**0.5) + shift for shift in (0.0, 0.3))
    return tuple(x for z in samples for x in (z.mean(0), torch.cov(z.mT)))


PROBLEM = Problem(
    op="frechet_distance",
    axes="n×d",
    sizes=((400, 64), (2000, 512)),
    long_sizes=((8000, 2048),),
    draw=draw,
    output=lambda size: (),
    function=ivfast.frechet_distance,
    peers=(
        Provider("pytorch-fid", peers.pytorch_fid, packages=("pytorch_fid",), devices=("cpu",)),
        Provider("torchmetrics", peers.torchmetrics_fid, packages=("torchmetrics",)),
        Provider("torch-fidelity", peers.torch_fidelity_fid, packages=("torch_fidelity",), devices=("cpu",)),
    ),
    passes=(FORWARD,),
    dtypes=(torch.float64,),
    tolerance=1e-8,
)


def test_frechet(timed):
    timed()
