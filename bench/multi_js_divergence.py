"""The bound on the Jensen–Shannon divergence of C blocks of n rows: `ivfast bench multi_js_divergence`."""

import dataclasses
import math

import ivfast

from . import multi_js
from .harness import peers
from .harness.problem import FLOOR, Provider


def eager(logits):
    return math.log(len(logits)) - multi_js.cross_entropy(logits)


PROBLEM = dataclasses.replace(
    multi_js.PROBLEM,
    op="multi_js_divergence",
    long_sizes=(),
    function=ivfast.multi_js_divergence,
    peers=(FLOOR, Provider("eager", eager), Provider("compile", peers.compiled(eager), compiles=True)),
)


def test_multi_js_divergence(timed):
    timed()
