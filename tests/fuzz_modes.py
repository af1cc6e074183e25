"""The modes in which the fuzz calls a function of tensors: without a gradient, by orders of derivatives, over a batch.

Each returns a list of tensors, for the op as for its formula.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Results = list[Tensor]


def cotangents(out: Sequence[Tensor], seed: int) -> Results:
    """Random quarters, which every dtype holds."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(-8, 9, o.shape, generator=generator).to(o.dtype) / 4 for o in out]


def weighted(function, seed):
    """Σ ⟨c, f(x)⟩ with random c."""

    def total(*x):
        out = function(*x)
        return sum((o * c).sum() for o, c in zip(out, cotangents(out, seed), strict=True))

    return total


def pulled(out, leaves, weights, **graph) -> Results:
    """The gradients of Σ ⟨weights, out⟩; 0 where there are none."""
    pairs = [(o, w) for o, w in zip(out, weights, strict=True) if o.requires_grad]
    if not pairs:
        return [torch.zeros_like(x) for x in leaves]
    out, weights = zip(*pairs, strict=True)
    return list(torch.autograd.grad(out, leaves, weights, allow_unused=True, materialize_grads=True, **graph))


def gradient(function, x, seed):
    leaves = [a.detach().requires_grad_() for a in x]
    out = function(*leaves)
    return [*(o.detach() for o in out), *pulled(out, leaves, cotangents(out, seed))]


def twice(function, x, directions, weights_of, in_weights=True):
    """The results, and the derivatives of ⟨t, gradient⟩ in the arguments and, `in_weights`, in the cotangents."""
    leaves = [a.detach().requires_grad_() for a in x]
    out = function(*leaves)
    weights = [w.requires_grad_(in_weights) for w in weights_of(out)]
    first = pulled(out, leaves, weights, create_graph=True)
    slope = sum((g * t).sum() for g, t in zip(first, directions, strict=True))
    found = pulled([slope], [*leaves, *weights] if in_weights else leaves, [torch.ones_like(slope)])
    return [o.detach() for o in out], found[: len(leaves)], found[len(leaves) :]


def double(function, x, seed):
    _, in_x, in_weights = twice(function, x, cotangents(x, seed + 1), lambda out: cotangents(out, seed))
    return [*in_x, *in_weights]


def forward_mode(function, x, seed):
    x = tuple(a.detach().clone() for a in x)  # PyTorch takes no dual number whose elements share memory
    value, tangent = torch.func.jvp(lambda *x: tuple(function(*x)), x, tuple(cotangents(x, seed)))
    return [*value, *tangent]


def forward_over_reverse(function, x, seed):
    """The derivative of the gradient in one direction."""
    x = tuple(a.detach().clone() for a in x)
    gradients = torch.func.grad(weighted(function, seed), tuple(range(len(x))))
    return list(torch.func.jvp(gradients, x, tuple(cotangents(x, seed + 1)))[1])


def reverse_over_reverse(function, x, seed):
    return twice(function, x, cotangents(x, seed + 1), lambda out: cotangents(out, seed), in_weights=False)[1]


def transposed_twice(function, x, seed):
    """What forward mode gives, by reverse mode: J t is the derivative of ⟨Jᵀ w, t⟩ in w."""
    out, _, tangent = twice(function, x, cotangents(x, seed), lambda out: [torch.zeros_like(o) for o in out])
    return [*out, *tangent]


def function_gradient(function, x, seed):
    return list(torch.func.grad(weighted(function, seed), tuple(range(len(x))))(*x))


def slope(function, count, seed):
    """The gradients in the first `count` arguments, as a function, which maps over sets: those of each sample."""

    def gradients(*x):
        total = weighted(lambda *tensors: function(*tensors, *x[count:]), seed)
        return torch.func.grad(total, tuple(range(count)))(*x[:count])

    return gradients


def without_gradient(function, x, seed):
    with torch.no_grad():
        return list(function(*(a.detach().requires_grad_() for a in x)))


def inference(function, x, seed):
    with torch.inference_mode():
        return [o.clone() for o in function(*x)]


def value(function, x, seed):
    return [o.detach() for o in function(*(a.detach().requires_grad_() for a in x))]


VALUES = {"value": value, "no_grad": without_gradient, "inference": inference}
FIRST = {"gradient": gradient, "grad": function_gradient}
# forward mode takes second derivatives, too
SECOND = {"double": double, "jvp": forward_mode, "jvp of grad": forward_over_reverse}
MODES = VALUES | FIRST | SECOND
# noise that a dispatch mode adds does not reach into forward mode
OF_FORMULA = {"jvp": transposed_twice, "jvp of grad": reverse_over_reverse}


def mixed(x: Results, rng) -> Results:
    """One of the tensors in a wider dtype: in a narrower one, distances that differ might not."""
    place = rng.randrange(len(x))
    half = x[place].dtype in (torch.bfloat16, torch.float16)
    wider = rng.choice((torch.float32, torch.float64)) if half else torch.float64
    return [a.to(wider) if i == place else a for i, a in enumerate(x)]


def halves(x: Tensor) -> list[Tensor]:
    """Two tensors to map over: x, and half of it, which every op takes."""
    return [x, x * 0.5 if x.is_floating_point() else x.flip(0)]


class Mapped(NamedTuple):
    """An op under vmap, and its formula for one set after the other."""

    op: Callable
    formula: Callable
    x: Results
    dims: list[int | None]


def mapped(op, formula, x, rng) -> Mapped:
    """Any dimension of any argument may be mapped."""
    dims = [rng.choice((*range(a.dim() + 1), None)) for a in x]
    dims[0] = dims[0] or 0
    x = [a if d is None else torch.stack(halves(a), d) for a, d in zip(x, dims, strict=True)]
    return Mapped(torch.func.vmap(op, tuple(dims), randomness="same"), one_by_one(formula, dims), x, dims)


def one_by_one(formula, dims):
    def each(*x):
        found = [formula(*(a if d is None else a.select(d, i) for a, d in zip(x, dims, strict=True))) for i in range(2)]
        return tuple(torch.stack(o) for o in zip(*found, strict=True))

    return each


def parts(formula, x, dims, count, seed) -> Results:
    """The results of `gradient`, with Σ |g| over the sets for an argument that they share: its gradient is their sum, and
    each of them is rounded to the argument's dtype."""
    apart = [torch.stack((a, a)) if d is None else a for a, d in zip(x, dims, strict=True)]
    each = one_by_one(formula, [0 if d is None else d for d in dims])
    found = gradient(lambda *x: each(*x, *apart[count:]), apart[:count], seed)
    first = len(found) - count
    return [a.abs().sum(0) if i >= first and dims[i - first] is None else a.abs() for i, a in enumerate(found)]
