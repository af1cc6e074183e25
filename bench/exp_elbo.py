"""The exponential ELBO of a soft introspective VAE, per batch of n samples: `ivfast bench exp_elbo`."""

import torch

import ivfast

from .harness import peers
from .harness.problem import BACKWARD, FLOOR, Problem, Provider

SCALE = 1 / 64  # of images of 8 × 8 pixels


def eager(reconstruction, kl):
    return (-2 * SCALE * (reconstruction + kl)).exp().mean(-1) / 2


PROBLEM = Problem(
    op="exp_elbo_loss",
    axes="batches×n",
    sizes=((1, 64), (1, 4096)),
    draw=lambda size: (100 * torch.rand(size), 20 * torch.rand(size)),
    output=lambda size: size[:-1],
    function=lambda reconstruction, kl: ivfast.exp_elbo_loss(reconstruction, kl, scale=SCALE),
    peers=(FLOOR, Provider("eager", eager), Provider("compile", peers.compiled(eager), compiles=True)),
    passes=(BACKWARD,),
)


def test_exp_elbo(timed):
    timed()
