"""Adam that computes and applies a linear layer's weight gradient in one pass, on the CPU.

A training step of a perceptron on few samples is memory-bound: the gradient gᵀx of a weight is written, read again by
the optimizer, then freed and allocated anew. `Adam.fuse` leaves the product to the optimizer, which accumulates it tile
by tile in registers and applies it at once: memory traffic is 24 bytes per weight instead of 36.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import _defaults
from .nn import Deferred, Linear
from .ops.linear_adam import linear_adam_

LEAST = 2**19  # weights per layer from which the fused step is faster: bench/studies/fused_adam.py
MOST_SAMPLES = 96  # with more, the product dominates the step, and PyTorch's is faster
_step: Any = torch.optim.Adam.step  # without the hooks around it, which are around `Adam.step` already
_step = _step.__wrapped__ if hasattr(_step, "hooked") else _step
Entry = tuple[Tensor, Tensor, dict[str, Tensor]]  # a parameter, its gradient and its state
AVERAGES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


class Adam(torch.optim.Adam):
    """`torch.optim.Adam` that can also compute the weight gradients of linear layers. The state and its names are the
    same.

    Raises:
        ValueError: by `step` and `load_state_dict`, for a gradient or a state of another shape or dtype than its
            parameter, or, where `fused`, for a parameter whose elements overlap or have gaps between them in memory.
    """

    def fuse(self, modules: Iterable[nn.Module]) -> None:
        """Compute the weight gradients of the large `ivfast.nn.Linear` layers in `modules` inside `step`.

        Backward then keeps the layer's input and its output's gradient for `step`. Results equal those of
        `torch.optim.Adam` up to rounding. Whatever reads such a `weight.grad` before (`clip_grad_norm_`, `GradScaler`,
        hooks, `torch.autograd.grad`) gets the gradient, which `step` then uses as it finds it, at the cost of the
        unfused step. The layer's input must not be modified in place between backward and `step`, which raises.

        Raises:
            ValueError: weight decay, AMSGrad or maximisation, which the fused step does not support; several ranks of
                `torch.distributed`, which exchange gradients where nothing can see that they are read.
        """
        for group in self.param_groups:
            for name in ("weight_decay", "amsgrad", "maximize"):
                if group[name]:
                    raise ValueError(f"{name} must be {type(group[name])()} for a fused step, got {group[name]}")
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise ValueError(f"a fused step is for one process, got {dist.get_world_size()} ranks of torch.distributed")
        mine = {p for group in self.param_groups for p in group["params"]}
        for module in modules:
            for layer in module.modules():
                if isinstance(layer, Linear) and layer.weight in mine and _serves(layer.weight):
                    Deferred.of(layer.weight)

    def unfuse(self) -> None:
        """Let backward compute all gradients again."""
        for group in self.param_groups:
            for weight in _deferred(group):
                weight.release()

    def zero_grad(self, set_to_none: bool = True) -> None:
        if not set_to_none:
            return super().zero_grad(set_to_none)
        for group in self.param_groups:  # the same without 60 µs of profiling hooks
            for p in group["params"]:
                p.grad = None

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scaled = getattr(self, "grad_scale", None) is not None or getattr(self, "found_inf", None) is not None
        ready = []
        for group in self.param_groups:
            self._spend(group, scaled)
            ready.append(self._ready(group))
        if not scaled and all(map(_is_plain, self.param_groups, ready)):
            for group, entries in zip(self.param_groups, ready, strict=True):
                _step_plain(group, entries)
        else:
            with _defaults.initial():  # PyTorch counts steps in the default dtype, on the default device
                _step(self)
        return loss

    def _spend(self, group: dict[str, Any], scaled: bool) -> None:
        """Update the weights whose gradients backward left to this optimizer."""
        for weight in _deferred(group):
            if not weight.pending:
                continue
            samples = sum(len(x) for _, x, *_ in weight.pending)
            if scaled or weight.known is not None or samples > MOST_SAMPLES or not _fits(group):
                weight.settle()
            else:
                self._step(group, weight, *weight.pending.take())

    def _ready(self, group: dict[str, Any]) -> list[Entry]:
        """Parameters, gradients and states, checked for what PyTorch's fused Adam on the CPU takes for granted.

        It walks linearly through the memory of gradient and averages, as many elements as the parameter has. What has
        other strides is laid out anew.
        """
        entries = []
        for p in group["params"]:
            grad = p.grad
            if grad is None:
                continue
            state = self.state[p]
            if p.is_cpu:
                shape, strides, dtype = p.shape, p.stride(), p.dtype
                if grad.shape != shape or grad.dtype != dtype:
                    raise self._mismatch("gradient", grad, p)
                for name in AVERAGES:
                    x = state.get(name)
                    if x is None:
                        continue
                    if x.shape != shape or x.dtype != dtype:
                        raise self._mismatch(f"state {name!r}", x, p)
                    if x.stride() != strides:
                        state[name] = _laid_out_as(p, x)
                if group["fused"] and (not state or grad.stride() != strides):
                    if torch.empty_like(p).stride() != strides:
                        raise ValueError(
                            f"{self._name(p)} must be dense in memory for fused=True, got shape {tuple(shape)} with "
                            f"strides {strides}"
                        )
                    p.grad = grad = _laid_out_as(p, grad)
            entries.append((p, grad, state))
        return entries

    def _mismatch(self, what: str, x: Tensor, p: Tensor) -> ValueError:
        own, given = (f"{tuple(y.shape)} {y.dtype}" for y in (p, x))
        return ValueError(f"the {what} of {self._name(p)} must match it: {own}, got {given}")

    def _name(self, p: Tensor) -> str:
        every = [q for group in self.param_groups for q in group["params"]]
        return f"parameter {next(i for i, q in enumerate(every) if q is p)}"

    def load_state_dict(self, state_dict) -> None:
        """As `torch.optim.Adam`'s, after a check of the whole state.

        Raises:
            ValueError: a state that is missing in part, or of another shape than its parameter.
        """
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        own = [(p, group) for group in self.param_groups for p in group["params"]]
        for index, (p, group) in zip(saved, own, strict=False):  # PyTorch refuses groups of another size
            state = state_dict["state"].get(index)
            for name, shape in layout(p, group).items() if state else ():
                if name not in state:
                    raise ValueError(f"the state {name!r} of {self._name(p)} is missing")
                given = tuple(getattr(state[name], "shape", ()))
                if given != shape:
                    raise ValueError(f"the state {name!r} of {self._name(p)} must have shape {shape}, got {given}")
        super().load_state_dict(state_dict)
        for p, state in self.state.items():
            for name in AVERAGES:
                if name in state:
                    state[name] = _laid_out_as(p, state[name])

    def _step(self, group: dict[str, Any], weight: Tensor, grad: Tensor, x: Tensor) -> None:
        state = self.state[weight]
        if not state:  # as in torch.optim.Adam
            state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
            state["exp_avg"] = torch.zeros_like(weight)
            state["exp_avg_sq"] = torch.zeros_like(weight)
        state["step"] += 1
        step, (beta1, beta2) = float(state["step"]), map(float, group["betas"])
        rate, root_correction = float(group["lr"]) / (1 - beta1**step), (1 - beta2**step) ** -0.5
        linear_adam_(
            weight, state["exp_avg"], state["exp_avg_sq"], grad, x, rate, root_correction, beta1, beta2, group["eps"]
        )


def layout(p: Tensor, group: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The state that `torch.optim.Adam` has for a parameter of a group, and the shape of each of its tensors."""
    averages = AVERAGES if group["amsgrad"] else AVERAGES[:2]
    return {"step": (), **dict.fromkeys(averages, tuple(p.shape))}


def _deferred(group: Mapping[str, Any]) -> Iterator[Deferred]:
    for p in group["params"]:
        if isinstance(p, Deferred):
            yield p


def _fits(group: Mapping[str, Any]) -> bool:
    """Whether the fused step does what the group's options say, which may have changed since `fuse`."""
    return not any(group[name] for name in ("weight_decay", "amsgrad", "maximize", "differentiable"))


def _is_plain(group: dict[str, Any], entries: list[Entry]) -> bool:
    """Whether `torch.optim.Adam` would pass the group to a single kernel unchanged."""
    kinds = ("amsgrad", "differentiable", "capturable", "decoupled_weight_decay")
    if not group["fused"] or any(group[name] for name in kinds):
        return False
    return all(state and p.is_cpu and p.dtype == torch.float32 for p, _, state in entries)


def _step_plain(group: dict[str, Any], entries: list[Entry]) -> None:
    """What `torch.optim.Adam` does in that case, in a third of its time; its overhead dominates small networks."""
    if not entries:
        return
    params, grads, states = map(list, zip(*entries, strict=True))
    steps, (beta1, beta2) = [state["step"] for state in states], group["betas"]
    torch._foreach_add_(steps, 1)
    torch._fused_adam_(
        params,
        grads,
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        steps,
        lr=group["lr"],
        beta1=float(beta1),
        beta2=float(beta2),
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=group["maximize"],
    )


def _laid_out_as(p: Tensor, x: Tensor) -> Tensor:
    """x with the strides of p."""
    return x if x.stride() == p.stride() else torch.empty_like(p).copy_(x)


def _serves(weight: Tensor) -> bool:
    return (
        type(weight) is nn.Parameter  # not one that is deferred already, nor another library's
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and weight.numel() >= LEAST
        and not linear_adam_.missing("cpu", "cpu")
    )
