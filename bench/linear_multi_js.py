"""Multi-class Jensen–Shannon loss of a linear layer from f features to C classes, n rows of each:
`ivfast bench linear_multi_js`."""

import torch
import torch.nn.functional as F

import ivfast

from . import multi_js
from .harness import peers
from .harness.problem import BACKWARD, Problem, Provider


def draw(size):
    classes, n, features = size
    return torch.randn(classes * n, features), torch.randn(classes, features) / features**0.5, torch.randn(classes)


def eager(features, weight, bias):
    logits = F.linear(features, weight, bias)
    return F.cross_entropy(logits, multi_js.labels(len(weight), len(features) // len(weight), weight.device))


def work(size, what):
    classes, n, features = size
    return (6 if what == BACKWARD else 2) * classes * classes * n * features


PROBLEM = Problem(
    op="linear_multi_js_loss",
    axes="C×n×f",
    sizes=((5, 64, 256), (1024, 8, 512)),
    draw=draw,
    output=lambda size: (),
    function=ivfast.linear_multi_js_loss,
    peers=(
        Provider("eager", eager),
        Provider("unfused", lambda *p: ivfast.multi_js_loss(F.linear(*p))),
        Provider("compile", peers.compiled(eager), compiles=True),
    ),
    work=work,
    passes=(BACKWARD,),
)


def test_linear_multi_js(timed):
    timed()
