"""The median heuristic, S1's: `pytest bench/median.py`, `ivfast bench median`."""

import torch

import ivfast

from .harness import peers
from .harness.problem import FORWARD, Problem, Provider

# torch.median takes the lower of the two middle distances, of which 64 particles leave a gap of some 1e-3
LOWER = 1e-2

PROBLEM = Problem(
    op="median_bandwidth",
    axes="n×d",
    sizes=((64, 16), (128, 64), (256, 64), (1024, 64)),
    long_sizes=((4096, 64), (8192, 64)),
    draw=lambda size: (torch.randn(size),),
    output=lambda size: size[:-2],
    function=lambda x: ivfast.median_bandwidth(x, convention="paper"),
    peers=(
        Provider("pdist-median", peers.median_pdist, squares=(2, 2), tolerance=LOWER),
        Provider("cdist-kthvalue", peers.median_cdist, squares=(4, 4), tolerance=LOWER),
        Provider("pdist-sort", peers.median_sort, squares=(4, 4)),
        Provider("jax", peers.median_jax, packages=("jax",), devices=("cpu",), bind=peers.bind_jax, squares=(4, 4),
                 compiles=True),
    ),
    work=lambda size, what: size[-2] * size[-1] * torch.Size(size[:-1]).numel(),  # each distance once
    passes=(FORWARD,),
    squares=(9, 9),
)  # fmt: skip


def test_median(timed):
    timed()
