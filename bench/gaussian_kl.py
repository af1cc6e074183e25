"""KL of a VAE's posteriors to the prior: `ivfast bench gaussian_kl`."""

import torch

import ivfast

from .harness import peers
from .harness.problem import BACKWARD, FLOOR, Problem, Provider


def eager(mu, logvar):
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(-1)


PROBLEM = Problem(
    op="gaussian_kl",
    axes="n×d",
    sizes=((64, 16), (128, 128), (4096, 512)),
    draw=lambda size: (torch.randn(size), torch.rand(size) * 4 - 3),
    output=lambda size: size[:-1],
    function=ivfast.gaussian_kl,
    peers=(FLOOR, Provider("eager", eager), Provider("compile", peers.compiled(eager), compiles=True)),
    passes=(BACKWARD,),
)


def test_gaussian_kl(timed):
    timed()
