"""Multi-class Jensen–Shannon loss on C blocks of n rows: `pytest bench/multi_js.py`, `ivfast bench multi_js`."""

import torch
import torch.nn.functional as F

import ivfast

from . import peers
from .problem import Problem, Provider


def labels(logits):
    classes, n, _ = logits.shape
    return torch.arange(classes, device=logits.device).repeat_interleave(n)


def eager(logits):
    """−mean log softmax of each row's own class, the class being the block."""
    return -logits.log_softmax(-1).diagonal(dim1=0, dim2=2).mean()


def cross_entropy(logits):
    return F.cross_entropy(logits.flatten(0, 1), labels(logits))


PROBLEM = Problem(
    op="multi_js_loss",
    axes="C×n",
    sizes=((5, 64), (5, 128), (17, 1024), (1000, 64)),
    long_sizes=((5, 1 << 20), (17, 1 << 16)),
    draw=lambda size: (torch.randn(*size, size[0]),),
    output=lambda size: (),
    function=ivfast.multi_js_loss,
    peers=(
        Provider("eager", eager),
        Provider("cross_entropy", cross_entropy),
        Provider("compile", peers.compiled(cross_entropy), compiles=True),
    ),
    dtypes=(torch.float32, torch.bfloat16),
)


def test_multi_js(timed):
    timed()
