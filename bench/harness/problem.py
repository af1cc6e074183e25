"""What a benchmark is: an op's problem, and the providers that compute it, each in its own way."""

import contextlib
import functools
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import ivfast
from ivfast import testing
from ivfast._registry import OPS

FORWARD, BACKWARD = "forward", "forward+backward"
Size = tuple[int, ...]
Call = Callable[[], tuple]  # its output; with a backward pass also the gradients; in whatever arrays the provider has
Exact = list[tuple[Tensor | slice, Tensor]]  # per output and gradient: the rows to compare, and what they must be


def label(size: Size) -> str:
    return "x".join(map(str, size))


Cotangent = Tensor | tuple[Tensor, ...]  # of one output, or of several


def several(x: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (x,) if isinstance(x, Tensor) else tuple(x)


def bind_torch(function: Callable, tensors: Sequence[Tensor], cotangent: Cotangent | None) -> Call:
    """One call of `function`, with its gradients where there is a cotangent."""
    if cotangent is None:
        return lambda: several(function(*tensors))
    leaves = [x.detach().clone().requires_grad_() for x in tensors]

    def call():
        out = several(function(*leaves))
        return (*(o.detach() for o in out), *torch.autograd.grad(out, leaves, cotangent))

    return call


class _Empty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, like):
        ctx.save_for_backward(x)
        return torch.empty_like(like)

    @staticmethod
    def backward(ctx, grad):
        return torch.empty_like(*ctx.saved_tensors), None


def bind_empty(function: Callable, tensors: Sequence[Tensor], cotangent: Cotangent | None) -> Call:
    """An autograd Function that saves a tensor and computes nothing, for the first output and input."""
    like = several(cotangent)[0]
    return bind_torch(lambda x: _Empty.apply(x, like), tensors[:1], like)


@dataclass(frozen=True)
class Provider:
    """One way to compute a problem.

    `squares` and `cubes` count the n × n and n × n × d arrays alive at once, forward and with the backward pass: what
    does not fit is known beforehand. `compiles` says that a first call measures a compiler.
    """

    name: str
    function: Callable
    kind: str = "peer"  # "ivfast", "implementation" (one of ivfast's, forced), "peer", or "floor": it computes nothing
    implementation: str | None = None
    packages: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")
    bind: Callable[[Callable, Sequence[Tensor], Cotangent | None], Call] = bind_torch
    squares: tuple[float, float] = (0, 0)
    cubes: tuple[float, float] = (0, 0)
    compiles: bool = False
    tolerance: float | None = None  # in place of the problem's, with its reason beside it

    def missing(self, device: str) -> str | None:
        """Why it cannot be had here, whatever the size."""
        for package in self.packages:
            if importlib.util.find_spec(package) is None:
                return f"the package {package} is not installed (pip install 'ivfast[bench]')"
        return None if device in self.devices else f"it is timed on {' and '.join(self.devices)} tensors alone"

    def forced(self):
        return ivfast.use(self.implementation) if self.implementation else contextlib.nullcontext()

    def needs(self, size: Size, what: str, dtype: torch.dtype) -> float:
        """Bytes of its large arrays."""
        back, pairs = what == BACKWARD, math.prod(size[:-1]) * size[-2]
        return pairs * dtype.itemsize * (self.squares[back] + self.cubes[back] * size[-1])


FLOOR = Provider("empty Function", lambda *tensors: None, "floor", bind=bind_empty)


@dataclass(frozen=True)
class Problem:
    """An op on given sizes."""

    op: str  # its name in ivfast and in the registry; behind a space, a second form of it
    axes: str  # of a size, such as "n×d"
    sizes: tuple[Size, ...]
    draw: Callable[[Size], tuple[Tensor, ...]]  # float32, all differentiable
    output: Callable[[Size], Size | tuple[Size, ...]]  # its shape, or those of several outputs
    function: Callable  # the op on what was drawn
    peers: tuple[Provider, ...]
    work: Callable[[Size, str], float] = lambda size, what: 0  # the least flop of a call, by size and pass
    long_sizes: tuple[Size, ...] = ()
    gpu_sizes: tuple[Size, ...] = ()
    passes: tuple[str, ...] = (FORWARD, BACKWARD)
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)  # the first on a CPU, all on a GPU
    # float32 sums in another order: four digits say that it is the same function
    tolerance: float = 1e-4
    # what every provider draws for itself when it is timed, given by keyword when it is checked
    constants: Callable[[Size], Mapping[str, Tensor]] = lambda size: {}
    squares: tuple[float, float] = (0, 0)  # of ivfast's reference, as a provider's
    # in place of the whole reference in float64 where that is too much
    exact: Callable[[Sequence[Tensor], Tensor | None], Exact | None] = lambda tensors, cotangent: None

    def providers(self, device: str, implementations: Sequence[str] | None = None) -> list[Provider]:
        """ivfast as it comes, its other implementations for this device, and the peers."""
        ours = [Provider("ivfast", self.function, "ivfast", squares=self._squares(self.served(device)))]
        for name in implementations or {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}[device]:
            if (device, name) == ("cpu", self.served(device)):
                continue  # that is ivfast as it comes
            ours.append(Provider(f"ivfast:{name}", self.function, "implementation", name, squares=self._squares(name)))
        return [*ours, *self.peers]

    def served(self, device: str) -> str:
        """What ivfast takes by itself; on a GPU the shape chooses where two are named."""
        candidates = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}[device]
        return " or ".join(n for n in candidates if self.unserved(n, device) is None) or "reference"

    def unserved(self, implementation: str | None, device: str) -> str | None:
        """Why one of ivfast's implementations does not serve the op or its backward pass on this device."""
        op = self.op.split()[0]
        names = [op, f"{op}_backward"] if BACKWARD in self.passes else [op]
        reasons = (OPS[name].missing(implementation, device) for name in names if implementation and name in OPS)
        return next(filter(None, reasons), None)

    def missing(self, provider: Provider, device: str) -> str | None:
        return provider.missing(device) or self.unserved(provider.implementation, device)

    def _squares(self, implementation: str) -> tuple[float, float]:
        return self.squares if implementation == "reference" else (0, 0)


def _nested(shapes) -> bool:
    return bool(shapes) and isinstance(shapes[0], tuple)


class Instance:
    """A problem of one size, drawn, and what is right about it."""

    def __init__(self, problem: Problem, size: Size, dtype: torch.dtype, device: str):
        self.problem, self.size, self.dtype, self.device = problem, size, dtype, device
        self.tensors = [x.to(device, dtype) for x in problem.draw(size)]
        self.constants = {name: x.to(device, dtype) for name, x in problem.constants(size).items()}
        shapes = problem.output(size)
        draws = [torch.randn(shape).to(device, dtype) for shape in (shapes if _nested(shapes) else (shapes,))]
        self.cotangent = tuple(draws) if _nested(shapes) else draws[0]

    def bind(self, provider: Provider, what: str, *, constants: bool = False) -> Call:
        function = functools.partial(provider.function, **self.constants) if constants else provider.function
        return provider.bind(function, self.tensors, self.cotangent if what == BACKWARD else None)

    @functools.cached_property
    def exact(self) -> Exact:
        tensors = [x.double() for x in self.tensors]
        constants = {name: x.double() for name, x in self.constants.items()}
        cotangent = None
        if BACKWARD in self.problem.passes:
            drawn = self.cotangent
            cotangent = drawn.double() if isinstance(drawn, Tensor) else tuple(x.double() for x in drawn)
        part = self.problem.exact(tensors, cotangent)
        if part is not None:
            return part
        with ivfast.use("reference"):
            call = bind_torch(functools.partial(self.problem.function, **constants), tensors, cotangent)
            return [(slice(None) if x.dim() else ..., x) for x in call()]

    def error(self, results: Sequence) -> float:
        """The largest error of any output or gradient, each over the largest value of its own."""
        arrays = [x if isinstance(x, Tensor) else torch.from_numpy(np.array(x)) for x in results]
        expected = self.exact[: len(arrays)]
        if any(x.shape[1:] != e.shape[1:] for x, (_, e) in zip(arrays, expected, strict=True)):
            return math.inf
        return max(testing.error(x[rows].cpu(), e.cpu()) for x, (rows, e) in zip(arrays, expected, strict=True))

    def allowed(self, provider: Provider) -> float:
        return max(provider.tolerance or self.problem.tolerance, testing.TOLERANCES[self.dtype])

    def bytes(self, what: str) -> float:
        """The least traffic: inputs read and output written once; with gradients, these and the cotangent too."""
        inputs, output = sum(x.nbytes for x in self.tensors), sum(x.nbytes for x in several(self.cotangent))
        return inputs + output if what == FORWARD else 3 * inputs + 2 * output
