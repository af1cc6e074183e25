"""An operator consists of a schema, a reference that runs anywhere, and faster implementations of the same schema.

PyTorch's dispatcher is the registry. `register` defines the operator, with the reference as the fallback for every
device (and for fake tensors) and, for CUDA tensors, a launcher that picks the best implementation available. Kernels
in csrc/ register themselves by name: C++ CPU kernels under `ivfast::<name>`, CUDA C++ kernels under its overload
`<name>.cuda`. A graph compiled inside `use` calls that overload or `<name>.triton`, the Triton kernel alone; those of a
composition force each of its parts.
"""

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator, Sequence

import torch

from . import _devices
from ._torch import autocasting, carried, carry, has_kernel, without_autocast

IMPLEMENTATIONS = ("reference", "cpu", "triton", "cuda")
OPS: dict[str, "Op"] = {}

_library = torch.library.Library("ivfast", "DEF")


class _Choice(threading.local):
    here: str | None = None  # what this thread's innermost `use` forces


_choice, _lock, _blocks = _Choice(), threading.Lock(), 0
_forced: _Choice | None = None  # None while no thread is in a block, so that calls look no further
_KEY = "ivfast.use"


def _chosen() -> str | None:
    """What is forced in this thread, or in the thread whose backward pass a thread of autograd runs."""
    here = _choice.here
    return carried(_KEY) if here is None and not torch.compiler.is_dynamo_compiling() else here


def forced() -> str | None:
    """What `use` forces here; None outside its blocks."""
    return _chosen() if _forced else None


@contextlib.contextmanager
def use(implementation: str) -> Iterator[None]:
    """Force one implementation (`reference`, `cpu`, `triton` or `cuda`) for every op called inside the block.

    An op without that implementation raises `RuntimeError`, which names the op and what is missing; it never falls
    back. A backward pass is covered if it also runs inside the block, or belongs to a graph compiled there. The choice
    applies to this thread, and to the threads in which autograd runs its backward passes.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}")
    previous = _choice.here, carried(_KEY)
    _force(implementation, implementation, +1)
    try:
        yield
    finally:
        _force(*previous, -1)


def _force(here: str | None, on_autograd: str | None, blocks: int) -> None:
    global _forced, _blocks
    _choice.here = here
    carry(_KEY, on_autograd)
    with _lock:
        _blocks += blocks
        _forced = _choice if _blocks else None


def exact(function: Callable) -> Callable:
    """`function` without autocast, which would round the factors of its products to half precision."""

    @functools.wraps(function)
    def exactly(*args):
        if not autocasting():
            return function(*args)
        with without_autocast():
            return function(*args)

    return exactly


def register(
    schema: str,
    *,
    reference: Callable,
    triton: str | None = None,
    cuda: bool = False,
    prefer: Callable[..., Sequence[str]] | None = None,
    composition: Callable | None = None,
    parts: Sequence["Op"] = (),
    meta: Callable | None = None,
    shared: Callable[..., int] | None = None,
) -> "Op":
    """Define `schema` and return its handle.

    `triton` names the launcher as `<module>.<function>` below `ivfast.kernels`. `cuda` declares a CUDA C++ kernel in
    csrc/cuda. `prefer(*args)` orders the two by shape (default: Triton, then CUDA C++, then the reference).
    `composition` computes the op from `parts`, other ops that have kernels; every device runs it. `meta` gives the
    shapes where the reference would fix the sizes of fake tensors. `shared(*args)`, for a CUDA C++ kernel that not all
    GPUs can run at every shape, is how many bytes of shared memory a block needs; elsewhere the next implementation
    serves.
    """
    name, _, signature = schema.partition("(")
    reference, composition = exact(reference), composition and exact(composition)
    _library.define(schema)
    _library.impl(name, composition or reference, "CompositeExplicitAutograd")
    if composition or meta:  # a loop over chunks, for one, would fix the sizes of fake tensors
        _library.impl(name, meta or reference, "Meta")
    prefer = prefer or (lambda *args: ("triton", "cuda"))
    op = OPS[name] = Op(name, reference, triton, cuda, prefer, composition, parts, shared)
    for overload, kernel in (("triton", triton), ("cuda", cuda)):
        if kernel or parts:
            _library.define(f"{name}.{overload}({signature}")
            _library.impl(f"{name}.{overload}", meta or reference, "Meta")
        if composition and parts:
            _library.impl(f"{name}.{overload}", use(overload)(composition), "CompositeExplicitAutograd")
    if triton:
        _library.impl(f"{name}.triton", op.launch_triton, "CompositeExplicitAutograd")
    if triton or cuda:
        _library.impl(name, op.on_cuda, "CUDA")
    return op


class Op:
    """Handle of one operator; it calls the dispatcher or the implementation that `use` forces."""

    def __init__(self, name: str, reference, triton, cuda, prefer, composition, parts, shared):
        self.name, self.reference, self.triton, self.cuda, self.prefer = name, reference, triton, cuda, prefer
        self.composition, self.parts, self.shared = composition, parts, shared
        self.default = getattr(torch.ops.ivfast, name).default
        self._served: dict[tuple[str, int | None], bool] = {}

    def __call__(self, *args):
        implementation = forced()
        if implementation is None:
            return self.default(*args)
        device = next(a for a in args if isinstance(a, torch.Tensor)).device
        if device.type == "meta":
            return self.default(*args)  # nothing but shapes, which all implementations share
        missing = self.missing(implementation, device.type, device.index)
        if missing:
            raise RuntimeError(f"{self.name} has no {implementation!r} implementation here: {missing}")
        return self.implementation(implementation)(*args)

    def on_cuda(self, *args):
        """The best implementation available for these CUDA tensors on their device."""
        index = next(a for a in args if isinstance(a, torch.Tensor)).device.index
        for name in self.prefer(*args):
            served = self._served.get((name, index))
            if served is None:
                served = self._served[name, index] = not self.missing(name, "cuda", index)
            if served and name == "cuda" and self.shared is not None:
                served = self.shared(*args) <= _devices.shared_memory(index)
            if served:
                return self.launch_triton(*args) if name == "triton" else self.implementation(name)(*args)
        return self.reference(*args)

    def implementation(self, name: str) -> Callable:
        """What `use` forces; for a composition, the composition itself, whose parts are forced one by one."""
        if name == "reference":
            return self.reference
        return self.default if name == "cpu" else getattr(getattr(torch.ops.ivfast, self.name), name)

    def launch_triton(self, *args):
        with torch.cuda.device_of(next(a for a in args if isinstance(a, torch.Tensor))):
            return self._launcher(*args)

    @functools.cached_property
    def _launcher(self):
        module, function = self.triton.split(".")
        return exact(getattr(importlib.import_module(f"ivfast.kernels.{module}"), function))

    def missing(self, name: str, device: str, index: int | None = None) -> str | None:
        """Why implementation `name` cannot run on `device`, for CUDA on GPU `index`; None if it can."""
        if name == "reference":
            return None
        if self.parts:
            reasons = (part.missing(name, device, index) for part in self.parts)
            return next((reason for reason in reasons if reason), None)
        if name == "cpu":
            if device != "cpu":
                return f"the C++ kernel serves CPU tensors, not {device}"
            return None if self._has_kernel(self.name, "CPU") else _no_kernel(self.name, "_C", "C++")
        if name == "triton":
            if self.triton is None:
                return f"{self.name} has no Triton kernel"
            if importlib.util.find_spec("triton") is None:
                return "the package triton is not installed"
            if os.environ.get("TRITON_INTERPRET") == "1":
                return None
            return _devices.unserved(name, index) if device == "cuda" else f"Triton does not run on {device} tensors"
        if not self.cuda:
            return f"{self.name} has no CUDA C++ kernel"
        key = {"cuda": "CUDA", "cpu": "CPU"}.get(device)  # CPU: the shim of tests/simt
        if key and self._has_kernel(f"{self.name}.cuda", key):
            return _devices.unserved(name, index) if key == "CUDA" else None
        return (
            _no_kernel(self.name, "_cuda", "CUDA C++")
            if key == "CUDA"
            else f"CUDA C++ does not run on {device} tensors"
        )

    @staticmethod
    def _has_kernel(name: str, key: str) -> bool:
        return has_kernel(f"ivfast::{name}", key)


EXTENSION_ERRORS: dict[str, str] = {}
INSTRUCTION_SETS = ("generic", "avx2", "avx512")


def load_extensions() -> None:
    """Load the compiled modules of csrc, CPU and CUDA separately, and record why a missing one is missing.

    The environment variable IVFAST_ISA, one of `INSTRUCTION_SETS`, restricts the C++ kernels to an older instruction
    set than this CPU has, for tests. Requesting one that the CPU does not have is an error.
    """
    for module in ("_C", "_cuda"):
        try:
            importlib.import_module(f"ivfast.{module}")
        except ImportError as error:  # noqa: PERF203
            EXTENSION_ERRORS[module] = str(error)
    wanted = os.environ.get("IVFAST_ISA")
    if wanted and "_C" not in EXTENSION_ERRORS:
        try:
            instruction_set(wanted)
        except ValueError as error:
            raise ValueError(f"IVFAST_ISA: {error}") from None


def instruction_set(wanted: str | None = None) -> str:
    """Return the instruction set that the C++ kernels use, after switching to `wanted` if it is given.

    Raises:
        ValueError: this CPU does not have `wanted`.
    """
    choose = ctypes.CDLL(importlib.import_module("ivfast._C").__file__).ivfast_isa
    if wanted is not None and wanted not in INSTRUCTION_SETS:
        raise ValueError(f"the instruction set must be one of {', '.join(INSTRUCTION_SETS)}, got {wanted!r}")
    index = -1 if wanted is None else INSTRUCTION_SETS.index(wanted)
    found = INSTRUCTION_SETS[choose(index)]
    if wanted not in (None, found):
        raise ValueError(f"this CPU does not have {wanted}; the most it has is {found}")
    return found


def _no_kernel(name: str, module: str, language: str) -> str:
    if module in EXTENSION_ERRORS:
        return f"the extension ivfast.{module} is not available ({EXTENSION_ERRORS[module]})"
    return f"{name} has no {language} kernel"
