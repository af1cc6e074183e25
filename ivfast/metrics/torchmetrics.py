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
from .systems import evaluation_mode


class GaussianMetric(Metric):
    """A metric of means and covariances.

    Whatever is done to the module that holds it, its state stays float64 and its feature network keeps its dtype and
    its mode: `to`, `half` and DeepSpeed's casts only move it, and `train` changes nothing.
    """

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

    def train(self, mode: bool = True) -> "GaussianMetric":
        """Leave the feature network's mode alone; `update` computes features in evaluation mode."""
        self.training = mode
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], *args, **keywords) -> "GaussianMetric":
        def moved(x: Tensor) -> Tensor:
            result = fn(x)
            return result if result.dtype == x.dtype else x.to(result.device)

        return super()._apply(moved, *args, **keywords)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args) -> None:
        for name in self._defaults:
            state = state_dict.get(prefix + name)
            if state is not None and state.dtype != torch.float64:
                raise ValueError(f"{prefix + name} must be float64, got {state.dtype}: its samples have been rounded")
        super()._load_from_state_dict(state_dict, prefix, *args)


class FrechetInceptionDistance(GaussianMetric):
    """Fréchet distance between the features of real and fake images: FID, or the same distance in any other features.

    The interface is that of torchmetrics' class of the same name. The value is float64, and exact even with fewer
    images than features. `forward` returns the distance of all images so far, NaN until both sides have two: a batch
    belongs to one side and has no distance by itself.

    Args:
        feature: width of a layer of pytorch-fid's Inception, 64, 192, 768 or 2048, for uint8 images `[n, C, H, W]` with
            1 or 3 channels; or a callable that turns the inputs of `update` into features `[n, d]`, in evaluation mode
            if it is a network. `nn.Identity()`, for example, takes the features themselves.
        num_features: d; None means the attribute `feature.num_features`.
        reset_real_features: False keeps the real side through `reset`.
        normalize: inputs for Inception are floats in [0, 1], rounded down to whole 255ths; other feature modules get
            images unchanged.
        weights, download: for Inception, as in `ivfast.metrics.inception.inception`.
        keywords: passed to torchmetrics.

    Raises:
        TypeError: `feature` is neither; on `update`, images of another dtype for Inception.
        ValueError: d is unknown; on `update`, images of another range or shape for Inception, or features that are not
            `[n, d]`; on `compute`, features that are not finite.
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
        for name, value in (("normalize", normalize), ("reset_real_features", reset_real_features)):
            if not isinstance(value, bool):
                raise TypeError(f"{name} must be True or False, got {value!r}")
        if isinstance(feature, bool) or not (isinstance(feature, int) or callable(feature)):
            raise TypeError(f"feature must be the width of a layer of Inception or a callable, got {feature!r}")
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
        with evaluation_mode(self.feature):
            x = self.feature(_bytes(images) if self.to_bytes else images)
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


def _bytes(images: Tensor) -> Tensor:
    """Floats in [0, 1] to uint8, rounded down as in torchmetrics, which must leave 0 to 255."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        given = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images must be floating with normalize=True, got {given}")
    scaled = images.to(torch.promote_types(images.dtype, torch.float32)) * 255
    if images.numel():
        least, most = scaled.aminmax()
        if not (least >= 0 and most < 256):  # also for NaN
            raise ValueError(f"images must be in [0, 1] with normalize=True, got {least / 255:g} to {most / 255:g}")
    return scaled.byte()


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
