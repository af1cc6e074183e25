"""Multi-class Jensen–Shannon loss: cross-entropy of a C-way classifier whose class is the block a row stands in.

CE = −Σ_c π_c (1/n) Σ_j log softmax(D(z_jc))_c. At the optimal classifier CE = H(π) − JS_π(p_1, …, p_C).
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _check
from .._registry import register
from ._pairwise import arithmetic


def multi_js_loss(logits: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Cross-entropy of block-ordered logits: block c holds the n rows drawn from distribution c. No label tensor.

    Args:
        logits: `[C·n, C]`, or `[..., C, n, C]` with leading batch dimensions.
        weights: π `[C]`, the weight of each block, taken as given (they should sum to 1); None is 1/C each.

    Returns:
        the loss `[...]` in nats, float32 for half precision. Differentiable once, in the logits.

    Raises:
        TypeError, ValueError: a wrong dtype, a number of rows that C does not divide, weights of another length.

    Source: S1 (IVAAE) Eq. 1 and Theorem 2; S2 (IVGAN) Eq. 3.
    """
    return _MultiJs.apply(_blocks(logits), _weights(weights, logits))[0]


def multi_js_divergence(logits: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Lower bound H(π) − CE on the generalised Jensen–Shannon divergence in nats, tight at the optimal classifier.

    Arguments, errors and derivative order are `multi_js_loss`'s. Without weights H(π) = log C.

    Source: S1 (IVAAE) Theorem 2; Lin 1991 for the weighted form.
    """
    classes = logits.shape[-1]
    loss = multi_js_loss(logits, weights=weights)
    if weights is None:
        entropy = torch.tensor(float(classes), dtype=loss.dtype, device=loss.device).log()
    else:
        entropy = torch.special.entr(weights).sum().to(loss.dtype)
    return entropy - loss


def _blocks(logits: Tensor) -> Tensor:
    """logits as `[..., C, n, C]`."""
    _check.floating("logits", logits)
    if logits.dim() < 2 or logits.shape[-1] < 2:
        raise ValueError(f"logits must be [C·n, C] or [..., C, n, C] with C >= 2, got {tuple(logits.shape)}")
    classes = logits.shape[-1]
    if logits.dim() == 2:
        if logits.shape[0] == 0 or logits.shape[0] % classes:
            raise ValueError(
                f"logits must hold C·n rows, n for each of the C = {classes} classes, got {tuple(logits.shape)}"
            )
        return logits.unflatten(0, (classes, -1))
    if logits.shape[-3] != classes or logits.shape[-2] == 0:
        raise ValueError(
            f"logits must be [..., C, n, C]: {classes} classes need {classes} blocks, got {tuple(logits.shape)}"
        )
    return logits


def _weights(weights: Tensor | None, logits: Tensor) -> Tensor | None:
    if weights is None:
        return None
    _check.floating("weights", weights)
    if weights.shape != logits.shape[-1:]:
        raise ValueError(f"weights must have shape ({logits.shape[-1]},), got {tuple(weights.shape)}")
    if weights.device != logits.device:
        raise ValueError(f"weights must match logits: device {logits.device}, got {weights.device}")
    return weights.detach().to(torch.promote_types(logits.dtype, torch.float32))


def multi_js_loss_reference(logits: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """The loss `[...]` and the log-sum-exp of each row `[..., C, n]`, which backward needs again."""
    x = arithmetic(logits)
    lse = x.logsumexp(-1)
    per_block = (lse - x.diagonal(dim1=-3, dim2=-1).mT).mean(-1)  # [..., C]
    loss = per_block.mean(-1) if weights is None else (per_block * weights).sum(-1)
    return loss, lse


def _backward_reference(grad, logits, weights, lse):
    # ∂CE/∂logits = (softmax − onehot) π_c/n, scaled before it is rounded
    x = arithmetic(logits)
    classes, n = x.shape[-1], x.shape[-2]
    scale = grad[..., None] * (1 / classes if weights is None else weights) / n  # [..., C]
    onehot = torch.eye(classes, dtype=x.dtype, device=x.device).unsqueeze(1)  # [C, 1, C]
    return ((torch.exp(x - lse.unsqueeze(-1)) - onehot) * scale.expand(x.shape[:-2])[..., None, None]).to(logits.dtype)


class _MultiJs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, weights):
        loss, lse = _forward(logits, weights)
        ctx.save_for_backward(logits, weights, lse)
        ctx.mark_non_differentiable(lse)
        return loss, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        return _backward(grad, *ctx.saved_tensors), None


_forward = register(
    "multi_js_loss(Tensor logits, Tensor? weights) -> (Tensor loss, Tensor lse)",
    reference=multi_js_loss_reference,
    triton="multi_js.forward",
)
_backward = register(
    "multi_js_loss_backward(Tensor grad, Tensor logits, Tensor? weights, Tensor lse) -> Tensor",
    reference=_backward_reference,
    triton="multi_js.backward",
)
