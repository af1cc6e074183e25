"""Multi-class Jensen–Shannon loss: cross-entropy of a C-way classifier in which a row's class is its block.

CE = −Σ_c π_c (1/n) Σ_j log softmax(D(z_jc))_c. At the optimal classifier CE = H(π) − JS_π(p_1, …, p_C).
"""

import math

import torch
from torch import Tensor

from .. import _check
from .._registry import register
from .._torch import transformed, wrapped
from ._derivatives import differentiable
from ._pairwise import arithmetic, few_in_cuda


def multi_js_loss(logits: Tensor, *, weights: Tensor | None = None, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of block-ordered logits: block c holds the n rows drawn from distribution c. No label tensor.

    Args:
        logits: `[C·n, C]`, or `[..., C, n, C]` with leading batch dimensions.
        weights: π `[C]`, the weight of each block, used unnormalised (they should sum to 1); None means 1/C each.
        label_smoothing: s in [0, 1]; each row's target is (1 − s) onehot + s/C. s = 1 gives the cross-entropy
            against the uniform label, which an encoder minimises to make the distributions indistinguishable.

    Returns:
        the loss `[...]` in nats, float32 for half precision. Differentiable in the logits.

    Raises:
        TypeError, ValueError: a wrong dtype, a number of rows that C does not divide, weights of the wrong length, or
            a label_smoothing outside [0, 1].

    Source: S1 (IVAAE) Eq. 1 and Theorem 2; S2 (IVGAN) Eq. 3.
    """
    _check_blocks(logits)
    label_smoothing = check_smoothing(label_smoothing)
    weights = None if weights is None else check_weights(weights, logits.shape[-1], logits)
    if transformed():
        logits = _blocks(logits)  # with dimensions for a batch to lead
        if weights is not None and wrapped(weights):
            return multi_js_loss_reference(logits, weights, label_smoothing)[0]  # the op has one π for a whole batch
    return _loss(logits, weights, label_smoothing)


def multi_js_block_losses(logits: Tensor) -> Tensor:
    """Cross-entropy of each block separately, `[..., C]`: how well each distribution is told from the others.

    Meant for logging: no gradient flows. The mean over the blocks is `multi_js_loss(logits)`; arguments and errors
    are the same.
    """
    _check_blocks(logits)
    logits = logits.detach()
    x, _ = shifted(arithmetic(_blocks(logits)))
    log_sum = x.logsumexp(-1) if transformed() else _forward(x, None, 0.0)[1]
    return (log_sum - _own(x)).mean(-1)


def multi_js_divergence(logits: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Lower bound H(π) − CE on the generalised Jensen–Shannon divergence in nats, tight at the optimal classifier.

    Arguments, errors and derivative order are those of `multi_js_loss`. Without weights H(π) = log C.

    Source: S1 (IVAAE) Theorem 2; Lin 1991 for the weighted form.
    """
    loss = multi_js_loss(logits, weights=weights)
    if weights is None:
        return math.log(logits.shape[-1]) - loss
    return torch.special.entr(check_weights(weights, logits.shape[-1], logits)).sum() - loss


def _check_blocks(logits: Tensor) -> None:
    _check.floating("logits", logits)
    shape = logits.shape
    if len(shape) < 2 or shape[-1] < 2:
        raise ValueError(f"logits must be [C·n, C] or [..., C, n, C] with C >= 2, got {tuple(shape)}")
    classes = shape[-1]
    if len(shape) == 2:
        if shape[0] == 0 or shape[0] % classes:
            raise ValueError(f"logits must hold C·n rows, n for each of the C = {classes} classes, got {tuple(shape)}")
    elif shape[-3] != classes or shape[-2] == 0:
        raise ValueError(f"logits must be [..., C, n, C]: {classes} classes need {classes} blocks, got {tuple(shape)}")


def check_smoothing(label_smoothing: float) -> float:
    smoothing = _check.number("label_smoothing", label_smoothing)
    if not 0 <= smoothing <= 1:
        raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing}")
    return smoothing


def check_weights(weights: Tensor, classes: int, like: Tensor) -> Tensor:
    """π as a constant in the dtype of the arithmetic."""
    _check.floating("weights", weights)
    if weights.shape != (classes,):
        raise ValueError(f"weights must have shape ({classes},), got {tuple(weights.shape)}")
    if weights.device != like.device:
        raise ValueError(f"weights must be on {like.device}, as the other arguments are, got {weights.device}")
    return weights.detach().to(torch.promote_types(like.dtype, torch.float32))


def _blocks(logits: Tensor) -> Tensor:
    """logits as `[..., C, n, C]`."""
    return logits if logits.dim() > 2 else logits.reshape(logits.shape[-1], -1, logits.shape[-1])


def _own(x: Tensor) -> Tensor:
    """Each row's logit of its own class, `[..., C, n]`."""
    return x.diagonal(dim1=-3, dim2=-1).mT


def shifted(x: Tensor) -> tuple[Tensor, Tensor]:
    """x less each row's maximum, if that is finite: large logits keep what a sum would round off."""
    shift = x.amax(-1, keepdim=True)
    shift = torch.where(shift.isinf(), 0, shift)
    return x - shift, shift


def multi_js_loss_reference(logits: Tensor, weights: Tensor | None, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """The loss `[...]` and the log-sum-exp of each row, `logits.shape[:-1]`, which backward reuses."""
    x, shift = shifted(arithmetic(_blocks(logits)))
    lse = x.logsumexp(-1)
    target = _own(x)
    if label_smoothing:
        target = (1 - label_smoothing) * target if label_smoothing < 1 else torch.zeros_like(target)
        target = target + label_smoothing * x.mean(-1)
    per_block = (lse - target).mean(-1)  # [..., C]
    loss = per_block.mean(-1) if weights is None else (per_block * weights).sum(-1)
    return loss, (lse + shift.squeeze(-1)).view(logits.shape[:-1])


def backward_reference(grad, logits, weights, lse, label_smoothing):
    # ∂CE/∂logits = (softmax − target) π_c/n, scaled before rounding
    x = arithmetic(_blocks(logits))
    classes, n = x.shape[-1], x.shape[-2]
    scale = grad[..., None] * (1 / classes if weights is None else weights) / n  # [..., C]
    onehot = torch.eye(classes, dtype=x.dtype, device=x.device).unsqueeze(1)  # [C, 1, C]
    target = onehot * (1 - label_smoothing) + label_smoothing / classes
    return ((x.softmax(-1) - target) * scale.expand(x.shape[:-2])[..., None, None]).to(logits.dtype).view(logits.shape)


_forward = register(
    "multi_js_loss(Tensor logits, Tensor? weights, float label_smoothing) -> (Tensor loss, Tensor lse)",
    reference=multi_js_loss_reference,
    triton="multi_js.forward",
    cuda=True,
    prefer=lambda logits, *_: few_in_cuda(logits),
)
_backward = register(
    "multi_js_loss_backward(Tensor grad, Tensor logits, Tensor? weights, Tensor lse, float label_smoothing) -> Tensor",
    reference=backward_reference,
    triton="multi_js.backward",
    cuda=True,
    prefer=lambda grad, logits, *_: few_in_cuda(logits),
)


def _gradients(backward, grads, inputs, outputs, needed):
    logits, weights, label_smoothing = inputs
    return backward(*grads, logits, weights, *outputs, label_smoothing), None


_loss = differentiable(
    _forward, _gradients, backward=_backward, tensors=2, outputs=2, saved=slice(1, 2), axes=(0, None)
)
