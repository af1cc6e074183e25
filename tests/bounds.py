"""Every address that an interpreted Triton kernel reads or writes, checked against the tensor it was derived from.

On a GPU, a pointer past the end of a tensor usually points into another one, and nothing fails. Here each tensor that is
passed to a kernel has a range of addresses of its own, SPAN bytes from the next, so that a pointer still says which
tensor it came from after any arithmetic. Loads, stores and atomics of the interpreter go through a check that turns
these addresses into real ones. Lanes whose mask is false have no address.
"""

import contextlib
import inspect
from typing import NamedTuple

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter

SPAN = np.uint64(1 << 40)


class Argument(NamedTuple):
    kernel: str
    name: str
    tensor: object  # keeps the memory alive
    address: int
    size: int  # bytes from the first to the end of the last element


class Checked:
    """The interpreter's compiled functions, with checked addresses."""

    def __init__(self, functions):
        self.functions = functions
        self.arguments: list[Argument] = []
        self.names: list[str] = []
        self.kernel = ""
        self.kernels: set[str] = set()  # that were launched
        self.count = 0  # of checked operations

    def __getattr__(self, name):
        return getattr(self.functions, name)

    def load(self, pointers, mask, other, dtype):
        return self.functions.load(self.real("load", pointers, mask, np.dtype(dtype).itemsize), mask, other, dtype)

    def store(self, pointers, value, mask):
        return self.functions.store(self.real("store", pointers, mask, value.itemsize), value, mask)

    def atomic_rmw(self, kind, pointers, value, mask, semantics):
        pointers = self.real("atomic", pointers, mask, value.itemsize)
        return self.functions.atomic_rmw(kind, pointers, value, mask, semantics)

    def atomic_cas(self, pointers, compared, value, semantics):
        mask = np.ones(pointers.shape, bool)
        return self.functions.atomic_cas(
            self.real("atomic", pointers, mask, value.itemsize), compared, value, semantics
        )

    def enter(self, kernel: str, names: list[str]) -> None:
        self.kernel, self.names, self.arguments = kernel, names, []
        self.kernels.add(kernel)

    def pointer(self, tensor) -> tl.tensor:
        """An address for the next of a kernel's tensors, in the middle of its range."""
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        size = (last + 1) * tensor.element_size() if tensor.numel() else 0
        name = self.names[len(self.arguments)]
        self.arguments.append(Argument(self.kernel, name, tensor, tensor.data_ptr(), size))
        address = np.array([len(self.arguments)], np.uint64) * SPAN
        dtype = tl.str_to_ty(triton.runtime.jit.mangle_type(tensor), None)
        return tl.tensor(interpreter.TensorHandle(address, dtype), dtype)

    def real(self, operation: str, pointers, mask, itemsize: int) -> np.ndarray:
        self.count += 1
        mask = np.broadcast_to(mask, pointers.shape)
        if not mask.any():
            return pointers
        which = (pointers + SPAN // np.uint64(2)) // SPAN
        number = int(which[mask].flat[0])
        if not 1 <= number <= len(self.arguments) or (which[mask] != number).any():
            raise IndexError(f"{self.kernel}: {operation} from no tensor, or from several")
        argument = self.arguments[number - 1]
        offset = (pointers - np.uint64(number) * SPAN).view(np.int64)
        wrong = mask & ((offset < 0) | (offset + itemsize > argument.size) | (offset % itemsize != 0))
        if wrong.any():
            raise IndexError(
                f"{self.kernel}: {operation} at byte {int(offset[wrong].flat[0])} of {argument.name}, which has "
                f"{argument.size} {tuple(argument.tensor.shape)}; {int(wrong.sum())} of {int(mask.sum())} lanes are "
                f"outside, in program {interpreter.interpreter_builder.grid_idx}"
            )
        return np.where(mask, offset.view(np.uint64) + np.uint64(argument.address), np.uint64(0))


@contextlib.contextmanager
def checked():
    """Inside, an interpreted kernel that leaves its tensors raises. Yields a `Checked`, which counts."""
    functions, convert, launch = interpreter._interpreter, interpreter._implicit_cvt, interpreter.GridExecutor.__call__
    check = Checked(functions)

    def convert_checked(value):
        return check.pointer(value) if hasattr(value, "data_ptr") else convert(value)

    def launch_checked(self, *args, **kwargs):
        known = inspect.signature(self.fn).parameters
        given = inspect.signature(self.fn).bind(*args, **{k: v for k, v in kwargs.items() if k in known}).arguments
        kernel = f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}"
        check.enter(kernel, [name for name, value in given.items() if hasattr(value, "data_ptr")])
        return launch(self, *args, **kwargs)

    interpreter._interpreter = check
    interpreter._implicit_cvt = convert_checked
    interpreter.GridExecutor.__call__ = launch_checked
    try:
        yield check
    finally:
        interpreter._interpreter = functions
        interpreter._implicit_cvt = convert
        interpreter.GridExecutor.__call__ = launch
