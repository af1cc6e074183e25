"""The generator's loss of the importance-weighted GAN, per batch of n logits: `ivfast bench importance`."""

import torch
import torch.nn.functional as F

import ivfast

from .harness import peers
from .harness.problem import BACKWARD, FLOOR, Problem, Provider


def eager(logits):
    return -(logits.detach().softmax(-1) * F.logsigmoid(logits)).sum(-1)


PROBLEM = Problem(
    op="importance_weighted_loss",
    axes="batches×n",
    sizes=((1, 64), (1, 4096)),
    draw=lambda size: (torch.randn(size),),
    output=lambda size: size[:-1],
    function=ivfast.importance_weighted_loss,
    peers=(FLOOR, Provider("eager", eager), Provider("compile", peers.compiled(eager), compiles=True)),
    passes=(BACKWARD,),
)


def test_importance(timed):
    timed()
