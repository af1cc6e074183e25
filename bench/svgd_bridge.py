"""S1's SVGD bridge with t = 4, its noise drawn inside: `pytest bench/svgd_bridge.py`, `ivfast bench svgd_bridge`."""

import functools

import torch

import ivfast

from . import svgd
from .harness import peers
from .harness.problem import Problem, Provider

T = 4
STEPS = 2 * (T - 1)

# the loop's bandwidth comes from the lower of the two middle distances, which 8 particles leave far apart
LOWER = 2e-3

eager = functools.partial(peers.svgd_bridge, t=T)
_compiled = peers.compiled(eager)


def compiled(z, draws=None):
    """Noise in one draw, outside the graph: inside, each torch.randn would leave it."""
    return _compiled(z, draws=torch.randn(STEPS + 1, *z.shape, device=z.device) if draws is None else draws)


def work(size, what):
    """Six times the median's distances and the direction, whose score −x saves one product of the five behind it."""
    return STEPS * (svgd.work(size, what) + size[-2] * size[-1] * torch.Size(size[:-1]).numel())


PROBLEM = Problem(
    op="svgd_bridge",
    axes="n×d",
    sizes=((64, 16), (128, 128)),
    draw=lambda size: (torch.randn(size),),
    output=lambda size: (T + 1, *size),
    function=lambda z, draws=None: ivfast.svgd_bridge(z, T, draws=draws),
    peers=(
        Provider("eager", eager, tolerance=LOWER),
        Provider("compile", compiled, tolerance=LOWER, compiles=True),
    ),
    work=work,
    constants=lambda size: {"draws": torch.randn(STEPS + 1, *size)},
)


def test_svgd_bridge(timed):
    timed()
