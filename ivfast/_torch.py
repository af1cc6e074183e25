"""The private parts of PyTorch that ops depend on, each under a name of ours, so that a rename is mended in one place.

All exist from PyTorch 2.10 to 2.15, with the same meaning except where a function here says otherwise.
"""

import ctypes
import functools
import inspect
import sys
from collections.abc import Sequence
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
    """Whether a transform of torch.func, or forward mode, is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def primal(x: Tensor) -> Tensor:
    """x without its tangent. Forward mode has one level, which `forward_ad` does not know in a graph of Dynamo."""
    return forward_ad.unpack_dual(x, level=0).primal


def uncompiled(code):
    """A function, or a class with its static methods, that Dynamo leaves alone with all that they call."""
    frames = torch._C._dynamo.eval_frame
    skip = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.SKIP)
    for function in vars(code).values() if isinstance(code, type) else [code]:
        function = getattr(function, "__func__", function)
        while inspect.isfunction(function):
            frames.set_code_exec_strategy(function.__code__, skip)
            function = getattr(function, "__wrapped__", None)
    return code


def constant(x: Tensor) -> bool:
    """Whether no derivative in x is being taken."""
    if x.requires_grad:
        return False
    return not transformed() or not (wrapped(x) or forward_ad.unpack_dual(x).tangent is not None)


def only_mapped(tensors: Sequence[Tensor]) -> bool:
    """Whether all transforms that are active are `vmap`, and autograd and forward mode follow none of the tensors."""
    functorch = torch._C._functorch
    if any(level.key() != functorch.TransformType.Vmap for level in functorch.get_interpreter_stack() or ()):
        return False
    values = [innermost(x) for x in tensors]
    if torch.is_grad_enabled() and any(x.requires_grad for x in values):
        return False
    return all(forward_ad.unpack_dual(x, level=0).tangent is None for x in values)


def every_forward_level():
    """A context in which forward mode is on in all its levels; PyTorch switches them off in a custom `jvp`."""
    return forward_ad._set_fwd_grad_enabled(True)


def innermost(x: Tensor) -> Tensor:
    """All values of x, without the levels of transforms that hold it."""
    while wrapped(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


_reference = ctypes.PYFUNCTYPE(None, ctypes.py_object)(("Py_IncRef", ctypes.pythonapi))


@functools.cache
def _borrows(key: str) -> bool:
    """Whether PyTorch releases what it keeps in a thread without having taken a reference, as 2.10 does. Tried with an
    object under `key`."""
    value = object()
    before = sys.getrefcount(value)
    torch._C._stash_obj_in_tls(key, value)
    borrows = sys.getrefcount(value) == before
    if borrows:
        _reference(value)
    return borrows


def carry(key: str, value: Any) -> None:
    """Keep `value` in this thread, and in the threads in which autograd runs its backward passes."""
    if _borrows(key):
        _reference(value)
    torch._C._stash_obj_in_tls(key, value)


def carried(key: str) -> Any:
    return torch._C._get_obj_in_tls(key) if torch._C._is_key_in_tls(key) else None


def refused(message: str, count: int):
    """A function of `count` tensors that returns them with a graph in which differentiation raises RuntimeError."""
    return torch._C._functions.DelayedError(message.encode(), count)


def has_kernel(name: str, key: str) -> bool:
    """Whether an operator has a kernel of its own for a dispatch key."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
