"""The three log-sums of kernels behind the AS-Distance, product kernel: `ivfast bench as_distance_sums`."""

import dataclasses
import math

import torch

import ivfast

from . import as_distance
from .harness import peers
from .harness.problem import Provider


def eager(mu_r, logvar_r, mu_g, logvar_g):
    """As one writes it: n×n×d arrays."""

    def log_sum(a, logvar_a, b, logvar_b):
        s = logvar_a.exp()[:, None] + logvar_b.exp()
        log_k = -0.5 * ((2 * math.pi * s).log() + (a[:, None] - b).square() / s).sum(-1)
        return log_k.flatten().logsumexp(0)

    r, g = (mu_r, logvar_r), (mu_g, logvar_g)
    return torch.stack([log_sum(*r, *r), log_sum(*g, *g), log_sum(*r, *g)])


PROBLEM = dataclasses.replace(
    as_distance.PROBLEM,
    op="log_gaussian_kernel_sums",
    long_sizes=((512, 256),),
    output=lambda size: (*size[:-2], 3),
    function=ivfast.log_gaussian_kernel_sums,
    peers=(
        Provider("eager", eager, cubes=(4, 12)),
        Provider("compile", peers.compiled(eager), squares=(6, 6), cubes=(1, 3), compiles=True),
    ),
)


def test_as_distance_sums(timed):
    timed()
