"""The generator loss of the importance-weighted GAN (S3)."""

import torch.nn.functional as F
from torch import Tensor

from .. import _check
from .._registry import register
from ._derivatives import differentiable
from ._pairwise import arithmetic, sigmoid


def importance_weighted_loss(logits: Tensor) -> Tensor:
    """−Σ_i w_i log σ(l_i) with w = softmax(l) held constant: fakes weighted by D/(1 − D), normalised over the batch.

    Equal logits give the non-saturating loss −mean log σ(l) and its gradient.

    Args:
        logits: the discriminator's logits for generated samples, `[..., n]`.

    Returns:
        loss in nats `[...]`, float32 for half precision. Differentiable; no gradient flows through the weights.

    Raises:
        TypeError, ValueError: a dtype that is not floating, or n < 1.

    Source: S3 (On Unifying Deep Generative Models) Eq. 22.
    """
    _check.floating("logits", logits)
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits must have shape [..., n] with n >= 1, got {tuple(logits.shape)}")
    return _loss(logits)


def importance_weighted_loss_reference(logits: Tensor) -> Tensor:
    l = arithmetic(logits)
    return -(l.softmax(-1) * F.logsigmoid(l)).sum(-1)


def _backward_reference(grad, logits):
    # ∂l_i = −w_i σ(−l_i)
    l = arithmetic(logits)
    return (-grad.unsqueeze(-1) * l.softmax(-1).detach() * sigmoid(-l)).to(logits.dtype)


_forward = register(
    "importance_weighted_loss(Tensor logits) -> Tensor",
    reference=importance_weighted_loss_reference,
    triton="importance.forward",
)
_backward = register(
    "importance_weighted_loss_backward(Tensor grad, Tensor logits) -> Tensor",
    reference=_backward_reference,
    triton="importance.backward",
)
_loss = differentiable(
    _forward,
    lambda backward, grads, inputs, outputs, needed: (backward(*grads, *inputs),),
    backward=_backward,
    tensors=1,
)
