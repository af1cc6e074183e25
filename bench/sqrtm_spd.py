"""Square roots of covariances [d, d] of n samples, computed in float64: `ivfast bench sqrtm_spd`."""

import torch

import ivfast

from .harness.problem import Problem, Provider


def draw(size):
    x = torch.randn(size)
    return (x.mT @ x / len(x),)


def eager(a):
    """By eigenvectors; its gradient divides by differences of eigenvalues."""
    values, V = torch.linalg.eigh((a.double() + a.double().mT) / 2)
    return ((V * values.sqrt().unsqueeze(-2)) @ V.mT).to(a.dtype)


PROBLEM = Problem(
    op="sqrtm_spd",
    axes="n×d",
    sizes=((64, 16), (256, 64), (512, 128)),
    draw=draw,
    output=lambda size: (size[-1], size[-1]),
    function=ivfast.sqrtm_spd,
    peers=(Provider("eager", eager),),
)


def test_sqrtm_spd(timed):
    timed()
