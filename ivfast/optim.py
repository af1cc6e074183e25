"""Adam that computes and applies a linear layer's weight gradient in one pass, on the CPU.

A training step of a perceptron on few samples is memory-bound: the gradient gᵀx of a weight is written, read again by
the optimizer, then freed and allocated anew. `Adam.fuse` leaves the product to the optimizer, which accumulates it tile
by tile in registers and applies it at once: memory traffic is 24 bytes per weight instead of 36.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .nn import Linear, Pending
from .ops.linear_adam import linear_adam_

LEAST = 2**19  # weights per layer from which the fused step is faster: bench/studies/fused_adam.py
MOST_SAMPLES = 96  # with more, the product dominates the step, and PyTorch's is faster


class Adam(torch.optim.Adam):
    """`torch.optim.Adam` that can also compute the weight gradients of linear layers. The state and its names are the
    same."""

    def fuse(self, modules: Iterable[nn.Module]) -> None:
        """Compute the weight gradients of the large `ivfast.nn.Linear` layers in `modules` inside `step`.

        Their `weight.grad` then stays None: backward keeps the layer's input and its output's gradient for `step`, and
        `zero_grad` drops them. Results equal those of `torch.optim.Adam` up to rounding. Code that asks autograd for
        the gradient of such a weight (`torch.autograd.grad`, hooks on the weight) does not get it.

        Raises:
            ValueError: weight decay, AMSGrad or maximisation, which the fused step does not support.
        """
        for group in self.param_groups:
            for name in ("weight_decay", "amsgrad", "maximize"):
                if group[name]:
                    raise ValueError(f"{name} must be {type(group[name])()} for a fused step, got {group[name]}")
        mine = {p for group in self.param_groups for p in group["params"]}
        for module in modules:
            for layer in module.modules():
                if isinstance(layer, Linear) and layer.weight in mine and _serves(layer.weight):
                    layer.weight.pending = Pending()  # type: ignore[attr-defined]

    def unfuse(self) -> None:
        """Let backward compute all gradients again."""
        for _, weight, _ in list(self._fused()):
            del weight.pending

    def zero_grad(self, set_to_none: bool = True) -> None:
        if not set_to_none:
            super().zero_grad(set_to_none)
        for group in self.param_groups:  # the same without 60 µs of profiling hooks
            for p in group["params"]:
                if set_to_none:
                    p.grad = None
                pending = getattr(p, "pending", None)
                if pending is not None:
                    pending.clear()

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._spend()
        if all(self._is_plain(group) for group in self.param_groups):
            for group in self.param_groups:
                self._step_plain(group)
        else:
            super().step()
        return loss

    def _spend(self) -> None:
        """Update the weights whose gradients backward left to this optimizer."""
        for group, weight, pending in self._fused():
            if not pending:
                continue
            grad, x = pending.take()
            if weight.grad is not None or len(x) > MOST_SAMPLES:
                product = grad.t() @ x
                weight.grad = product if weight.grad is None else weight.grad.add_(product)
            else:
                self._step(group, weight, grad, x)
        for group in self.param_groups:
            for p in group["params"]:
                if p.dim() == 4 and p.grad is not None:
                    p.grad = _laid_out_as(p, p.grad)

    def _is_plain(self, group: dict[str, Any]) -> bool:
        """Whether `torch.optim.Adam` would pass the group to a single kernel unchanged."""
        if not group["fused"] or any(group[name] for name in ("amsgrad", "differentiable", "capturable")):
            return False
        of = (p for p in group["params"] if p.grad is not None)
        return all(p.device.type == "cpu" and p.dtype == torch.float32 and self.state[p] for p in of)

    def _step_plain(self, group: dict[str, Any]) -> None:
        """What `torch.optim.Adam` does in that case, in a third of its time; its overhead dominates small networks."""
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        states = [self.state[p] for p in params]
        steps, (beta1, beta2) = [state["step"] for state in states], group["betas"]
        torch._foreach_add_(steps, 1)
        torch._fused_adam_(
            params,
            [p.grad for p in params],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            steps,
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=group["maximize"],
        )

    def load_state_dict(self, state_dict) -> None:
        super().load_state_dict(state_dict)
        for p, state in self.state.items():
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape == p.shape:
                    state[name] = _laid_out_as(p, value)

    def _fused(self):
        for group in self.param_groups:
            for p in group["params"]:
                pending = getattr(p, "pending", None)
                if pending is not None:
                    yield group, p, pending

    def _step(self, group: dict[str, Any], weight: Tensor, grad: Tensor, x: Tensor) -> None:
        state = self.state[weight]
        if not state:  # as in torch.optim.Adam
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(weight)
            state["exp_avg_sq"] = torch.zeros_like(weight)
        state["step"] += 1
        step, (beta1, beta2) = float(state["step"]), group["betas"]
        rate, root_correction = float(group["lr"]) / (1 - beta1**step), (1 - beta2**step) ** -0.5
        linear_adam_(
            weight, state["exp_avg"], state["exp_avg_sq"], grad, x, rate, root_correction, beta1, beta2, group["eps"]
        )


def _laid_out_as(p: Tensor, x: Tensor) -> Tensor:
    """x with the strides of p: PyTorch's fused Adam on the CPU ignores strides and walks linearly through the memory of
    both."""
    return x if x.stride() == p.stride() else torch.empty_like(p).copy_(x)


def _serves(weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and weight.numel() >= LEAST
        and not linear_adam_.missing("cpu", "cpu")
    )
