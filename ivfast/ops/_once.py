"""First derivatives only: a second one is an error, at the cost of one comparison."""

import functools
from collections.abc import Callable

import torch

from .._torch import refused


def once_differentiable(backward: Callable) -> Callable:
    """Under `create_graph=True`, gradients that raise RuntimeError when they are differentiated.

    PyTorch's decorator of this name does so only where an incoming gradient has a graph of its own. Otherwise, as
    behind a plain loss, it returns gradients without a graph, and a gradient penalty adds nothing.
    """

    @functools.wraps(backward)
    def once(ctx, *grads):
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            found = backward(ctx, *grads)
        found = found if isinstance(found, tuple) else (found,)
        error = refused("a function that exchanges rows between ranks is differentiable only once", len(found))
        return error(*(x if x is None else x.detach().requires_grad_() for x in found))

    return once
