"""Squared error of each of n images of p pixels: `ivfast bench reconstruction`."""

import torch

import ivfast

from .harness import peers
from .harness.problem import BACKWARD, FLOOR, Problem, Provider


def problem(op, kind, eager) -> Problem:
    return Problem(
        op=op,
        axes="n×p",
        sizes=((64, 64), (64, 784), (64, 12288)),
        draw=lambda size: (torch.randn(size), torch.rand(size)),
        output=lambda size: size[:-1],
        function=lambda output, target: ivfast.reconstruction_loss(output, target, kind=kind),
        peers=(FLOOR, Provider("eager", eager), Provider("compile", peers.compiled(eager), compiles=True)),
        passes=(BACKWARD,),
    )


PROBLEM = problem("reconstruction_loss", "l2", lambda output, target: (output - target).square().sum(1))


def test_reconstruction(timed):
    timed()
