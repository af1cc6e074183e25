"""One set of random arguments of an op, in one mode, against the op's formula.

An op is right if it errs by no more than rounding explains. That is measured, not guessed: the formula is evaluated a
few times with every arithmetic operation, and the arguments, changed at random by a unit in the last place of the
arithmetic that the op works in (Monte Carlo arithmetic: Parker 1997), forward and backward. What the results vary by is
what rounding does to this very set, cancellation and amplification included.
"""

import contextlib
import functools
import math
import random
from collections.abc import Callable, Iterator

import rounded
import torch
from fuzz_draw import Draw
from fuzz_modes import FIRST, MODES, OF_FORMULA, SECOND, VALUES, Results, mapped, mixed, parts, slope
from fuzz_sets import DRAWS, Set
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ivfast
from ivfast.testing import outputs

WORST = 16  # allowed error, in units of the largest variation of the formula's noisy evaluations
NOISY = (1, 8)  # so many evaluations, and so many more before an error counts
EPS64 = torch.finfo(torch.float64).eps
POOL = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
# the dtype that an op computes in; the others use float32 for half precision
ARITHMETIC: dict[str, Callable[[torch.dtype], torch.dtype]] = {
    **dict.fromkeys(
        ("frechet_distance", "frechet_distance_from_samples", "polar", "sqrtm_spd"), lambda _: torch.float64
    ),
    "linear_multi_js_loss": lambda dtype: dtype,  # logits are those of `F.linear`
}


class Noise(TorchDispatchMode):
    """Every arithmetic operation's result, times 1 + `size` ε with ε ~ N(0, 1)."""

    ROUNDED = frozenset(
        [
            "add",
            "sub",
            "rsub",
            "mul",
            "div",
            "pow",
            "sqrt",
            "rsqrt",
            "exp",
            "expm1",
            "log",
            "log1p",
            "logaddexp",
            "logsumexp",
            "sigmoid",
            "reciprocal",
            "sum",
            "mean",
            "mm",
            "bmm",
            "addmm",
            "baddbmm",
            "dot",
            "mv",
            "_softmax",
            "_linalg_solve_ex",
        ]
    )

    def __init__(self, size: float, seed: int):
        super().__init__()
        self.size, self.place = size, seed * 8191 % (len(POOL) // 2)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ not in self.ROUNDED:
            return result
        if isinstance(result, tuple):
            return (self.rounded(result[0]), *result[1:])
        return self.rounded(result)

    def rounded(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float64:
            return x
        noisy = torch.addcmul(x, x, self.noise(x), value=self.size)
        return torch.where(noisy.isnan(), x, noisy)  # ∞ − ∞

    def noise(self, x: Tensor) -> Tensor:
        """Standard normal numbers: a piece of the pool that no other operation of this evaluation has, if it is short."""
        count = x.numel()
        self.place = self.place + count if self.place + 2 * count < len(POOL) else count % 8191
        return POOL[self.place : self.place + count].view(x.shape)


def calls(case: Set) -> tuple[Callable, Callable]:
    """The op and its formula as functions of the tensors, and then the constants."""
    names = [*case.tensors, *case.constants]

    def op(*x):
        return outputs(case.op(**dict(zip(names, x, strict=True)), **case.options))

    def formula(*x):
        return outputs(case.formula(**dict(zip(names, x, strict=True)), **case.options))

    return op, formula


def exact(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def reach(x: Tensor) -> Tensor:
    """The largest distance of a number from its column's mean, per set."""
    if x.dim() < 2:
        return x.abs()
    return (x - x.mean(-2, keepdim=True)).abs().amax((-2, -1), keepdim=True)


def shaken(name: str, x: Results, size: float, noise: Noise) -> Results:
    """x with the rounding of its distances from its mean, in units of `size`."""
    if not all(a.numel() for a in x):
        return x
    sizes = [size * reach(a) for a in x]
    if name in ("GaussianStatistics", "fld"):  # which subtract means that are rounded to float64
        sizes = [min(size, 64 * EPS64) * a.abs().max() + s for a, s in zip(x, sizes, strict=True)]
    return [a + s * noise.noise(a) for a, s in zip(x, sizes, strict=True)]


@contextlib.contextmanager
def pairs_of_rows(stretch: float, eps: float, noise: Noise) -> Iterator[None]:
    """Kernels form distances by a Gram matrix, and sums of differences by sums of rows: in float64 if points are too far
    apart for float32 (csrc/README.md)."""

    def lever(x: Tensor, radius: Tensor, offset: Tensor, served: Tensor) -> Tensor:
        radius = radius + eps * offset  # a mean is rounded, too
        size = eps * torch.minimum(radius, served) + EPS64 * radius
        return stretch * size[..., None, None, None] * noise.noise(x)

    rounded.gram, rounded.lever = lambda x: stretch * EPS64 * noise.noise(x), lever
    try:
        yield
    finally:
        rounded.gram = rounded.lever = None


def variation(name, run, x, clean: Results, seeds: range, eps: float) -> list[float]:
    """What rounding in units of `eps` does to each result of run(x)."""
    stretch = 64 if eps < 1e-12 else 1  # so that float64's own rounding does not show
    spread = [0.0] * len(clean)
    for seed in seeds:
        noise = Noise(stretch * eps, seed)
        moved = shaken(name, x, stretch * eps, noise)
        with noise, pairs_of_rows(stretch, eps, noise):
            noisy = run(moved)
        for i, (a, b) in enumerate(zip(noisy, clean, strict=True)):
            if a.numel():
                spread[i] = max(spread[i], float((a - b).abs().nan_to_num(0).max()) / stretch)
    return spread


def largest(size: Tensor) -> float:
    return float(size.nan_to_num(0, 0, 0).max()) if size.numel() else 0.0


def allowance(ours: Tensor, size: float, most: float, spread: float) -> float:
    """The largest difference that rounding explains: in the arithmetic, of results of this size, and of results near 0
    beside others of size `most`, with which they share sums."""
    info = torch.finfo(ours.dtype)
    least = info.smallest_normal * (info.eps if ours.dtype == torch.float16 else 1)
    return WORST * spread + 2 * info.eps * size + 2 * least * max(1.0, most)


def ratio(ours: Tensor, exact: Tensor, size: Tensor, allowed: float) -> float:
    """The largest error in units of what is allowed; infinite for a wrong shape, or NaN in the wrong place."""
    if ours.shape != exact.shape:
        return math.inf
    if not exact.numel():
        return 0.0
    most = torch.finfo(ours.dtype).max
    ours, exact = ours.detach().double(), exact.detach()
    ours = torch.where((size > most) & ours.isnan(), exact, ours)  # ∞ − ∞
    if not torch.equal(ours.isnan(), exact.isnan()):
        return math.inf
    difference = (ours.clamp(-most, most) - exact.clamp(-most, most)).abs().nan_to_num(0)
    return float(difference.max()) / allowed


def errors(name: str, case: Set, mode: str, op, formula, x: Results, seed: int, dims=None) -> list[float]:
    """The error of each result in units of what is allowed; `dims` are those that are mapped."""
    count, run = len(case.tensors), MODES[mode]
    constants, precise = x[count:], [exact(a) for a in x]
    ours = run(lambda *x: op(*x, *constants), x[:count], seed)

    def of_formula(x):
        return OF_FORMULA.get(mode, run)(lambda *x: formula(*x, *precise[count:]), x, seed)

    arithmetic = ARITHMETIC.get(name, lambda dtype: torch.promote_types(dtype, torch.float32))(case.dtype)
    theirs = of_formula(precise[:count])
    if dims and mode == "gradient":
        sizes = parts(calls(case)[1], precise, dims, count, seed)
    else:
        sizes = [a.detach().abs() for a in theirs]
    scales = [largest(size) for size in sizes]
    most = max(scales, default=0.0)
    if mode in SECOND and case.dtype.itemsize == 2:  # whose parts PyTorch adds up in half precision
        scales = [most] * len(scales)
    first, found = seed, []
    for evaluations in NOISY:
        seeds = range(first, first + evaluations)
        spread = variation(name, of_formula, precise[:count], theirs, seeds, torch.finfo(arithmetic).eps)
        allowed = [allowance(a, size, most, s) for a, size, s in zip(ours, scales, spread, strict=True)]
        found = [ratio(*each) for each in zip(ours, theirs, sizes, allowed, strict=True)]
        if max(found, default=0.0) <= 1:
            break
        first += evaluations
    return found


def not_a_number(op, formula, x, count, rng) -> list[float]:
    """With a NaN somewhere in the first `count` arguments, NaN where the formula has it."""
    places = [i for i, a in enumerate(x[:count]) if a.numel()]
    if not places:
        return []
    place = rng.choice(places)
    x = list(x)
    x[place] = x[place].clone(memory_format=torch.contiguous_format)
    x[place].view(-1)[rng.randrange(x[place].numel())] = math.nan
    found = zip(op(*x), formula(*map(exact, x)), strict=True)
    return [0.0 if torch.equal(a.isnan(), b.isnan()) else math.inf for a, b in found]


def modes_of(case: Set) -> list[str]:
    modes = [*VALUES, "reference", "autocast", "mixed", "nan"] + ["vmap"] * case.maps
    if case.smooth:
        modes += [*FIRST, *FIRST] + ["vmap gradient", "vmap of grad"] * case.maps
        modes += SECOND if case.twice else ()
    return modes


def drawn(name: str, seed: int) -> tuple[Set, str, random.Random]:
    """The set of `seed`, its mode, and the random choices that the mode makes."""
    draw = Draw(seed)
    case = DRAWS[name](draw)
    return case, draw.choice(modes_of(case)), draw.random


def examine(name: str, seed: int) -> float:
    """The largest error of the set of `seed`, in units of what is allowed."""
    case, mode, rng = drawn(name, seed)
    op, formula = calls(case)
    x = [*case.tensors.values(), *case.constants.values()]
    before = [a.clone() for a in x]
    plain = "gradient" if case.smooth else "value"
    if mode == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = errors(name, case, plain, op, formula, x, seed)
    elif mode == "mixed":
        y = mixed(list(case.tensors.values()), rng)
        dtypes = [a.dtype for name, a in zip(case.tensors, y, strict=True) if name != "bandwidth"]  # which is converted
        case = case._replace(dtype=functools.reduce(torch.promote_types, dtypes))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = errors(name, case, plain, op, formula, [*y, *case.constants.values()], seed)
    elif mode == "nan":
        found = not_a_number(op, formula, x, len(case.tensors), rng)
    elif mode == "reference":
        with ivfast.use("reference"):
            found = errors(name, case, plain, op, formula, x, seed)
    elif mode.startswith("vmap"):
        if mode == "vmap of grad":
            op, formula = (slope(function, len(case.tensors), seed) for function in (op, formula))
        batched = mapped(op, formula, x, rng)
        plain = "gradient" if mode == "vmap gradient" else "value"
        found = errors(name, case, plain, batched.op, batched.formula, batched.x, seed, batched.dims)
    else:
        found = errors(name, case, mode, op, formula, x, seed)
    untouched = all(torch.equal(a, b) for a, b in zip(x, before, strict=True))
    return max(found, default=0.0) if untouched else math.inf


def described(name: str, seed: int) -> str:
    """The set of `seed`, for a message."""
    case, mode, _ = drawn(name, seed)
    tensors = {k: (tuple(v.shape), v.stride()) for k, v in (case.tensors | case.constants).items()}
    return f"{name}, seed {seed}, mode {mode}, {case.dtype}, {case.options}, shapes and strides {tensors}"
