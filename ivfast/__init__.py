"""ivfast: fast kernels for the intervention / adversarial auto-encoder family, and the models that use them."""

import importlib
from types import ModuleType

import torch  # noqa: F401  loads libtorch, which the extensions link against

from . import distributed, nn, optim, patch
from ._registry import load_extensions, use
from .ops.as_distance import as_distance, log_gaussian_kernel_sums
from .ops.bridge import block_substitute, blockwise_bridge, radial_bridge
from .ops.exp_elbo import exp_elbo_loss
from .ops.fld import fld
from .ops.frechet import frechet_distance, frechet_distance_from_samples
from .ops.gaussian import gaussian_kl, reparameterize
from .ops.gaussian_statistics import GaussianStatistics
from .ops.importance import importance_weighted_loss
from .ops.linear_multi_js import linear_multi_js_loss
from .ops.median import median_bandwidth
from .ops.mmd import mmd
from .ops.multi_js import multi_js_block_losses, multi_js_divergence, multi_js_loss
from .ops.polar import polar
from .ops.reconstruction import reconstruction_loss
from .ops.sqrtm_spd import sqrtm_spd
from .ops.svgd import svgd_direction
from .ops.svgd_bridge import svgd_bridge
from .sampling import svgd

load_extensions()

__version__ = "0.1.0"
__all__ = [
    "GaussianStatistics",
    "as_distance",
    "block_substitute",
    "blockwise_bridge",
    "distributed",
    "exp_elbo_loss",
    "fld",
    "frechet_distance",
    "frechet_distance_from_samples",
    "gaussian_kl",
    "importance_weighted_loss",
    "linear_multi_js_loss",
    "log_gaussian_kernel_sums",
    "median_bandwidth",
    "mmd",
    "multi_js_block_losses",
    "multi_js_divergence",
    "multi_js_loss",
    "nn",
    "optim",
    "patch",
    "polar",
    "radial_bridge",
    "reconstruction_loss",
    "reparameterize",
    "sqrtm_spd",
    "svgd",
    "svgd_bridge",
    "svgd_direction",
    "use",
]

_LATER = ("data", "metrics", "models", "train")  # imported when first asked for: they cost the ops nothing


def __getattr__(name: str) -> ModuleType:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
