"""The private parts of PyTorch that ops depend on, each under a name of ours, so that a rename is mended in one place.

All exist, with the same meaning, from PyTorch 2.10 to 2.15.
"""

from typing import Any

import torch
from torch import Tensor
from torch._functorch import utils
from torch.autograd import forward_ad

autocasting = torch._C._is_any_autocast_enabled  # () -> bool, on any device
without_autocast = torch._C._DisableAutocast  # a context, on all devices at once
alive = utils.unwrap_dead_wrappers  # tensors, without the levels of transforms that have ended
wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # whether a transform of torch.func holds the tensor


def transformed() -> bool:
    """Whether a transform of torch.func, or forward mode, is active, and not in what Dynamo traces."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def traced_transform() -> bool:
    """Whether Dynamo is tracing inside a transform of torch.func or forward mode."""
    if not torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def constant(x: Tensor) -> bool:
    """Whether no derivative in x is being taken."""
    if x.requires_grad:
        return False
    return not transformed() or not (wrapped(x) or forward_ad.unpack_dual(x).tangent is not None)


def every_forward_level():
    """A context in which forward mode is on in all its levels; PyTorch switches them off in a custom `jvp`."""
    return forward_ad._set_fwd_grad_enabled(True)


def innermost(x: Tensor) -> Tensor:
    """All values of x, without the levels of transforms that hold it."""
    while wrapped(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def carry(key: str, value: Any) -> None:
    """Keep `value` in this thread, and in the threads in which autograd runs its backward passes."""
    torch._C._stash_obj_in_tls(key, value)


def carried(key: str) -> Any:
    return torch._C._get_obj_in_tls(key) if torch._C._is_key_in_tls(key) else None


def refused(message: str, count: int):
    """A function of `count` tensors that returns them with a graph in which differentiation raises RuntimeError."""
    return torch._C._functions.DelayedError(message.encode(), count)


def has_kernel(name: str, key: str) -> bool:
    """Whether an operator has a kernel of its own for a dispatch key."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
