"""AS-Distance of two batches of posteriors, product kernel in logs: `pytest bench/as_distance.py`."""

import torch

import ivfast

from .harness import peers
from .harness.problem import BACKWARD, Problem, Provider


def draw(size):
    """Means and log-variances of a trained VAE's posteriors: close enough that no pair's weight is 0."""
    mu_r, mu_g = torch.randn(2, *size).mul(0.5).unbind()
    logvar_r, logvar_g = (torch.rand(2, *size) * 2 - 1).unbind()
    return mu_r, logvar_r, mu_g, logvar_g


def work(size, what):
    """Six operations per pair and dimension, ten more for its gradient; 2n² pairs, since two batches are symmetric."""
    *_, n, d = size
    return (16 if what == BACKWARD else 6) * 2 * n * n * d * torch.Size(size[:-2]).numel()


PROBLEM = Problem(
    op="as_distance",
    axes="n×d",
    sizes=((64, 32), (128, 128)),
    long_sizes=((512, 256), (4096, 64)),
    draw=draw,
    output=lambda size: size[:-2],
    function=lambda *posteriors: ivfast.as_distance(*posteriors, log=True),
    peers=(
        Provider("eager", peers.as_distance, cubes=(4, 12)),
        Provider("compile", peers.compiled(peers.as_distance), squares=(6, 6), cubes=(1, 3), compiles=True),
    ),
    work=work,
    squares=(20, 60),
)  # fmt: skip


def test_as_distance(timed):
    timed()
