"""Per-sample reconstruction losses of an auto-encoder, summed over pixels and channels."""

import torch
from torch import Tensor

from .. import _check
from .._registry import register
from ._derivatives import differentiable
from ._pairwise import arithmetic, sigmoid

KINDS = ("l2", "l1", "bce")
L2, L1, BCE = range(3)  # their numbers in the kernels


def reconstruction_loss(output: Tensor, target: Tensor, *, kind: str = "l2") -> Tensor:
    """One loss per sample, summed over all its elements: `[n, ...]` -> `[n]`.

    Args:
        output: the decoder's output x, `[n, ...]`; logits for "bce".
        target: t, the same shape; in [0, 1] for "bce".
        kind: "l2" Σ (x − t)², "l1" Σ |x − t|, or "bce" Σ [max(x, 0) − x t + log(1 + e^−|x|)], the Bernoulli negative
            log-likelihood of logits in nats.

    Returns:
        loss `[n]`, float32 for half precision. Infinite logits are clamped to the largest finite number, so that a
        certain and correct pixel costs 0 and its gradient is finite. Differentiable in both inputs; the
        derivative of |·| at 0 is 0.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that differ, or an unknown kind.

    Source: S3 section 2 and S4 section 2 ("bce"); S1 Eq. 1, S5 ("l2"); S2 Eq. 1 ("l1").
    """
    output, target = _check.promoted(output, target)
    _check.floating("output", output)
    _check.same("target", target, "output", output)
    _check.choice("kind", kind, KINDS)
    if output.dim() < 1:
        raise ValueError(f"output must have shape [n, ...], got {tuple(output.shape)}")
    return _loss(output, target, KINDS.index(kind))


def _finite(x: Tensor) -> Tensor:
    most = torch.finfo(x.dtype).max
    return x.clamp(-most, most)


def reconstruction_loss_reference(output: Tensor, target: Tensor, kind: int) -> Tensor:
    x, t = arithmetic(output), arithmetic(target)
    if kind == L2:
        loss = (x - t).square()
    elif kind == L1:
        loss = (x - t).abs()
    else:
        x = _finite(x)
        loss = x.clamp_min(0) - x * t + x.abs().neg().exp().log1p()
    return loss.reshape(output.shape[0], -1).sum(1) if output.numel() else loss.new_zeros(output.shape[0])


def _backward_reference(grad, output, target, kind, target_gradient):
    x, t = arithmetic(output), arithmetic(target)
    g = grad.view(-1, *[1] * (output.dim() - 1))
    if kind == BCE:
        dx = g * (sigmoid(x) - t)
        dt = -g * _finite(x) if target_gradient else None
    else:
        apart = x - t
        dx = 2 * g * apart if kind == L2 else g * torch.where(apart.isnan(), apart, apart.sign())
        dt = -dx if target_gradient else None
    return dx.to(output.dtype), output.new_empty(0) if dt is None else dt.to(output.dtype)


_forward = register(
    "reconstruction_loss(Tensor output, Tensor target, int kind) -> Tensor",
    reference=reconstruction_loss_reference,
    triton="reconstruction.forward",
)
_backward = register(
    "reconstruction_loss_backward(Tensor grad, Tensor output, Tensor target, int kind, bool target_gradient)"
    " -> (Tensor doutput, Tensor dtarget)",
    reference=_backward_reference,
    triton="reconstruction.backward",
)


def _gradients(backward, grads, inputs, outputs, needed):
    doutput, dtarget = backward(*grads, *inputs, needed[1])
    return doutput, dtarget if needed[1] else None


_loss = differentiable(_forward, _gradients, backward=_backward, tensors=2, fold=True)
