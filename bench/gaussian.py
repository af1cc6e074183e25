"""A VAE's samples and their KL to the prior, the draws given: `pytest bench/gaussian.py`, `ivfast bench gaussian`."""

import torch

import ivfast

from .bridge import constant
from .harness import peers
from .harness.problem import BACKWARD, FLOOR, Problem, Provider


def eager(mu, logvar, draws):
    z = mu + (0.5 * logvar).exp() * draws
    return z, 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(-1)


def three(function):
    return lambda mu, logvar, draws=None: function(mu, logvar, constant(mu) if draws is None else draws)


PROBLEM = Problem(
    op="reparameterize",
    axes="n×d",
    sizes=((64, 16), (128, 128), (4096, 512)),
    draw=lambda size: (torch.randn(size), torch.rand(size) * 4 - 3),
    output=lambda size: (size, size[:-1]),
    function=three(lambda mu, logvar, draws: ivfast.reparameterize(mu, logvar, draws=draws)),
    peers=(FLOOR, Provider("eager", three(eager)), Provider("compile", three(peers.compiled(eager)), compiles=True)),
    passes=(BACKWARD,),
    constants=lambda size: {"draws": torch.randn(size)},
)


def test_gaussian(timed):
    timed()
