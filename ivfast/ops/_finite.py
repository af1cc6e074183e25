"""Decompositions of matrices that may not be finite."""

import torch
from torch import Tensor


def finite_matrices(a: Tensor) -> tuple[Tensor, Tensor]:
    """`a` `[..., p, q]` with zeros for matrices that are not finite, and 0, or NaN for those, `[..., 1, 1]`.

    LAPACK raises an error for a whole batch that holds a NaN, or decomposes it silently; cuSOLVER returns garbage.
    """
    nan = (0 * a).sum((-2, -1), keepdim=True)
    return torch.where(nan == 0, a, 0), nan
