"""ivfast: fast kernels for the intervention / adversarial auto-encoder family, and its models."""

import torch  # noqa: F401  loads libtorch, which the extensions link against

from ._registry import load_extensions, use
from .ops.median import median_bandwidth
from .ops.multi_js import multi_js_divergence, multi_js_loss
from .ops.svgd import svgd_direction

load_extensions()

__version__ = "0.1.0"
__all__ = ["median_bandwidth", "multi_js_divergence", "multi_js_loss", "svgd_direction", "use"]
