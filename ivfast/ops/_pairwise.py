"""Shared helpers of the pairwise ops."""

import math

import torch
from torch import Tensor

from .._torch import constant


def arithmetic(x: Tensor) -> Tensor:
    """`x` in the dtype its op computes in: float32 for half precision, otherwise unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def sigmoid(x: Tensor) -> Tensor:
    """σ(x) with an exact derivative: PyTorch's, y (1 − y) of the rounded y, loses its digits where y is near 1."""
    exact = torch.where(x < 0, torch.sigmoid(x), 1 - torch.sigmoid(-x))
    return torch.sigmoid(x).detach() + (exact - exact.detach())


def positive_or_nan(h: Tensor) -> Tensor:
    """h, or NaN where it is not positive and finite: with a median that float32 does not hold, 0 or infinity, all
    kernel values would be 0 or 1."""
    return h * torch.where((h > 0) & h.isfinite(), 1.0, math.nan)


def column_medians(x: Tensor) -> Tensor:
    """The median of each column `[..., 1, d]`, which a few far rows do not move. NaN for a column that holds NaN or an
    infinity. No gradient."""
    x = x.detach()
    place = torch.full((1,), x.shape[-2] // 2, dtype=torch.int64, device=x.device)  # in a graph for every n, no number
    return x.sort(-2).values.index_select(-2, place) + (0 * x).sum(-2, keepdim=True)


def direct_distances(x: Tensor, y: Tensor) -> Tensor:
    """‖x_i − y_j‖² `[..., n, m]` from differences: exactly 0 for equal rows, and right however far others are. No
    gradient."""
    return torch.cdist(x.detach(), y.detach(), compute_mode="donot_use_mm_for_euclid_dist").square_()


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """`direct_distances` with derivatives, those of ‖x_i‖² + ‖y_j‖² − 2 x_i·y_j. They are differences of rows, and lose
    eps ‖x‖, not eps ‖x‖²."""
    d2 = direct_distances(x, y)
    if constant(x) and constant(y):
        return d2
    products = x.square().sum(-1).unsqueeze(-1) + y.square().sum(-1).unsqueeze(-2) - 2 * (x @ y.mT)
    return d2 + (products - products.detach())


def pooled(x: Tensor, y: Tensor) -> Tensor:
    """The samples of x and y in one, without gradient."""
    # autocast to bfloat16, in which `torch.cat` refuses float16; `without_autocast` cannot be traced
    with torch.autocast(x.device.type, enabled=False):
        return torch.cat((x.detach(), y.detach()), -2)


def small_in_cuda(x: Tensor, y: Tensor) -> tuple[str, ...]:
    """CUDA C++ for small samples in up to 128 dimensions, otherwise Triton. Both compute in float32."""
    if x.dtype == torch.float64:
        return ()
    small = max(x.shape[-2], y.shape[-2]) <= 256 and x.shape[-1] <= 128
    return ("cuda", "triton") if small else ("triton",)


def few_in_cuda(x: Tensor) -> tuple[str, ...]:
    """For ops that read their input once: CUDA C++ up to a million elements, Triton above that and in float64. The
    threshold comes from operation counts, not from timings."""
    if x.dtype == torch.float64:
        return ("triton",)
    return ("cuda", "triton") if x.numel() <= 1 << 20 else ("triton", "cuda")
