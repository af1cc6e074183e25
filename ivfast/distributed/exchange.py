"""Rows spread over the ranks of a group: how many each rank holds, gathering all on every rank, and a ring of
blocks."""

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _check
from ..ops import _collectives
from ..ops._pairwise import arithmetic, direct_distances

EXCHANGES = ("auto", "gather", "ring")
GATHER = 16384  # total rows up to which every rank gathers them all: n² is then a few milliseconds of one kernel
# Pairs (times the numbers per pair) that a streamed pass holds in memory at a time: on the CPU what fits a cache, on
# other devices enough to take longer than launching the kernels.
TILE, TILE_ON_DEVICE = 1 << 20, 1 << 25
# ‖x‖² of centred rows, in the smallest squared distance that matters, up to which products keep that distance's digits.
REACH = {torch.float32: 2.0**7, torch.float64: 2.0**16}


class Rows(NamedTuple):
    """Rows `[..., n, d]` spread over the ranks of `group`, in the order of the ranks."""

    group: Any
    rank: int
    counts: tuple[int, ...]

    @property
    def total(self) -> int:
        return sum(self.counts)

    @property
    def most(self) -> int:
        return max(self.counts)

    def own(self, whole: Tensor) -> Tensor:
        """This rank's rows of `whole [..., n, d]`."""
        start = sum(self.counts[: self.rank])
        return whole.narrow(-2, start, self.counts[self.rank]).contiguous()


def rows_of(group, even: bool, at_least: int = 1, **tensors: Tensor) -> list[Rows]:
    """How the rows of each tensor `[..., n, d]`, passed by its argument's name, are spread over the ranks.

    Raises:
        TypeError, ValueError: for a tensor that does not hold samples; on every rank, if ranks differ in anything
            except their number of rows or hold fewer than `at_least` rows in total.
    """
    for name, x in tensors.items():
        _check.samples(name, x, at_least=0)
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    if even:
        return _enough(tensors, [Rows(group, rank, (x.shape[-2],) * world) for x in tensors.values()], at_least)
    first = next(iter(tensors.values()))
    gathered = first.new_empty(world, len(tensors), 7, dtype=torch.int64)
    own = torch.tensor([_description(x) for x in tensors.values()], device=first.device)
    _collectives.all_gather(gathered.view(world * len(tensors), 7), own, group)
    table = gathered.tolist()
    for k, name in enumerate(tensors):
        for other, row in enumerate(table):
            if row[k][1:] != table[0][k][1:]:
                wanted, got = _said(table[0][k]), _said(row[k])
                raise ValueError(f"{name} must match rank 0's except for n: {wanted}, got {got} on rank {other}")
    return _enough(tensors, [Rows(group, rank, tuple(r[k][0] for r in table)) for k in range(len(tensors))], at_least)


def _enough(names: Iterable[str], rows: list[Rows], at_least: int) -> list[Rows]:
    for name, its in zip(names, rows, strict=True):
        if its.total < at_least:
            raise ValueError(f"{name} must hold n >= {at_least} samples over all ranks, got {its.total}")
    return rows


def _description(x: Tensor) -> list[int]:
    """n, and what all ranks must share: d, the leading dimensions, dtype and whether gradients are needed."""
    batch = x.shape[:-2]
    gradient = x.requires_grad and torch.is_grad_enabled()
    # shapes vary in length, so send a hash; hashes of integers are the same in every process
    return [
        x.shape[-2],
        x.shape[-1],
        len(batch),
        batch.numel(),
        hash(tuple(batch)),
        _check.FLOATING.index(x.dtype),
        gradient,
    ]


def _said(row: list[int]) -> str:
    _, d, dimensions, sets, _, dtype, gradient = row
    leading = f", {sets} sets in {dimensions} leading dimensions" if dimensions else ""
    return f"d = {d}{leading}, {_check.FLOATING[dtype]}, {'with' if gradient else 'without'} gradient"


def gathers(exchange: str, *rows: Rows, choices: tuple[str, ...] = EXCHANGES) -> bool:
    """Whether every rank gathers all rows instead of using the other method; both give the same numbers."""
    _check.choice("exchange", exchange, choices)
    return exchange == "gather" or (exchange == "auto" and max(r.total for r in rows) <= GATHER)


def gather_rows(x: Tensor, rows: Rows) -> Tensor:
    """All rows `[..., n, d]`; x holds this rank's. Counts may differ.

    Backward is a reduce-scatter: each rank's rows get the sum of all ranks' gradients.
    """
    return _Gather.apply(x, rows)


def _gather(x: Tensor, rows: Rows) -> Tensor:
    world, most = len(rows.counts), rows.most
    sent = _padded(x.movedim(-2, 0), most)
    table = sent.new_empty(world * most, *sent.shape[1:])
    _collectives.all_gather(table, sent, rows.group)
    if rows.total != world * most:
        table = torch.cat([part[:count] for part, count in zip(table.split(most), rows.counts, strict=True)])
    return table.movedim(0, -2)


def _scatter(grad: Tensor, rows: Rows) -> Tensor:
    parts = arithmetic(grad).movedim(-2, 0).split(rows.counts)
    table = torch.cat([_padded(part, rows.most) for part in parts])
    own = table.new_empty(rows.most, *table.shape[1:])
    _collectives.reduce_scatter(own, table, rows.group)
    return own[: rows.counts[rows.rank]].movedim(0, -2).to(grad.dtype)


def _padded(x: Tensor, most: int) -> Tensor:
    return x.contiguous() if len(x) == most else torch.cat((x, x.new_zeros(most - len(x), *x.shape[1:])))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rows):
        ctx.rows = rows
        return _gather(x, rows)

    @staticmethod
    def backward(ctx, grad):
        return _Scatter.apply(grad, ctx.rows), None


class _Scatter(torch.autograd.Function):
    """The adjoint of `_Gather`, and the other way round."""

    @staticmethod
    def forward(ctx, grad, rows):
        ctx.rows = rows
        return _scatter(grad, rows)

    @staticmethod
    def backward(ctx, grad):
        return _Gather.apply(grad, ctx.rows), None


def total(x: Tensor, group) -> Tensor:
    """Sum of x over the ranks; each rank's x gets the sum of all ranks' gradients."""
    return _Total.apply(x, group)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return summed(x, group)

    @staticmethod
    def backward(ctx, grad):
        return _Total.apply(grad, ctx.group), None


def summed(x: Tensor, group) -> Tensor:
    """Sum of x over the ranks, bitwise equal on all of them; no gradient."""
    x = x.detach().clone(memory_format=torch.contiguous_format)
    _collectives.all_reduce(x, group=group)
    return x


def ring(tensors: Sequence[Tensor], rows: Sequence[Rows]) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield each rank and its blocks in turn, starting with `tensors`, this rank's own.

    While a block is processed, it is sent to the next rank and the following block is received: three blocks are in
    memory at a time.
    """
    group, rank, world = rows[0].group, rows[0].rank, len(rows[0].counts)
    right, left = (rank + 1) % world, (rank - 1) % world
    blocks = [x.detach().contiguous() for x in tensors]
    for step in range(world):
        coming, requests = [], []
        if step < world - 1:
            counts = [its.counts[(rank - step - 1) % world] for its in rows]
            coming = [x.new_empty(*x.shape[:-2], n, x.shape[-1]) for x, n in zip(blocks, counts, strict=True)]
            operations = [
                dist.P2POp(call, x, group=group, tag=tag, group_peer=peer)
                for call, peer, several in ((dist.isend, right, blocks), (dist.irecv, left, coming))
                for tag, x in enumerate(several)
                if x.numel()
            ]
            requests = _collectives.exchange(operations)
        yield (rank - step) % world, blocks
        _collectives.wait(requests)
        blocks = coming


def tiles(a: Tensor, b: Tensor, each: int = 1) -> Iterator[tuple[slice, slice]]:
    """Slices of the rows of a `[..., n, d]` and b `[..., m, d]` whose pairs are processed together."""
    n, m, sets = a.shape[-2], b.shape[-2], max(1, a.shape[:-2].numel())
    size = (TILE if a.is_cpu else TILE_ON_DEVICE) // (each * sets)
    columns = max(1, min(m, 2 * math.isqrt(size)))
    step = max(1, min(n, size // columns))
    for i in range(0, n, step):
        for j in range(0, m, columns):
            yield slice(i, min(i + step, n)), slice(j, min(j + columns, m))


def diagonal(tile: Tensor, i: slice, j: slice) -> Tensor:
    """The entries of `tile [..., R, C]` that pair a sample with itself, if rows and columns are the same samples."""
    return tile.diagonal(offset=i.start - j.start, dim1=-2, dim2=-1)


class Points(NamedTuple):
    """Samples of all ranks in the arithmetic that their distances need, the same on every rank."""

    rows: list[Tensor]  # of this rank
    centre: Tensor  # `[..., 1, d]`, which has been subtracted
    apart: bool  # whether distances are computed from differences instead of products


def points(group, sizes: Tensor, *tensors: tuple[Tensor, Rows]) -> Points:
    """`tensors`, for squared distances of which `sizes` `[..., k]` matter: centred, in the dtype of their arithmetic.
    If products of such rows would lose the distances on one rank, all ranks get what `uncentred` returns."""
    near = centred(group, *tensors)
    return uncentred(*tensors) if lost(group, sizes, near) else near


def lost(group, sizes: Tensor, near: Points) -> bool:
    """Whether, on any rank, products of the rows lose the smallest of the squared distances `sizes` `[..., k]`, or the
    square of one is out of their dtype's range. Waits for the device."""
    dtype = near.rows[0].dtype
    least = 8 * torch.finfo(dtype).tiny ** 0.5
    reach = REACH[dtype] * sizes.amin(-1, keepdim=True)
    holds = [(sizes > least) & (sizes < 1 / least), *(x.square().sum(-1) <= reach for x in near.rows)]  # not if NaN
    worst = torch.stack([(~all_.all()).long() for all_ in holds]).amax()
    _collectives.all_reduce(worst, "MAX", group)
    return bool(worst)


def uncentred(*tensors: tuple[Tensor, Rows]) -> Points:
    """The tensors in float64, where squares of float32 neither overflow nor vanish, and not centred, which would round.
    Infinities become NaN, as they do where rows are centred."""
    rows = [x.detach().double() for x, _ in tensors]
    return Points([x + 0 * x for x in rows], rows[0].new_zeros(*rows[0].shape[:-2], 1, rows[0].shape[-1]), True)


def distances(a: Tensor, b: Tensor, i: slice, j: slice, own: bool, apart: bool) -> Tensor:
    """‖a_i − b_j‖² `[..., R, C]` of the rows of `Points`: never negative; with `own`, 0 for a sample paired with
    itself."""
    a, b = a[..., i, :], b[..., j, :]
    if apart:
        return direct_distances(a, b)
    norms = a.square().sum(-1).unsqueeze(-1) + b.square().sum(-1).unsqueeze(-2)
    d2 = norms.sub_(a @ b.mT, alpha=2).clamp_min_(0)
    if own:
        diagonal(d2, i, j).zero_()
    return d2


def centred(group, *tensors: tuple[Tensor, Rows]) -> Points:
    """The tensors, in the dtype of their arithmetic, minus the mean of all rows of all of them."""
    working = [arithmetic(x.detach()) for x, _ in tensors]
    n = sum(rows.total for _, rows in tensors)
    sums = (x.sum(-2, keepdim=True, dtype=torch.float64) for x in working)
    centre = summed(functools.reduce(torch.add, sums), group) / n
    centre = centre.to(working[0].dtype)
    return Points([x - centre for x in working], centre, False)
