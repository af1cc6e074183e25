"""WAE's MMD² between codes and draws from the prior, seven IMQ scales: `pytest bench/mmd.py`, `ivfast bench mmd`."""

import functools

import torch

import ivfast

from .harness import peers
from .harness.problem import BACKWARD, Problem, Provider


@functools.cache
def prior(size, dtype, device):
    """Draws that carry no gradient, as many as there are codes."""
    return torch.randn(size, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def against_the_prior(function):
    return lambda x: function(x, prior(x.shape, x.dtype, x.device))


def work(size, what):
    """Half of the distances of the pooled sample; the gradient multiplies by the slopes of x with x and with y."""
    *_, n, d = size
    return (8 if what == BACKWARD else 4) * n * n * d * torch.Size(size[:-2]).numel()


PROBLEM = Problem(
    op="mmd",
    axes="n×d",
    sizes=((100, 64), (256, 64), (1024, 64)),
    long_sizes=((4096, 64), (32768, 64)),
    draw=lambda size: (1.5 * torch.randn(size) + 0.5,),  # so far from the prior that the difference keeps four digits
    output=lambda size: size[:-2],
    function=against_the_prior(ivfast.mmd),
    peers=(
        Provider("eager", against_the_prior(peers.mmd), squares=(5, 60)),
        Provider("compile", against_the_prior(peers.compiled(peers.mmd)), squares=(4, 9), compiles=True),
        Provider("keops", against_the_prior(peers.mmd_keops), packages=("pykeops",), compiles=True),
    ),
    work=work,
    squares=(12, 12),
)  # fmt: skip


def test_mmd(timed):
    timed()
