"""The losses as modules in the style of torch.nn, and a linear layer whose gradient an optimizer can compute itself."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .ops.as_distance import as_distance
from .ops.mmd import mmd
from .ops.multi_js import multi_js_loss


class MultiJSLoss(nn.Module):
    """`multi_js_loss` with its block weights π `[C]` (None: equal) as a buffer."""

    weights: Tensor | None

    def __init__(self, weights: Tensor | None = None):
        super().__init__()
        self.register_buffer("weights", weights)

    def forward(self, logits: Tensor) -> Tensor:
        return multi_js_loss(logits, weights=self.weights)


class MMDLoss(nn.Module):
    """`mmd` with its kernel, scales, bandwidth and form fixed."""

    def __init__(
        self,
        kernel: str = "imq",
        scales: tuple[float, ...] | None = None,
        bandwidth: float | Tensor | str | None = None,
        unbiased: bool = True,
    ):
        super().__init__()
        self.kernel, self.scales, self.unbiased = kernel, scales, unbiased
        if isinstance(bandwidth, Tensor):
            self.register_buffer("bandwidth", bandwidth)
        else:
            self.bandwidth = bandwidth

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return mmd(x, y, kernel=self.kernel, scales=self.scales, bandwidth=self.bandwidth, unbiased=self.unbiased)

    def extra_repr(self) -> str:
        return f"kernel={self.kernel!r}, scales={self.scales}, unbiased={self.unbiased}"


class ASDistance(nn.Module):
    """`as_distance` with its kernel, measure and form fixed."""

    def __init__(self, kernel: str = "product", measure: str = "lebesgue", log: bool = False, unbiased: bool = False):
        super().__init__()
        self.form: dict[str, Any] = {"kernel": kernel, "measure": measure, "log": log, "unbiased": unbiased}

    def forward(self, mu_r: Tensor, logvar_r: Tensor, mu_g: Tensor, logvar_g: Tensor) -> Tensor:
        return as_distance(mu_r, logvar_r, mu_g, logvar_g, **self.form)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.form.items())


class Linear(nn.Linear):
    """`torch.nn.Linear`, whose weight gradient can be left to the optimizer by `ivfast.optim.Adam.fuse`."""

    def forward(self, x: Tensor) -> Tensor:
        pending = getattr(self.weight, "pending", None)
        if pending is None or not torch.is_grad_enabled() or x.dtype != torch.float32 or x.dim() != 2:
            return F.linear(x, self.weight, self.bias)
        return _Linear.apply(x, self.weight, self.bias, pending)


class Pending(list):
    """The pairs (output gradient, input) of a layer whose products sum to the gradient of its weight."""

    def take(self) -> tuple[Tensor, Tensor]:
        grads, inputs = zip(*self, strict=True)
        self.clear()
        return (grads[0], inputs[0]) if len(grads) == 1 else (torch.cat(grads), torch.cat(inputs))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, pending):
        ctx.save_for_backward(x, weight)
        ctx.pending = pending
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        dx = grad @ weight if ctx.needs_input_grad[0] else None
        dbias = grad.sum(0) if ctx.needs_input_grad[2] else None
        if torch.is_grad_enabled():  # the gradient will be differentiated
            return dx, grad.t() @ x, dbias, None
        if ctx.needs_input_grad[1]:
            ctx.pending.append((grad, x))
        return dx, None, dbias, None
