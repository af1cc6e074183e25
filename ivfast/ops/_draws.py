"""Ops take their randomness as a tensor."""

import torch
from torch import Tensor

from .. import _check


def prior_draws(z: Tensor, draws: Tensor | None, generator, leading: tuple[int, ...] = ()) -> Tensor:
    """Standard normal draws `[*leading, *z.shape]`: the caller's, taken as a constant, or fresh ones."""
    shape = (*leading, *z.shape)
    if draws is None:
        if generator is None:  # Dynamo traces sizes that vary only without the argument
            return torch.randn(shape, dtype=z.dtype, device=z.device)
        return torch.randn(shape, generator=generator, dtype=z.dtype, device=z.device)
    _check.alike("draws", draws, "z", z)
    if draws.shape != shape:
        raise ValueError(f"draws must have shape {shape}, got {tuple(draws.shape)}")
    return draws.detach() if draws.requires_grad else draws
