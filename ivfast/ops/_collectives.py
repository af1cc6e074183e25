"""Every collective of `torch.distributed` that ivfast calls, by one name in every supported version of PyTorch.

PyTorch renames its collectives now and then, and warns at each call of an old name. What calls torch.distributed for
tensors calls it from here.
"""

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

# newest name first
_GATHER = ("all_gather_single", "all_gather_into_tensor")  # renamed in PyTorch 2.14
_SCATTER = ("reduce_scatter_single", "reduce_scatter_tensor")


def _present(names: Sequence[str]):
    """The function of torch.distributed that has the first of these names. Without a name, as in a PyTorch built
    without distributed, it is None, and nobody can have made a group."""
    return next((getattr(dist, name) for name in names if hasattr(dist, name)), None)


_all_gather, _reduce_scatter = _present(_GATHER), _present(_SCATTER)


def all_gather(table: Tensor, own: Tensor, group=None) -> None:
    """Fill `table` with the tensors `own` of all ranks, one after the other along the first dimension; all are equal
    in shape."""
    _all_gather(table, own, group=group)


def reduce_scatter(own: Tensor, table: Tensor, group=None) -> None:
    """Fill `own` with this rank's part of the sum of all ranks' tables, which parts along the first dimension."""
    _reduce_scatter(own, table, group=group)


def all_reduce(x: Tensor, operation: str = "SUM", group=None) -> None:
    """Replace x by the sum, or another `torch.distributed.ReduceOp`, of all ranks' x: the same bits on each."""
    dist.all_reduce(x, getattr(dist.ReduceOp, operation), group=group)


def exchange(operations: Sequence["dist.P2POp"]) -> list["dist.Work"]:
    """Start sends and receives together; what is returned waits for them."""
    return dist.batch_isend_irecv(list(operations)) if operations else []
