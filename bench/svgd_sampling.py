"""Ten steps of the sampler `ivfast.svgd` towards N(0, I), at a fixed bandwidth: `ivfast bench svgd_sampling`."""

import torch

import ivfast

from .harness import peers
from .harness.problem import FORWARD, Problem, Provider

STEPS, STEP_SIZE = 10, 0.1


def ours(x):
    return ivfast.svgd(x, STEPS, step_size=STEP_SIZE, bandwidth=float(x.shape[-1])).particles


def loop(direction):
    def run(x):
        for _ in range(STEPS):
            x = x + STEP_SIZE * direction(x, -x, float(x.shape[-1]))
        return x

    return run


PROBLEM = Problem(
    op="svgd",
    axes="n×d",
    sizes=((64, 16), (128, 128)),
    long_sizes=((4096, 64),),
    draw=lambda size: (2 * torch.randn(size) + 1,),
    output=lambda size: size,
    function=ours,
    peers=(
        Provider("eager", loop(peers.svgd_matmul), squares=(3, 3)),
        Provider("eager-cdist", loop(peers.svgd_cdist), squares=(3, 3)),
        Provider("compile", loop(peers.compiled(peers.svgd_matmul)), squares=(2, 2), compiles=True),
    ),
    work=lambda size, what: STEPS * 4 * size[-2] ** 2 * size[-1],
    passes=(FORWARD,),
    squares=(5, 5),
)


def test_svgd_sampling(timed):
    timed()
