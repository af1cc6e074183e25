"""Fréchet distances as torchmetrics metrics, which `ivfast.metrics` exports if torchmetrics is installed.

A state holds everything that a side has seen, in float64: [[n, μᵀ], [μ, S]], `[d+1, d+1]`, with the upper triangle of
S = Σ (x − μ)(x − μ)ᵀ. States of batches and ranks are reduced by the exact merge of `GaussianStatistics`, in
O(ranks · d²) memory.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torchmetrics import Metric

from .. import _check
from ..ops.gaussian_statistics import GaussianStatistics
from .features import InceptionFeatures, distance_between
from .latent import distance_to_prior


class GaussianMetric(Metric):
    """A metric of means and covariances."""

    higher_is_better = False
    is_differentiable = False
    full_state_update = False
    plot_lower_bound = 0.0

    def add_side(self, name: str, d: int) -> None:
        self.add_state(name, torch.zeros(d + 1, d + 1, dtype=torch.float64), dist_reduce_fx=_merged)

    def take_in(self, name: str, x: Tensor) -> None:
        state = getattr(self, name)
        _write(state, _view(state).update(x))

    def set_dtype(self, dst_type: str | torch.dtype) -> "GaussianMetric":
        """Do nothing: the statistics are float64, and the network keeps its dtype."""
        return self


class FrechetInceptionDistance(GaussianMetric):
    """Fréchet distance between the features of real and fake images: FID, or the same distance in any other features.

    The interface is that of torchmetrics' class of the same name. The value is float64, and exact even with fewer
    images than features. `forward` returns the distance of all images so far, NaN until both sides have two: a batch
    belongs to one side and has no distance by itself.

    Args:
        feature: width of a layer of pytorch-fid's Inception, 64, 192, 768 or 2048, for uint8 images `[n, C, H, W]` with
            1 or 3 channels; or a callable that turns the inputs of `update` into features `[n, d]`. `nn.Identity()`,
            for example, takes the features themselves.
        num_features: d; None means the attribute `feature.num_features`.
        reset_real_features: False keeps the real side through `reset`.
        normalize: inputs for Inception are floats in [0, 1]; other feature modules get images unchanged.
        weights, download: for Inception, as in `ivfast.metrics.inception.inception`.
        keywords: passed to torchmetrics.

    Raises:
        ValueError: d is unknown; on `update`, features that are not `[n, d]`; on `compute`, features that are not
            finite.
        RuntimeError: on `compute`, a side with fewer than two images.

    Source: Heusel et al. 2017.
    """

    def __init__(
        self,
        feature: int | Callable[[Tensor], Tensor] = 2048,
        *,
        num_features: int | None = None,
        reset_real_features: bool = True,
        normalize: bool = False,
        weights: str | Path | None = None,
        download: bool = False,
        **keywords,
    ):
        super().__init__(**keywords)
        self.to_bytes = normalize and isinstance(feature, int)
        self.reset_real_features = reset_real_features
        if isinstance(feature, int):
            feature = InceptionFeatures(weights, download=download, features=feature)
        self.feature = feature
        d = getattr(feature, "num_features", None) if num_features is None else num_features
        if d is None:
            raise ValueError("num_features must be given, because feature has no attribute num_features")
        _check.count("num_features", d)
        self.add_side("real", d)
        self.add_side("fake", d)

    def update(self, images: Tensor, real: bool) -> None:
        """Add a batch of real or fake images."""
        x = self.feature((images * 255).byte() if self.to_bytes else images)
        self.take_in("real" if real else "fake", x.unsqueeze(0) if x.dim() == 1 else x)

    def compute(self) -> Tensor:
        for name, state in (("real", self.real), ("fake", self.fake)):
            if state[0, 0] < 2:
                raise RuntimeError(f"{name} must hold at least 2 images, got {int(state[0, 0])}")
        return distance_between(_view(self.real), _view(self.fake))

    def forward(self, images: Tensor, real: bool) -> Tensor:
        self.update(images, real=real)
        with self.sync_context(self.dist_sync_fn, should_sync=self.dist_sync_on_step):
            few = min(self.real[0, 0], self.fake[0, 0]) < 2
            # the class's compute is the plain one; the instance's synchronises and caches
            self._forward_cache = self.real.new_tensor(math.nan) if few else type(self).compute(self)
        return self._forward_cache

    def reset(self) -> None:
        real = self.real
        super().reset()
        if not self.reset_real_features:
            self.real = real


class FrechetLatentDistance(GaussianMetric):
    """Fréchet distance of codes to the prior N(0, I): ‖μ‖² + Tr(Σ + I) − 2 Tr √Σ, in float64.

    Args:
        num_features: d, the size of a code.
        keywords: passed to torchmetrics.

    Raises:
        ValueError: on `update`, codes that are not `[n, d]`; on `compute`, codes that are not finite.
        RuntimeError: on `compute` and `forward`, fewer than two codes.

    Source: S1 (IVAAE) section 4.
    """

    def __init__(self, num_features: int, **keywords):
        super().__init__(**keywords)
        _check.count("num_features", num_features)
        self.add_side("codes", num_features)

    def update(self, codes: Tensor) -> None:
        """Add a batch of codes `[n, d]`."""
        self.take_in("codes", codes)

    def compute(self) -> Tensor:
        if self.codes[0, 0] < 2:
            raise RuntimeError(f"codes must hold at least 2 samples, got {int(self.codes[0, 0])}")
        return distance_to_prior(_view(self.codes))


def _view(state: Tensor) -> GaussianStatistics:
    """The statistics of a state. The scatter shares the state's memory: copying d² costs more than an update."""
    statistics = GaussianStatistics(len(state) - 1, device=state.device)
    statistics.count, statistics.mean, statistics._upper = int(state[0, 0]), state[0, 1:].clone(), state[1:, 1:]
    return statistics


def _write(state: Tensor, statistics: GaussianStatistics) -> None:
    """Write back what `_view` does not share with the state."""
    with torch.no_grad():
        state[0, 0] = statistics.count
        state[0, 1:] = state[1:, 0] = statistics.mean


def _merged(states: Tensor) -> Tensor:
    """States `[parts, d+1, d+1]` -> the merged state, `[d+1, d+1]`."""
    merged = states[0].clone()
    statistics = _view(merged)
    for state in states[1:]:
        statistics.merge(_view(state))
    _write(merged, statistics)
    return merged
