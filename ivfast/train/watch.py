"""What would keep a step of training from being a CUDA graph, found on any device.

A CUDA graph repeats the kernels of one step with the addresses and the numbers that it was recorded with, and without
Python. Recording a step that breaks this rule fails late and says little, or gives wrong results in silence: a value
that was read on the host stays what it was, a tensor that moved is read where it used to be. So two steps first run as
they are, under `Watch`, which PyTorch tells of every operator:

1. each call is refused that no graph can hold (`_unfit`, and `_Host` for reads that reach no operator);
2. each call is compared with its counterpart in the step before (`_changed`): the same operator, the same shapes and
   numbers, every tensor at the same address, or made at the same place of the step;
3. after a step, no tensor that the step before made may still be alive: the next replay would overwrite it.

The first fault becomes a `CannotCapture`, which names the phase, the operator and the reason; `capture.py` then trains
without a graph. Most of this needs no GPU. Only whether an operator itself waits for the device is told by CUDA alone
(`_heard`).
"""

import contextlib
import gc
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class CannotCapture(RuntimeError):
    """A step that cannot be a CUDA graph. Attributes: place (a phase or another part of the step), op, reason."""

    def __init__(self, place: str, op: str, reason: str):
        self.place, self.op, self.reason = place, op, reason
        super().__init__(f"the step cannot be captured: in {place}, {op} {reason}")


_WAITS = {
    **dict.fromkeys((Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.cpu), "copies values to the host"),
    **dict.fromkeys((Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__), "reads a value on the host"),
    **dict.fromkeys(
        (torch.tensor, torch.as_tensor, torch.from_numpy),
        "makes a tensor from values on the host, which a graph would repeat: make it once, before the steps",
    ),
}
# They look at an error code on the host.
_CHECKED = {"_linalg_svd", "_linalg_eigh", "_linalg_eigvals", "linalg_eig", "_linalg_check_errors", "linalg_lstsq"}
_DEPENDS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class Watch(TorchDispatchMode):
    """Compares each step with the one before, and notes the first thing that a graph of it could not do.

    `step` runs a step unchanged. `objection` is then None or says what: values read on the host, shapes that depend on
    values, another course of operators or another number than before, a tensor from outside that has moved, a tensor
    of the step before that is still held. Inside an operator it sees on CUDA whether PyTorch waits, elsewhere nothing:
    what an operator does on a CPU is not what it does on a GPU.
    """

    def __init__(self, where: Callable[[], str]):
        super().__init__()
        self.where = where
        self.objection: CannotCapture | None = None
        self.before: list[tuple] | None = None
        self.calls: list[tuple] = []
        self.made: list[tuple[StorageWeakRef, str, str]] = []
        self.heard: list[warnings.WarningMessage] = []
        self.own: dict[int, tuple[StorageWeakRef, int]] = {}  # address -> a storage made in this step, its number

    def step(self, body: Callable[[], None]) -> None:
        earlier = self.made
        self.calls, self.made, self.own = [], [], {}
        with _heard() as self.heard, _Host(self), self:
            body()
        if self.before is not None and len(self.calls) < len(self.before):
            self.object(*self.before[len(self.calls)][:2], "was called in the previous step and not in this one")
        if any(not made.expired() for made, *_ in earlier):
            gc.collect()
        for made, place, op in earlier:
            if not made.expired():
                reason = "made a tensor that is still held after the next step: keep its values with copy_"
                self.object(place, op, reason)
        self.before = self.calls

    def object(self, place: str, op: str, reason: str) -> None:
        self.objection = self.objection or CannotCapture(place, op, reason)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace == "profiler":  # an optimizer names its step
            return function(*args, **kwargs)
        leaves = tree_leaves((args, kwargs))
        op, place = str(function), self.where()
        reason = _unfit(function, args, leaves) or self._changed(place, op, [self._described(x) for x in leaves])
        heard = len(self.heard)
        with torch._C.DisableTorchFunction():
            result = function(*args, **kwargs)
        if any(_SYNCHRONIZES in str(warning.message) for warning in self.heard[heard:]):
            reason = reason or "waits for the device"
        if reason:
            self.object(place, op, reason)
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self._note(x, place, op, leaves)
        return result

    def _changed(self, place: str, op: str, arguments: list[tuple]) -> str | None:
        """How this call differs from its counterpart in the step before."""
        index = len(self.calls)
        self.calls.append((place, op, arguments))
        if self.before is None or self.objection:
            return None
        if index >= len(self.before):
            return "was not called in the previous step"
        _, old_op, old = self.before[index]
        if op != old_op or len(arguments) != len(old):
            return f"is called where the previous step called {old_op}: every step must make the same calls"
        for now, then in zip(arguments, old, strict=True):
            if now[0] != then[0]:
                return f"got {now[0]}, and {then[0]} in the previous step: put a value that changes into a tensor"
            if now[1] != then[1]:
                return "reads a tensor that has moved since the previous step: update it in place with copy_"
        return None

    def _described(self, x: object) -> tuple[str, object]:
        """An argument of a call, and where it lies: a number for what this step made, else the address."""
        if not isinstance(x, Tensor):
            return repr(x), None
        address = x.untyped_storage().data_ptr()
        made, number = self.own.get(address, (None, None))
        own = made is not None and not made.expired()
        about = f"a tensor {tuple(x.shape)} {x.stride()} {x.dtype}"
        return about, (x.storage_offset(), f"own {number}" if own else address)

    def _note(self, x: Tensor, place: str, op: str, arguments: list) -> None:
        storage = x.untyped_storage()
        address = storage.data_ptr()
        if address and all(address != y.untyped_storage().data_ptr() for y in arguments if isinstance(y, Tensor)):
            made = StorageWeakRef(storage)
            self.own[address] = made, len(self.made)
            self.made.append((made, place, op))


_SYNCHRONIZES = "called a synchronizing CUDA operation"


@contextlib.contextmanager
def _heard() -> Iterator[list[warnings.WarningMessage]]:
    """The warnings so far, among them those of PyTorch about waiting for a CUDA device; the others are given again."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        before = torch.cuda.get_sync_debug_mode() if torch.cuda.is_initialized() else None
        if before is not None:
            torch.cuda.set_sync_debug_mode("warn")
            heard.clear()  # that this is a prototype
        try:
            yield heard
        finally:
            if before is not None:
                torch.cuda.set_sync_debug_mode(before)
    for warning in heard:
        if not any(text in str(warning.message) for text in (_SYNCHRONIZES, "Synchronization debug mode")):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


class _Host(TorchFunctionMode):
    """Notes the calls that a dispatcher does not see, or sees too late to name."""

    def __init__(self, watch: Watch):
        super().__init__()
        self.watch = watch

    def __torch_function__(self, function, types, args=(), kwargs=None):
        reason = _WAITS.get(function)
        if reason:
            kind = "torch" if getattr(torch, function.__name__, None) is function else "Tensor"
            self.watch.object(self.watch.where(), f"{kind}.{function.__name__}", reason)
        return function(*args, **(kwargs or {}))


def _unfit(function: torch._ops.OpOverload, args: tuple, leaves: list) -> str | None:
    """What about this call no graph can hold."""
    name = function._schema.name.partition("::")[2]
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    if name in ("index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"):
        masks = any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        fills = name != "index" and args[2].numel() == 1 if len(args) > 2 else False
        return "takes a mask and waits to count its entries" if masks and not fills else None
    if any(tag in function.tags for tag in _DEPENDS):
        return "reads a value on the host" if _DEPENDS[0] in function.tags else "has a shape that depends on values"
    if name in _CHECKED:
        return "waits for its error code"
    if any(isinstance(x, torch.Generator) for x in leaves):
        return "draws from its own generator, which would repeat the same draws in every step"
    devices = {x.device for x in tensors} | {torch.device(x) for x in leaves if isinstance(x, torch.device)}
    if name in ("copy_", "_to_copy") and len({device.type for device in devices}) > 1:
        return f"copies between {' and '.join(sorted(map(str, devices)))}"
    return None
