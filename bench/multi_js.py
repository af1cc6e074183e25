"""Multi-class Jensen–Shannon loss on C blocks of n rows: `pytest bench/multi_js.py`, `ivfast bench multi_js`."""

import functools

import torch
import torch.nn.functional as F

import ivfast

from .harness import peers
from .harness.problem import FLOOR, Problem, Provider


@functools.cache
def labels(classes, n, device):
    return torch.arange(classes, device=device).repeat_interleave(n)


def eager(logits):
    """As S1 writes it: −log softmax of each block at its own class, a block after the other."""
    return -sum(block.log_softmax(-1)[:, c].mean() for c, block in enumerate(logits)) / logits.shape[-1]


def diagonal(logits):
    """One log softmax, and of each block its own class."""
    return -logits.log_softmax(-1).diagonal(dim1=0, dim2=2).mean()


def cross_entropy(logits):
    """Labels are built outside."""
    return F.cross_entropy(logits.flatten(0, 1), labels(*logits.shape[:2], logits.device))


PROBLEM = Problem(
    op="multi_js_loss",
    axes="C×n",
    sizes=((5, 64), (5, 128), (17, 1024), (1000, 4)),
    long_sizes=((4096, 1), (5, 1 << 20)),
    draw=lambda size: (torch.randn(*size, size[0]),),
    output=lambda size: (),
    function=ivfast.multi_js_loss,
    peers=(
        FLOOR,
        Provider("eager", eager),
        Provider("diagonal", diagonal),
        Provider("cross_entropy", cross_entropy),
        Provider("compile", peers.compiled(cross_entropy), compiles=True),
    ),
    dtypes=(torch.float32, torch.bfloat16),
    passes=("forward+backward",),
)


def test_multi_js(timed):
    timed()
