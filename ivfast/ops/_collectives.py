"""The collectives of `torch.distributed` that ivfast calls, under one name for every supported version of PyTorch.

PyTorch renames its collectives now and then and warns at each call of an old name. All tensor collectives go through
this module.
"""

import functools
from collections.abc import Callable, Sequence

import torch.distributed as dist
from torch import Tensor

# newest name first
_GATHER = ("all_gather_single", "all_gather_into_tensor")  # renamed in PyTorch 2.14
_SCATTER = ("reduce_scatter_single", "reduce_scatter_tensor")


def _present(names: Sequence[str]):
    """The function of torch.distributed with the first of these names that exists. None if there is none, as in a
    PyTorch built without distributed, where no group can exist either."""
    return next((getattr(dist, name) for name in names if hasattr(dist, name)), None)


_all_gather, _reduce_scatter = _present(_GATHER), _present(_SCATTER)


class LostRank(RuntimeError):
    """A collective failed in the network: another rank was killed, or cannot be reached."""


def _reporting(collective: Callable) -> Callable:
    @functools.wraps(collective)
    def reporting(*arguments, **keywords):
        try:
            return collective(*arguments, **keywords)
        except RuntimeError as error:
            raise LostRank(str(error).partition("\n")[0]) from error

    return reporting


@_reporting
def all_gather(table: Tensor, own: Tensor, group=None) -> None:
    """Fill `table` with the `own` tensors of all ranks, concatenated along the first dimension. All have the same
    shape."""
    _all_gather(table, own, group=group)


@_reporting
def reduce_scatter(own: Tensor, table: Tensor, group=None) -> None:
    """Sum the tables of all ranks, split the sum along the first dimension, and fill `own` with this rank's part."""
    _reduce_scatter(own, table, group=group)


@_reporting
def all_reduce(x: Tensor, operation: str = "SUM", group=None) -> None:
    """Replace x with the sum (or another `torch.distributed.ReduceOp`) of all ranks' x, bitwise equal on every rank."""
    dist.all_reduce(x, getattr(dist.ReduceOp, operation), group=group)


@_reporting
def exchange(operations: Sequence["dist.P2POp"]) -> list["dist.Work"]:
    """Start sends and receives together; pass the returned handles to `wait`."""
    return dist.batch_isend_irecv(list(operations)) if operations else []


@_reporting
def wait(requests: Sequence["dist.Work"]) -> None:
    for request in requests:
        request.wait()
