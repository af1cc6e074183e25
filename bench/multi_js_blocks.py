"""Cross-entropy of each of C blocks of n rows, for logs: `ivfast bench multi_js_blocks`."""

import dataclasses

import ivfast

from . import multi_js
from .harness import peers
from .harness.problem import FORWARD, Provider


def eager(logits):
    return -logits.log_softmax(-1).diagonal(dim1=0, dim2=2).mean(0)


PROBLEM = dataclasses.replace(
    multi_js.PROBLEM,
    op="multi_js_block_losses",
    long_sizes=(),
    output=lambda size: size[:1],
    function=ivfast.multi_js_block_losses,
    peers=(Provider("eager", eager), Provider("compile", peers.compiled(eager), compiles=True)),
    passes=(FORWARD,),
)


def test_multi_js_blocks(timed):
    timed()
