"""Mean and covariance of a batch, streamed: `pytest bench/gaussian_statistics.py`, `ivfast bench gaussian_statistics`.

What is timed is the update: covariances are formed from it when a result is checked, as torchmetrics' are.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ivfast import GaussianStatistics

from .harness.problem import FORWARD, Problem, Provider


@dataclass
class Later:
    """An array that is computed when NumPy asks for it."""

    compute: Callable[[], Tensor]

    def __array__(self, dtype=None, copy=None):
        return self.compute().cpu().numpy()


def update(x):
    stats = GaussianStatistics(x.shape[1], device=x.device).update(x)
    return Later(lambda: stats.mean), Later(lambda: stats.covariance)


def bind_torchmetrics(function, tensors, cotangent):
    """Its update on features that are there already: their sum and xᵀx in float64."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Identity(torch.nn.Identity):
        num_features = tensors[0].shape[1]

    (x,) = tensors
    metric = FrechetInceptionDistance(feature=Identity()).to(x.device)
    state = metric.real_features_sum, metric.real_features_cov_sum, metric.real_features_num_samples

    def call():
        for part in state:
            part.zero_()
        metric.update(x, real=True)
        total, products, n = state
        covariance = Later(lambda: (products - torch.outer(total, total) / n) / (n - 1))
        return Later(lambda: total / n), covariance

    return call


def bind_numpy(function, tensors, cotangent):
    (x,) = (t.numpy() for t in tensors)
    return lambda: (np.mean(x, axis=0, dtype=np.float64), np.cov(x, rowvar=False))


def exact(tensors, cotangent):
    (x,) = tensors
    return [(slice(None), x.mean(0)), (slice(None), torch.cov(x.mT))]


class Streaming(Problem):
    """One implementation serves each device; there is no other to force."""

    def providers(self, device, implementations=None):
        return [Provider("ivfast", self.function, "ivfast"), *self.peers]

    def served(self, device):
        return "PyTorch" if device == "cpu" else "triton or PyTorch"


PROBLEM = Streaming(
    op="GaussianStatistics",
    axes="n×d",
    sizes=((60_000, 64), (10_000, 2048)),
    gpu_sizes=((1_000_000, 64), (50_000, 2048)),
    draw=lambda size: (torch.randn(size) + 1,),
    output=lambda size: ((size[-1],), (size[-1], size[-1])),
    function=update,
    peers=(
        Provider("torchmetrics", None, packages=("torchmetrics", "torch_fidelity"), bind=bind_torchmetrics),
        Provider("numpy-cov", None, devices=("cpu",), bind=bind_numpy),
        Provider("matmul xᵀx", lambda x: x.mT @ x, "floor"),  # in float32, and nothing else
    ),
    work=lambda size, what: size[-2] * size[-1] * (size[-1] + 1),  # half of the products, which are symmetric
    passes=(FORWARD,),
    exact=exact,
)  # fmt: skip


def test_gaussian_statistics(timed):
    timed()
