"""Derivatives of every order and mode for an op whose first reverse derivative is computed by a kernel.

The backward kernel computes G(g, x), the gradient of ⟨g, f(x)⟩, which is linear in g. Therefore

    forward mode is the transpose of g ↦ G(g, x), and
    the second derivative is that of G in g and x.

Both differentiate the reference of G, which is plain PyTorch, so higher orders follow. They hold what the reference
holds: O(n²) for the pairwise ops. `vmap` moves its dimension to the front, where ops have their leading dimensions.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import Function

from .._registry import exact, forced
from .._torch import alive, every_forward_level, only_mapped, primal, transformed, uncompiled

Gradients = Sequence[Tensor | None]


class Rule(NamedTuple):
    """How an op is differentiated. The op's arguments are tensors (or None) followed by constants."""

    op: Any  # computes all outputs, with its `reference`
    gradients: Callable[..., Gradients]  # (backward, grads, inputs, outputs, needed) -> one or None for each tensor
    tensors: int  # how many of the arguments are tensors
    backward: Any = None  # the op of the first derivative, with its `reference`; None if `gradients` needs none
    pull: Callable[..., Gradients] | None = None  # (grads, inputs, needed): G in plain PyTorch, if not by references
    outputs: int = 1  # how many outputs the op has
    values: int = 1  # how many of them, the first ones, are results
    kept: slice = slice(None)  # the tensors among the arguments that G depends on
    saved: slice = slice(0)  # the outputs that `gradients` uses
    flags: int = 0  # how many last arguments ask for gradients: of each of the first tensors, or a single one for all
    axes: tuple[int | None, ...] = ()  # the first leading dimension of each tensor, if it is not 0; None: it has none
    out_axes: tuple[int, ...] = ()  # the same for the outputs
    fold: bool = False  # a batch is folded into the first dimension, because the op has no leading dimensions

    def compute(self, inputs: Sequence, needed: Sequence[bool]) -> tuple[Tensor, ...]:
        """All outputs, with the gradients that are needed where the op computes them together."""
        flags = tuple(needed[: self.flags]) if self.flags != 1 else (any(needed),)
        found = self.op(*inputs, *flags)
        return (found,) if self.outputs == 1 else found

    def smooth(self, grads: Sequence, inputs: Sequence, needed: Sequence[bool]) -> Gradients:
        """G in plain PyTorch, differentiable in `grads` and `inputs`."""
        if self.pull is not None:
            return self.pull(grads, inputs, needed)
        outputs: Sequence = ()
        if self.saved != slice(0):
            outputs = self.op.reference(*inputs, *[x is not None for x in inputs[: self.flags]])[self.saved]
        return self.gradients(self.backward and self.backward.reference, grads, inputs, outputs, needed)

    def split(self, arguments: Sequence) -> tuple[Sequence, Sequence, Sequence, Sequence[bool]]:
        """The arguments of `_second`'s Function: grads, inputs, outputs and needed."""
        *arguments, needed = arguments
        first = self.values
        second = first + len(range(self.tensors)[self.kept])
        third = second + len(range(self.outputs)[self.saved])
        inputs = *arguments[first:second], *arguments[third:]
        return arguments[:first], inputs, arguments[second:third], needed

    def pulled(self, ctx, grads: Sequence, tensors: Sequence, second: type[Function], again: bool) -> tuple:
        """The first derivative; if it may be differentiated again, through a Function of its own."""
        needed, nones = ctx.needs_input_grad[: self.tensors], (None,) * len(ctx.constants)
        if all(g is None for g in grads):
            return *(None,) * self.tensors, *nones
        if again:
            return *second.apply(*grads, *tensors, *ctx.constants, needed), *nones
        kept = len(range(self.tensors)[self.kept])
        inputs = *tensors[:kept], *ctx.constants
        return *self.gradients(self.backward, grads, inputs, tensors[kept:], needed), *nones

    def batched(self, function: type[Function], info, dims: Sequence, arguments: Sequence, axes, out_axes):
        """Apply `function` with the mapped dimension in front of the op's leading dimensions."""

        def placed(x, dim, axis):
            if not isinstance(x, Tensor) or axis is None:
                return x
            if dim is None:
                x = x.unsqueeze(axis).expand(*x.shape[:axis], info.batch_size, *x.shape[axis:])
            else:
                x = x.movedim(dim, axis)
            return x.flatten(0, 1) if self.fold else x

        constants = [None] * (len(arguments) - len(axes))
        results = function.apply(*map(placed, arguments, dims, (*axes, *constants)))
        if self.fold:
            first, dim = next((x, dim) for x, dim in zip(arguments, dims, strict=True) if isinstance(x, Tensor))
            rows = first.shape[0] if dim is None else first.movedim(dim, 0).shape[1]  # -1 is unknown in an empty batch
            results = tuple(x if x is None else x.view(info.batch_size, rows, *x.shape[1:]) for x in results)
        return results, tuple(None if x is None else axis for x, axis in zip(results, out_axes, strict=True))


CALLS: list[Callable] = []  # every op's `call`, which is what its node in a graph stands for


def _opaque(place: int, implementation: str | None, active: bool, *inputs):
    """An op as Dynamo sees it: one node, which has all the derivatives that the op has outside `torch.compile`.

    A compiler that traces the node, as AOTAutograd does, traces the implementation that `ivfast.use` forces then. As an
    argument it is guarded, so the graph serves no other.
    """
    return CALLS[place](active, *inputs)


def _register(_) -> None:
    torch._dynamo.allow_in_graph(_opaque)


def differentiable(
    op: Callable, gradients: Callable[..., Gradients], *, first: Callable | None = None, **rule
) -> Callable:
    """The results of `op` as a function of its arguments (without flags), with derivatives of every order and mode.

    `first(rule, second)` makes the Function of the first reverse derivative if the usual one does not fit; other
    keywords are the fields of `Rule`.
    """
    its = Rule(op, gradients, **rule)
    its = its._replace(axes=its.axes or (0,) * its.tensors, out_axes=its.out_axes or (0,) * its.outputs)
    second = _second(its)
    quick, every, values_alone = (first or _first)(its, second), _every(its, second), _values_alone(its)
    tensors, values, flags = its.tensors, its.values, (False,) * its.flags
    alone, one = its.outputs == 1, its.values == 1

    @uncompiled
    def call(active, *inputs):
        if active:
            inputs = alive(inputs)
            given = [x for x in inputs[:tensors] if x is not None]
            found = (values_alone if flags and only_mapped(given) else every).apply(*inputs)
            return found[0] if one else found[:values]
        if torch.is_grad_enabled():
            for x in inputs[:tensors]:
                if x is not None and x.requires_grad:
                    return quick.apply(*inputs)
        found = op(*inputs, *flags)  # a Function costs 2 µs
        return found if alone else found[0] if one else found[:values]

    place = len(CALLS)
    CALLS.append(call)

    def differentiated(*inputs):
        if not torch.compiler.is_compiling():
            return call(transformed(), *inputs)
        from torch._dynamo.comptime import comptime  # slow to import, but Dynamo has done so

        comptime(_register)  # while Dynamo traces; otherwise it does nothing
        return _opaque(place, forced(), transformed(), *inputs)

    return differentiated


def _first(rule: Rule, second: type[Function]) -> type[Function]:
    """Results and the first reverse derivative, at the least cost."""

    @uncompiled
    class First(Function):
        @staticmethod
        def forward(ctx, *inputs):
            found = rule.compute(inputs, ctx.needs_input_grad)
            ctx.save_for_backward(*inputs[: rule.tensors][rule.kept], *found[rule.saved])
            ctx.constants = inputs[rule.tensors :]
            if rule.values == 1:
                return found[0]
            ctx.set_materialize_grads(False)  # a result without a gradient costs nothing
            return found[: rule.values]

        @staticmethod
        def backward(ctx, *grads):
            return rule.pulled(ctx, grads, ctx.saved_tensors, second, torch.is_grad_enabled() or transformed())

    return First


def _every(rule: Rule, second: type[Function]) -> type[Function]:
    """The same for the transforms of torch.func and for forward mode."""

    @uncompiled
    class Every(Function):
        @staticmethod
        def forward(*inputs):
            return tuple(rule.compute(inputs, [x is not None for x in inputs[: rule.tensors]]))

        @staticmethod
        def setup_context(ctx, inputs, outputs):
            kept = inputs[: rule.tensors][rule.kept]
            ctx.save_for_backward(*kept, *outputs[rule.saved])
            ctx.save_for_forward(*kept, *outputs[: rule.values])
            ctx.constants = inputs[rule.tensors :]
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*outputs[rule.values :])

        @staticmethod
        def backward(ctx, *grads):
            found = alive((*grads[: rule.values], *ctx.saved_tensors))  # the level of some may have ended
            return rule.pulled(ctx, found[: rule.values], found[rule.values :], second, True)

        @staticmethod
        @exact
        def jvp(ctx, *tangents):
            tangents, saved = tangents[: rule.tensors], _primals(ctx)
            inputs, results = (*saved[: -rule.values], *ctx.constants), saved[-rule.values :]
            given = [t is not None for t in tangents]

            def pull(*grads):
                found = zip(rule.smooth(grads, inputs, given), tangents, strict=True)
                return tuple(torch.zeros_like(t) if x is None else x for x, t in found if t is not None)

            with every_forward_level():  # of which some may be outer ones
                found = _transposed(pull, results, [t for t in tangents if t is not None])
            return *found, *(None,) * (rule.outputs - rule.values)

        @staticmethod
        def vmap(info, dims, *inputs):
            return rule.batched(Every, info, dims, inputs, rule.axes, rule.out_axes)

    return Every


def _values_alone(rule: Rule) -> type[Function]:
    """The results under `vmap`; a derivative is an error."""

    @uncompiled
    class Values(Function):
        @staticmethod
        def forward(*inputs):
            return tuple(rule.compute(inputs, (False,) * rule.tensors))

        @staticmethod
        def setup_context(ctx, inputs, outputs):
            pass

        @staticmethod
        def vmap(info, dims, *inputs):
            return rule.batched(Values, info, dims, inputs, rule.axes, rule.out_axes)

    return Values


def _second(rule: Rule) -> type[Function]:
    """G as a Function: computed by the kernel, differentiated through the reference."""

    @uncompiled
    class Second(Function):
        @staticmethod
        def forward(*arguments):
            grads, inputs, outputs, needed = rule.split(arguments)
            return tuple(rule.gradients(rule.backward, grads, inputs, outputs, needed))

        @staticmethod
        def setup_context(ctx, arguments, found):
            ctx.places = [i for i, x in enumerate(arguments) if isinstance(x, Tensor)]
            ctx.others = [None if isinstance(x, Tensor) else x for x in arguments]
            ctx.found = [i for i, x in enumerate(found) if x is not None]
            tensors = [arguments[i] for i in ctx.places]
            ctx.save_for_backward(*tensors)
            ctx.save_for_forward(*tensors)
            ctx.set_materialize_grads(False)

        @staticmethod
        def function(ctx, tensors, places, wanted):
            """G as a function of the arguments at `places` alone, and their values."""
            arguments = list(ctx.others)
            for i, x in zip(ctx.places, tensors, strict=True):
                arguments[i] = x

            def pull(*primals):
                replaced = dict(zip(places, primals, strict=True))
                grads, inputs, _, needed = rule.split([replaced.get(i, x) for i, x in enumerate(arguments)])
                found = rule.smooth(grads, inputs, needed)
                return tuple(found[i] for i in wanted)

            return pull, [arguments[i] for i in places]

        @staticmethod
        @exact
        def backward(ctx, *cotangents):
            places = [i for i in _variables(rule) if ctx.needs_input_grad[i]]
            wanted = [i for i, c in enumerate(cotangents) if c is not None]
            result: list[Tensor | None] = [None] * len(ctx.others)
            if places and wanted:
                pull, primals = Second.function(ctx, alive(ctx.saved_tensors), places, wanted)
                _, transpose = torch.func.vjp(pull, *primals)
                for i, x in zip(places, transpose(tuple(cotangents[i] for i in wanted)), strict=True):
                    result[i] = x
            return tuple(result)

        @staticmethod
        @exact
        def jvp(ctx, *tangents):
            places = [i for i in _variables(rule) if tangents[i] is not None]
            with every_forward_level():  # as above
                pull, primals = Second.function(ctx, _primals(ctx), places, ctx.found)
                slopes = _transposed(
                    lambda *cotangents: torch.func.vjp(pull, *primals)[1](cotangents),
                    pull(*primals),
                    [tangents[i] for i in places],
                )
            found = dict(zip(ctx.found, slopes, strict=True))
            return tuple(found.get(i) for i in range(rule.tensors))

        @staticmethod
        def vmap(info, dims, *arguments):
            kept, saved = rule.axes[rule.kept], rule.out_axes[rule.saved]
            axes = *rule.out_axes[: rule.values], *kept, *saved
            return rule.batched(Second, info, dims, arguments, axes, rule.axes)

    return Second


def _variables(rule: Rule) -> range:
    """Where the arguments of `_second`'s Function are that G is differentiated in."""
    return range(rule.values + len(range(rule.tensors)[rule.kept]))


def _transposed(linear: Callable, like: Sequence[Tensor], x: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The transpose of a linear function, whose arguments are `like`, applied to x."""
    return torch.func.vjp(linear, *map(torch.zeros_like, like))[1](tuple(x))


def _primals(ctx) -> list[Tensor | None]:
    """The saved tensors without their tangents, which PyTorch hands to a custom rule separately."""
    return [x if x is None else primal(x) for x in alive(ctx.saved_tensors)]
