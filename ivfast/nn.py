"""The losses as modules in the style of torch.nn, and a linear layer whose gradient an optimizer can compute itself."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import _check
from .ops.as_distance import as_distance
from .ops.mmd import mmd
from .ops.multi_js import multi_js_loss


class MultiJSLoss(nn.Module):
    """`multi_js_loss` with its block weights π `[C]` (None: equal) as a buffer, a copy.

    A state dict says which weights the module has: where they are None, an empty tensor. Loading it gives any module
    its weights, None or not.
    """

    weights: Tensor | None

    def __init__(self, weights: Tensor | None = None):
        super().__init__()
        if weights is not None:
            _check.floating("weights", weights)
            weights = weights.detach().clone()
        self.register_buffer("weights", weights)

    def forward(self, logits: Tensor) -> Tensor:
        return multi_js_loss(logits, weights=self.weights)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.setdefault(f"{prefix}weights", torch.empty(0, device="cpu"))

    def _load_from_state_dict(self, state_dict, prefix, *others):
        saved = state_dict.get(f"{prefix}weights")
        if isinstance(saved, Tensor) and not saved.numel():
            state_dict = {name: value for name, value in state_dict.items() if name != f"{prefix}weights"}
            self.weights = None
        elif isinstance(saved, Tensor) and self.weights is None:
            self.weights = saved.detach().clone()
        super()._load_from_state_dict(state_dict, prefix, *others)


class MMDLoss(nn.Module):
    """`mmd` with its kernel, scales, bandwidth and form fixed; a bandwidth that is a tensor is a buffer, a copy."""

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
            self.register_buffer("bandwidth", bandwidth.detach().clone())
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
        weight = self.weight
        if not isinstance(weight, Deferred) or not _defers(x):
            return F.linear(x, weight, self.bias)
        return _Linear.apply(x, weight, self.bias)


def _defers(x: Tensor) -> bool:
    return (
        x.dtype == torch.float32
        and x.dim() == 2
        and torch.is_grad_enabled()
        and not torch.is_autocast_enabled(x.device.type)
        and not torch.compiler.is_compiling()
    )


class Pending(list):
    """The pairs (output gradient, input) of a layer whose products sum to the gradient of its weight."""

    def leave(self, grad: Tensor, x: Tensor) -> None:
        self.append((grad, x, grad._version, x._version))

    def take(self) -> tuple[Tensor, Tensor]:
        """All pairs as one.

        Raises:
            RuntimeError: a tensor was modified in place after backward: its values are gone.
        """
        grads, inputs, *versions = zip(*self, strict=True)
        self.clear()
        for name, tensors, then in zip(("output gradient", "input"), (grads, inputs), versions, strict=True):
            if any(x._version != version for x, version in zip(tensors, then, strict=True)):
                raise RuntimeError(
                    f"the {name} of a fused Linear layer was modified in place between backward and the optimizer's "
                    "step, which needs it: modify a copy, or read weight.grad before"
                )
        return (grads[0], inputs[0]) if len(grads) == 1 else (torch.cat(grads), torch.cat(inputs))


_grad: Any = torch.Tensor.grad  # the descriptor


class Deferred(nn.Parameter):
    """A weight whose gradient waits as `pending` products for an optimizer; reading `grad` computes it.

    So whatever looks at gradients (clipping, `torch.amp.GradScaler`, another optimizer) finds them, and the optimizer
    then uses what it finds. Copies and pickles are ordinary parameters.
    """

    pending: Pending

    @classmethod
    def of(cls, weight: Tensor) -> None:
        """Turn a parameter into one in place; other objects that hold it keep it."""
        weight.__class__ = cls
        weight.pending = Pending()  # type: ignore[attr-defined]

    def release(self) -> None:
        """Become an ordinary parameter again."""
        self.settle()
        del self.pending
        self.__class__ = nn.Parameter  # type: ignore[assignment]

    def settle(self) -> None:
        """Add what is pending to the gradient."""
        if self.pending:
            with torch.inference_mode(False), torch.no_grad():
                grad, x = self.pending.take()
                product = grad.t() @ x
                known = self.known
                _grad.__set__(self, product if known is None else known.add_(product))

    @property
    def known(self) -> Tensor | None:
        """The gradient without what is pending."""
        return _grad.__get__(self)

    @property
    def grad(self) -> Tensor | None:
        self.settle()
        return self.known

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        self.pending.clear()
        _grad.__set__(self, value)

    @grad.deleter
    def grad(self) -> None:
        self.grad = None

    def __deepcopy__(self, memo):
        memo[id(self)] = result = copy.deepcopy(nn.Parameter(self.data, self.requires_grad))
        return result

    def __reduce_ex__(self, protocol):
        return nn.Parameter(self.data, self.requires_grad).__reduce_ex__(protocol)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.weight = weight  # itself: hooks on saved tensors give copies
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        dx = grad @ weight if ctx.needs_input_grad[0] else None
        dbias = grad.sum(0) if ctx.needs_input_grad[2] else None
        dweight = None
        if ctx.needs_input_grad[1]:
            left = _left(ctx)
            if left is None:
                dweight = grad.t() @ x
            elif left:
                ctx.weight.pending.leave(grad, x)
        return dx, dweight, dbias


def _left(ctx) -> bool | None:
    """Whether to leave the weight's gradient to an optimizer. None: autograd has to return it; False: nobody asked."""
    weight = ctx.weight
    if torch.is_grad_enabled():  # the gradient will be differentiated
        return None
    if not isinstance(weight, Deferred) or weight._backward_hooks or weight._post_accumulate_grad_hooks:
        return None
    try:
        return torch._C._will_engine_execute_node(ctx.next_functions[1][0])
    except RuntimeError:  # torch.autograd.grad asks for this very gradient
        return None
