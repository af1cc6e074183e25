"""S2's block substitution with k = 4, its draws and indices given: `ivfast bench bridge_substitute`."""

import functools

import torch

import ivfast

from .bridge import given_draws
from .harness import peers
from .harness.problem import BACKWARD, FLOOR, Problem, Provider

K = 4


@functools.cache
def index(n, device):
    return torch.arange(n, device=device) % K


def eager(z, draws):
    blocks, drawn = z.unflatten(-1, (K, -1)), draws.unflatten(-1, (K, -1))
    replaced = index(len(z), z.device)[:, None] == torch.arange(K, device=z.device)  # [n, k]
    return torch.where(replaced[..., None], drawn, blocks).flatten(-2)


def ours(z, draws):
    return ivfast.block_substitute(z, K, index(len(z), z.device), draws=draws)


PROBLEM = Problem(
    op="block_substitute",
    axes="n×d",
    sizes=((64, 16), (128, 128), (4096, 512)),
    draw=lambda size: (torch.randn(size),),
    output=lambda size: size,
    function=given_draws(ours),
    peers=(
        FLOOR,
        Provider("eager", given_draws(eager)),
        Provider("compile", given_draws(peers.compiled(eager)), compiles=True),
    ),
    passes=(BACKWARD,),
    constants=lambda size: {"draws": torch.randn(size)},
)


def test_bridge_substitute(timed):
    timed()
