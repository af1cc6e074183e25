"""The multi-class Jensen–Shannon loss of a linear layer, without ever storing all of its logits.

Rows are processed in chunks: a product gives the chunk's logits, one kernel turns them into their loss and, in place,
their gradient, both in float32 for half precision, and two products carry that to the features and the weight. Only the
gradients stay in memory.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check
from .._registry import register
from .._torch import autocasting, transformed, uncompiled
from . import multi_js
from ._derivatives import differentiable
from ._pairwise import arithmetic, few_in_cuda
from .multi_js import check_smoothing, check_weights

# Logits per chunk: on the CPU 2 MB of float32, which fit a core's L2 cache; a GPU needs more to stay busy.
CHUNK = {"cpu": 1 << 19, "cuda": 1 << 24}
ROWS = 4096  # of half precision that the CPU converts and sums at a time: a sum of sums rounds less


def linear_multi_js_loss(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """`multi_js_loss(F.linear(features, weight, bias))` in no more memory than its gradients take.

    Args:
        features: block-ordered inputs of the classifier's last layer, `[C·n, f]` or `[C, n, f]`.
        weight: that layer's weight, `[C, f]`.
        bias: that layer's bias, `[C]`, or None.
        weights: π `[C]`, the weight of each block (see `multi_js_loss`); None means 1/C each.
        label_smoothing: see `multi_js_loss`.

    Returns:
        the loss `[]` in nats, float32 for half precision. Differentiable in features, weight and
        bias; the transforms of torch.func, forward mode and higher orders store all logits.

    Raises:
        TypeError, ValueError: a wrong dtype or shape, or a number of rows that C does not divide.

    Source: S1 (IVAAE) Eq. 1 with the discriminator's last layer.
    """
    features, weight, bias = _check.promoted(features, weight, bias)
    classes = _check_layer(features, weight, bias)
    weights = None if weights is None else check_weights(weights, classes, features)
    label_smoothing = check_smoothing(label_smoothing)
    if autocasting() or torch.compiler.is_compiling():  # chunks are never cast; a graph serves any number of rows
        return fused(features, weight, bias, weights, label_smoothing)
    if row_count(features) * classes <= chunk_of(features):  # a single chunk leaves nothing to save
        return _unfused(features, weight, bias, weights, label_smoothing)
    return fused(features, weight, bias, weights, label_smoothing)


def fused(
    features: Tensor, weight: Tensor, bias: Tensor | None, weights: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """The loss by chunks, however few; arguments are already checked."""
    if transformed():
        return _unfused(features, weight, bias, weights, label_smoothing)
    return _loss(features, weight, bias, weights, label_smoothing)


def _unfused(features, weight, bias, weights, label_smoothing):
    x = features.reshape(-1, features.shape[-1])
    if autocasting():  # which leaves float64 alone, and in the products of derivatives too
        x, weight, bias = x.double(), weight.double(), None if bias is None else bias.double()
    logits = F.linear(x, weight, bias).to(features.dtype)
    return multi_js.multi_js_loss(logits, weights=weights, label_smoothing=label_smoothing)


def chunk_of(x: Tensor) -> int:
    return CHUNK.get(x.device.type, CHUNK["cuda"])


def row_count(features: Tensor) -> int:
    """C·n, which `torch.Size.numel` would make a constant of a graph."""
    rows = features.shape[0]
    return rows if features.dim() == 2 else rows * features.shape[1]


def _check_layer(features: Tensor, weight: Tensor, bias: Tensor | None) -> int:
    """The number of classes."""
    _check.floating("features", features)
    _check.alike("weight", weight, "features", features)
    if weight.dim() != 2 or weight.shape[0] < 2:
        raise ValueError(f"weight must be [C, f] with C >= 2, got {tuple(weight.shape)}")
    classes, width = weight.shape
    if features.dim() not in (2, 3) or features.shape[-1] != width:
        raise ValueError(
            f"features must be [C·n, f] or [C, n, f] with f = {width} as in weight, got {tuple(features.shape)}"
        )
    rows = row_count(features)
    if rows == 0 or rows % classes or (features.dim() == 3 and features.shape[0] != classes):
        raise ValueError(
            f"features must hold n rows for each of weight's C = {classes} classes, got {tuple(features.shape)}"
        )
    if bias is not None:
        _check.alike("bias", bias, "features", features)
        if bias.shape != (classes,):
            raise ValueError(f"bias must have shape ({classes},), one entry per row of weight, got {tuple(bias.shape)}")
    return classes


def linear_multi_js_loss_reference(
    features, weight, bias, weights, label_smoothing, features_gradient, weight_gradient, bias_gradient
):
    """The loss and the gradients of C·n times the loss, a magnitude that half precision can hold. Gradients that are
    not requested are empty."""
    x, w = features.reshape(-1, features.shape[-1]), weight
    logits = F.linear(arithmetic(x), arithmetic(w), None if bias is None else arithmetic(bias))
    loss, lse = multi_js.multi_js_loss_reference(logits, weights, label_smoothing)
    G = multi_js.backward_reference(torch.full_like(loss, x.shape[0]), logits, weights, lse, label_smoothing)
    dx = (G @ arithmetic(w)).to(x.dtype).view(features.shape) if features_gradient else x.new_empty(0)
    dw = G.mT @ arithmetic(x) if weight_gradient else G.new_empty(0)
    db = G.sum(0) if bias_gradient else G.new_empty(0)
    return loss, dx, dw, db


def linear_multi_js_loss_chunked(
    features, weight, bias, weights, label_smoothing, features_gradient, weight_gradient, bias_gradient
):
    """The same as the reference, with the logits of a few rows at a time."""
    x, w = features.reshape(-1, features.shape[-1]), weight
    rows, classes = x.shape[0], w.shape[0]
    wide = torch.promote_types(x.dtype, torch.float32)
    dx = x.new_empty(x.shape if features_gradient else 0)
    dw = w.new_zeros(w.shape if weight_gradient else 0, dtype=wide)
    db = w.new_zeros(classes if bias_gradient else 0, dtype=wide)
    loss = x.new_zeros((), dtype=wide)
    n = rows // classes
    weights = w.new_full((classes,), n, dtype=wide) if weights is None else weights * rows  # for C·n times the loss
    chunk = max(1, chunk_of(x) // classes)
    gradient = features_gradient or weight_gradient or bias_gradient
    for first in range(0, rows, chunk):
        part = x[first : first + chunk]
        logits = part @ w.mT if bias is None else torch.addmm(bias, part, w.mT)
        G = logits.to(wide)  # half precision's rounding of the gradient would not cancel in dw, a sum over all rows
        loss += _rows(G, weights, label_smoothing, first, n, gradient)
        if features_gradient:
            torch.mm(G.to(x.dtype), w, out=dx[first : first + chunk])
        if weight_gradient:
            _add_product(dw, G, part)
        if bias_gradient:
            db += G.sum(0)
    return loss / rows, dx.view(features.shape) if features_gradient else dx, dw, db


def _add_product(dw, G, x):
    """dw += Gᵀx, a sum over many rows, for x in half precision too, where that sum could overflow."""
    if x.dtype == dw.dtype:
        dw.addmm_(G.mT, x)
    elif x.is_cuda:  # two products of half precision are faster than one of float32
        high = G.to(x.dtype)
        for part in (high, (G - high).to(x.dtype)):
            dw += torch.mm(part.mT, x, out_dtype=dw.dtype)
    else:
        for g, rows in zip(G.split(ROWS), x.split(ROWS), strict=True):
            dw += g.mT @ rows.to(dw.dtype)


def multi_js_rows_reference(logits, weights, label_smoothing, first, n, gradient):
    """What rows [first, first + len(logits)) of C blocks of n rows add to the loss; overwrites logits with
    ∂loss/∂logits."""
    x, classes = multi_js.shifted(arithmetic(logits))[0], logits.shape[-1]
    own = (torch.arange(first, first + len(logits), device=x.device) // n).unsqueeze(1)  # each row's class
    scale = (torch.full_like(x[:, :1], 1 / classes) if weights is None else weights[own]) / n
    lse = x.logsumexp(-1, keepdim=True)
    target = x.gather(1, own)
    if label_smoothing:
        target = (1 - label_smoothing) * target if label_smoothing < 1 else torch.zeros_like(target)
        target = target + label_smoothing * x.mean(-1, keepdim=True)
    loss = (scale * (lse - target)).sum()
    if gradient:
        onehot = torch.zeros_like(x).scatter_(1, own, 1 - label_smoothing)
        logits.copy_((x.softmax(-1) - onehot - label_smoothing / classes) * scale)
    return loss


_rows = register(
    "multi_js_rows_(Tensor(a!) logits, Tensor? weights, float label_smoothing, int first, int n, bool gradient)"
    " -> Tensor",
    reference=multi_js_rows_reference,
    cuda=True,
    prefer=lambda logits, *_: few_in_cuda(logits),
    triton="multi_js.rows",
)
_forward = register(
    "linear_multi_js_loss(Tensor features, Tensor weight, Tensor? bias, Tensor? weights, float label_smoothing,"
    " bool features_gradient, bool weight_gradient, bool bias_gradient)"
    " -> (Tensor loss, Tensor dfeatures, Tensor dweight, Tensor dbias)",
    reference=linear_multi_js_loss_reference,
    composition=linear_multi_js_loss_chunked,
    parts=(_rows,),
)


def _gradients(forward, grads, inputs, outputs, needed):
    _, *gradients = forward(*inputs, *needed[:3])
    features, scale = inputs[0], grads[0] / row_count(inputs[0])
    return *((g * scale).to(features.dtype) if n else None for g, n in zip(gradients, needed[:3], strict=True)), None


def _first(rule, second):
    @uncompiled
    class LinearMultiJs(torch.autograd.Function):
        """The first backward pass scales the gradients of forward in place and returns them; later ones recompute."""

        @staticmethod
        def forward(ctx, features, weight, bias, weights, label_smoothing):
            ctx.constants = (label_smoothing,)
            loss, *ctx.kept = _forward(features, weight, bias, weights, label_smoothing, *ctx.needs_input_grad[:3])
            ctx.save_for_backward(features, weight, bias, weights)
            return loss

        @staticmethod
        def backward(ctx, grad):
            features = ctx.saved_tensors[0]
            again = torch.is_grad_enabled() or transformed()
            if again or ctx.kept is None:
                ctx.kept = None  # a graph of higher order would hold them for as long as it lives
                return rule.pulled(ctx, (grad,), ctx.saved_tensors, second, again)
            gradients, ctx.kept = ctx.kept, None
            scale, needed = grad / row_count(features), ctx.needs_input_grad[:3]
            scaled = (g.mul_(scale).to(features.dtype) if n else None for g, n in zip(gradients, needed, strict=True))
            return *scaled, None, None

    return LinearMultiJs


_loss = differentiable(_forward, _gradients, backward=_forward, first=_first, tensors=4, outputs=4, flags=3)
