"""S1's radial bridge with t = 4, its draws given: `pytest bench/bridge.py`, `ivfast bench bridge`."""

import math

import torch

import ivfast

from .harness import peers
from .harness.problem import BACKWARD, FLOOR, Problem, Provider

T = 4


def eager(z, draws):
    angles = [k * math.pi / (2 * T) for k in range(T + 1)]
    return torch.stack([math.cos(a) * z + math.sin(a) * draws for a in angles])


def problem(op, function, other) -> Problem:
    """A bridge of codes [n, d], the draws a constant."""
    return Problem(
        op=op,
        axes="n×d",
        sizes=((64, 16), (128, 128), (4096, 512)),
        draw=lambda size: (torch.randn(size),),
        output=lambda size: (T + 1, *size),
        function=given_draws(function),
        peers=(
            FLOOR,
            Provider("eager", given_draws(other)),
            Provider("compile", given_draws(peers.compiled(other)), compiles=True),
        ),
        passes=(BACKWARD,),
        constants=lambda size: {"draws": torch.randn(size)},
    )


def given_draws(function):
    return lambda z, draws=None: function(z, constant(z) if draws is None else draws)


_drawn: dict = {}


def constant(z):
    """One tensor of draws per size, outside what is timed."""
    key = (z.shape, z.dtype, z.device)
    if key not in _drawn:
        _drawn[key] = torch.randn_like(z)
    return _drawn[key]


PROBLEM = problem("radial_bridge", lambda z, draws: ivfast.radial_bridge(z, T, draws=draws), eager)


def test_bridge(timed):
    timed()
