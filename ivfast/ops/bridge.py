"""Bridges from codes to the prior N(0, I), and the block substitution O_i of S2. A bridge is a sequence of maps
T_0 (the identity), …, T_t (draws from the prior) whose outputs a classifier tells apart (S1). Every map leaves N(0, I)
unchanged."""

import math

import torch
from torch import Tensor

from .. import _check
from .._registry import register
from .._torch import innermost
from ._derivatives import differentiable
from ._draws import prior_draws
from ._pairwise import arithmetic, few_in_cuda


def blockwise_bridge(z: Tensor, t: int, *, draws: Tensor | None = None, generator=None) -> Tensor:
    """T_k z for k = 0..t: the first k of t equal blocks of z replaced with standard normal draws.

    Args:
        z: codes `[..., n, d]`.
        t: number of steps; must divide d.
        draws: standard normal `[..., n, d]`, shared by all k and taken as a constant; None draws them.
        generator: random generator for `draws`.

    Returns:
        `[t+1, ..., n, d]`, contiguous, in z's dtype. Differentiable in z.

    Raises:
        TypeError, ValueError: a wrong dtype or shape, t < 1, or t does not divide d.

    Source: S1 (IVAAE) section 2, "blockwise substitution".
    """
    z, draws = _check.promoted(z, draws)
    t = check_codes(z, t)
    if z.shape[-1] % t:
        raise ValueError(f"t must divide the dimension d = {z.shape[-1]} of z, got t = {t}")
    draws = prior_draws(z, draws, generator)
    return _differentiable_blockwise(z, draws, t)


def radial_bridge(z: Tensor, t: int, *, draws: Tensor | None = None, generator=None) -> Tensor:
    """T_k z = cos(kπ/2t) z + sin(kπ/2t) ε for k = 0..t.

    Arguments, result and derivative order are those of `blockwise_bridge`, with any t >= 1.

    Source: S1 (IVAAE) section 2, "radial substitution".
    """
    z, draws = _check.promoted(z, draws)
    t = check_codes(z, t)
    draws = prior_draws(z, draws, generator)
    return _differentiable_radial(z, draws, t)


def block_substitute(z: Tensor, k: int, index: Tensor, *, draws: Tensor | None = None, generator=None) -> Tensor:
    """O_i z: block i of k equal blocks of each row replaced with standard normal draws.

    Args:
        z: codes `[..., n, d]`.
        k: number of blocks; must divide d.
        index: the block to replace in each row, integers in [0, k), `[..., n]`. The range is checked on the CPU only,
            because a check would synchronise other devices; there a row with an index out of range stays unchanged.
        draws: standard normal `[..., n, d]`, taken as a constant; None draws them.
        generator: random generator for `draws`.

    Returns:
        `[..., n, d]` in z's dtype. Differentiable in z.

    Raises:
        TypeError, ValueError: a wrong dtype or shape, k does not divide d, or an index outside [0, k).

    Source: S2 (IVGAN) section 3, "block substitution".
    """
    z, draws = _check.promoted(z, draws)
    _check.samples("z", z)
    k = _check.count("k", k)
    if z.shape[-1] % k:
        raise ValueError(f"k must divide the dimension d = {z.shape[-1]} of z, got k = {k}")
    if index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"index must be int64 or int32, got {index.dtype}")
    if index.shape != z.shape[:-1] or index.device != z.device:
        raise ValueError(
            f"index must have shape {tuple(z.shape[:-1])} on {z.device}, got {tuple(index.shape)} on {index.device}"
        )
    if index.device.type == "cpu" and not torch.compiler.is_compiling():
        check_range(index, k)
    draws = prior_draws(z, draws, generator)
    return _differentiable_substitute(z, draws, index, k)


def check_range(index: Tensor, k: int) -> None:
    index = innermost(index)
    low, high = (int(value) for value in index.aminmax()) if index.numel() else (0, 0)
    if low < 0 or high >= k:
        raise ValueError(f"index must lie in [0, k) with k = {k}, got values from {low} to {high}")


def check_codes(z: Tensor, t: int) -> int:
    _check.samples("z", z)
    return _check.count("t", t)


def blockwise_bridge_reference(z: Tensor, draws: Tensor, t: int) -> Tensor:
    return torch.where(_replaced(z, t), draws, z)


def _blockwise_backward_reference(grad, t):
    return grad.masked_fill(_replaced(grad[0], t), 0).sum(0)


def _replaced(z: Tensor, t: int) -> Tensor:
    """Whether T_k replaces dimension j, `[t+1, 1, …, 1, d]`."""
    d = z.shape[-1]
    block = torch.arange(d, device=z.device) // (d // t)
    mask = torch.arange(t + 1, device=z.device).unsqueeze(1) > block
    return mask.view(t + 1, *[1] * (z.dim() - 1), d)


def radial_bridge_reference(z: Tensor, draws: Tensor, t: int) -> Tensor:
    return torch.stack([(c * arithmetic(z) + s * arithmetic(draws)).to(z.dtype) for c, s in _angles(t)])


def _radial_backward_reference(grad, t):
    return sum(c * arithmetic(g) for g, (c, _) in zip(grad, _angles(t), strict=True)).to(grad.dtype)


def _angles(t: int) -> list[tuple[float, float]]:
    """cos and sin of kπ/2t, exact at both ends."""
    inner = [(math.cos(k * math.pi / (2 * t)), math.sin(k * math.pi / (2 * t))) for k in range(1, t)]
    return [(1.0, 0.0), *inner, (0.0, 1.0)]


def block_substitute_reference(z: Tensor, draws: Tensor, index: Tensor, k: int) -> Tensor:
    return torch.where(_chosen(z, index, k), draws, z)


def _block_substitute_backward_reference(grad, index, k):
    return grad.masked_fill(_chosen(grad, index, k), 0)


def _chosen(z: Tensor, index: Tensor, k: int) -> Tensor:
    d = z.shape[-1]
    return torch.arange(d, device=z.device) // (d // k) == index.unsqueeze(-1)


_blockwise = register(
    "blockwise_bridge(Tensor z, Tensor draws, int t) -> Tensor",
    reference=blockwise_bridge_reference,
    triton="bridge.blockwise",
    cuda=True,
    prefer=lambda z, *_: few_in_cuda(z),
)
_blockwise_backward = register(
    "blockwise_bridge_backward(Tensor grad, int t) -> Tensor",
    reference=_blockwise_backward_reference,
    triton="bridge.blockwise_backward",
    cuda=True,
    prefer=lambda grad, *_: few_in_cuda(grad),
)
_radial = register(
    "radial_bridge(Tensor z, Tensor draws, int t) -> Tensor",
    reference=radial_bridge_reference,
    triton="bridge.radial",
    cuda=True,
    prefer=lambda z, *_: few_in_cuda(z),
)
_radial_backward = register(
    "radial_bridge_backward(Tensor grad, int t) -> Tensor",
    reference=_radial_backward_reference,
    triton="bridge.radial_backward",
    cuda=True,
    prefer=lambda grad, *_: few_in_cuda(grad),
)
_block_substitute = register(
    "block_substitute(Tensor z, Tensor draws, Tensor index, int k) -> Tensor",
    reference=block_substitute_reference,
    triton="bridge.substitute",
    cuda=True,
    prefer=lambda z, *_: few_in_cuda(z),
)
_block_substitute_backward = register(
    "block_substitute_backward(Tensor grad, Tensor index, int k) -> Tensor",
    reference=_block_substitute_backward_reference,
    triton="bridge.substitute_backward",
    cuda=True,
    prefer=lambda grad, *_: few_in_cuda(grad),
)


def _linear(backward, grads, inputs, outputs, needed):
    """The gradient in z alone, which depends on neither z nor the draws."""
    return backward(*grads, *inputs), None, None


_differentiable_blockwise, _differentiable_radial = (
    differentiable(
        forward,
        lambda *arguments: _linear(*arguments)[:2],
        backward=backward,
        tensors=2,
        kept=slice(0),
        out_axes=(1,),
    )
    for forward, backward in ((_blockwise, _blockwise_backward), (_radial, _radial_backward))
)
_differentiable_substitute = differentiable(
    _block_substitute, _linear, backward=_block_substitute_backward, tensors=3, kept=slice(2, 3)
)
