"""Shared helpers of the pairwise ops."""

import torch
from torch import Tensor


def arithmetic(x: Tensor) -> Tensor:
    """`x` in the dtype its op computes in: float32 for half precision, otherwise unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def squared_distances(x: Tensor) -> Tensor:
    """‖x_i − x_j‖² `[..., n, n]` of centred x `[..., n, d]`: never negative, exactly 0 on the diagonal."""
    gram = x @ x.mT
    norms = gram.diagonal(dim1=-2, dim2=-1)  # from the same rounded products
    d2 = (norms.unsqueeze(-1) + norms.unsqueeze(-2) - 2 * gram).clamp_min(0)
    return d2.masked_fill(torch.eye(x.shape[-2], dtype=torch.bool, device=x.device), 0)


def pooled(x: Tensor, y: Tensor) -> Tensor:
    """The samples of x and y in one, without gradient."""
    with torch.autocast(x.device.type, enabled=False):  # to bfloat16, in which `torch.cat` refuses float16
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
