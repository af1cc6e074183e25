"""Bernoulli negative log-likelihood of each of n images of p pixels: `ivfast bench reconstruction_bce`."""

import torch.nn.functional as F

from .reconstruction import problem


def eager(output, target):
    return F.binary_cross_entropy_with_logits(output, target, reduction="none").sum(1)


PROBLEM = problem("reconstruction_loss bce", "bce", eager)


def test_reconstruction_bce(timed):
    timed()
