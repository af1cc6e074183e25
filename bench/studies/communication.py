"""The bytes that a rank sends: by formula, counted call by call, and written to the sockets of gloo.

`counted` wraps the collectives that ivfast calls and counts each by its kind: a gathered block goes to every other
rank, a reduce-scatter sends every other rank's part, an all-reduce is a reduce-scatter and a gather of the sums, and a
block of a ring goes to one neighbour. The backend may send more: gloo's reduce-scatter is an all-reduce, which is twice
the bytes.
"""

import contextlib
import datetime
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from ivfast import distributed
from ivfast.ops import _collectives
from ivfast.train.ranks import Ranks

from .train import images_of, run_of, settings_of

T, ITERATIONS = 4, 2  # of the bridge
PASSES = 3  # of a median in float32: 31 bits, 11 at a time
COUNTS = 8 * (2 * 2**11 + 1)  # int64, of the digits of two middles
ABOUT = 7 * 8  # n and what the ranks must share, for each tensor, unless `even` is given


class Link(NamedTuple):
    """What a rank sends, in bytes, among `ranks`."""

    ranks: int

    def gather(self, own: float) -> float:
        return (self.ranks - 1) * own

    def scatter(self, whole: float) -> float:
        return (self.ranks - 1) / self.ranks * whole

    def reduce(self, whole: float) -> float:
        return 2 * self.scatter(whole)

    def ring(self, own: float) -> float:
        return (self.ranks - 1) * own

    def counts(self, tensors: int) -> float:
        return self.gather(ABOUT * tensors)

    def median(self, own: float, d: int) -> float:
        """Digits, and the first particle and a scalar for particles that coincide; a float32 ring."""
        rings = PASSES * (self.ring(own) + self.reduce(COUNTS))
        return self.centre(d) + rings + self.reduce(4 * d) + self.reduce(8)

    def centre(self, d: int) -> float:
        """The mean, and whether distances to be computed are lost in float32."""
        return self.reduce(8 * d) + self.reduce(8)

    def direction(self, own: float, d: int) -> float:
        return self.centre(d) + self.ring(own)


class Case(NamedTuple):
    """A call, and the bytes that a rank sends forward and backward: of its block, of d and of the ranks."""

    op: str
    exchange: str
    inputs: int
    call: Callable[..., Tensor]
    forward: Callable[[Link, float, int], float]
    backward: Callable[[Link, float, int], float]


def bridge(z: Tensor, draws: Tensor, **how) -> Tensor:
    return distributed.svgd_bridge(z, T, iterations=ITERATIONS, draws=draws, **how)


STEPS = (T - 1) * ITERATIONS
CASES = (
    Case(
        "gather_rows",
        "gather",
        1,
        lambda x: distributed.gather_rows(x, distributed.rows_of(None, True, x=x)[0]),
        lambda to, b, d: to.gather(b),
        lambda to, b, d: to.scatter(to.ranks * b),
    ),
    Case(
        "svgd_direction",
        "gather",
        1,
        lambda x: distributed.svgd_direction(x, bandwidth=float(x.shape[-1]), exchange="gather"),
        lambda to, b, d: to.counts(1) + to.gather(b),
        lambda to, b, d: to.scatter(to.ranks * b),
    ),
    Case(
        "svgd_direction",
        "ring",
        1,
        lambda x: distributed.svgd_direction(x, bandwidth=float(x.shape[-1]), exchange="ring"),
        lambda to, b, d: to.counts(1) + to.direction(b, d),
        lambda to, b, d: to.ring(2 * b),
    ),
    Case(
        "svgd_direction, median",
        "ring",
        1,
        lambda x: distributed.svgd_direction(x, exchange="ring"),
        lambda to, b, d: to.counts(1) + to.median(b, d) + to.direction(b, d),
        lambda to, b, d: to.ring(2 * b),
    ),
    Case(
        "median_bandwidth",
        "gather",
        1,
        lambda x: distributed.median_bandwidth(x, exchange="gather"),
        lambda to, b, d: to.counts(1) + to.gather(b),
        lambda to, b, d: to.scatter(to.ranks * b),
    ),
    Case(
        "median_bandwidth",
        "ring",
        1,
        lambda x: distributed.median_bandwidth(x, exchange="ring"),
        lambda to, b, d: to.counts(1) + to.median(b, d),
        lambda to, b, d: to.ring(b) + to.reduce(16) + to.reduce(4),
    ),
    Case(
        f"svgd_bridge, t = {T}",
        "gather",
        1,
        lambda z: bridge(z, torch.randn(STEPS + 1, *z.shape), exchange="gather"),
        lambda to, b, d: to.counts(1) + to.gather(b) + to.gather((STEPS + 1) * b),
        lambda to, b, d: to.scatter(to.ranks * b),
    ),
    Case(
        f"svgd_bridge, t = {T}",
        "ring",
        1,
        lambda z: bridge(z, torch.randn(STEPS + 1, *z.shape), exchange="ring"),
        lambda to, b, d: to.counts(1) + STEPS * (to.median(b, d) + to.direction(b, d)),
        lambda to, b, d: STEPS * to.ring(2 * b),
    ),
    Case(
        "mmd",
        "gather",
        2,
        lambda x, y: distributed.mmd(x, y, exchange="gather"),
        lambda to, b, d: to.counts(2) + to.gather(2 * b),
        lambda to, b, d: to.scatter(2 * to.ranks * b),
    ),
    Case(
        "mmd",
        "ring",
        2,
        lambda x, y: distributed.mmd(x, y, exchange="ring"),
        lambda to, b, d: to.counts(2) + to.centre(d) + to.ring(2 * b) + to.reduce(8),
        lambda to, b, d: to.reduce(4),
    ),
    Case(
        "as_distance",
        "gather",
        4,
        lambda *q: distributed.as_distance(*q, exchange="gather"),
        lambda to, b, d: to.counts(2) + to.gather(4 * b),
        lambda to, b, d: to.scatter(4 * to.ranks * b),
    ),
    Case(
        "as_distance",
        "ring",
        4,
        lambda *q: distributed.as_distance(*q, exchange="ring"),
        lambda to, b, d: to.counts(2) + to.ring(4 * b) + to.gather(3 * 8),
        lambda to, b, d: to.reduce(4) + to.ring(4 * b),
    ),
    Case(
        "multi_js_loss",
        "reduce",
        1,
        lambda x: distributed.multi_js_loss(x.reshape(-1, 4)),
        lambda to, b, d: to.counts(1) + to.reduce(4),
        lambda to, b, d: to.reduce(4),
    ),
    Case(
        "fld",
        "gather",
        1,
        lambda z: distributed.fld(z, exchange="gather"),
        lambda to, b, d: to.counts(1) + to.gather(b),
        lambda to, b, d: to.scatter(to.ranks * b),
    ),
    Case(
        "fld",
        "reduce",
        1,
        lambda z: distributed.fld(z, exchange="reduce"),
        lambda to, b, d: to.counts(1) + to.reduce(8 * d) + to.reduce(8 * d * d),
        lambda to, b, d: to.reduce(8 * d) + to.reduce(8 * d * d),
    ),
)


@contextlib.contextmanager
def counted() -> Iterator[list[float]]:
    """Bytes that this rank sends by each call of the default group, in the order of the calls."""
    to, sent = Link(dist.get_world_size()), []
    bytes_of = {
        "all_gather": lambda table, own, *_: to.gather(own.nbytes),
        "reduce_scatter": lambda own, table, *_: to.scatter(table.nbytes),
        "all_reduce": lambda x, *_: to.reduce(x.nbytes),
        "exchange": lambda operations: sum(its.tensor.nbytes for its in operations if its.op is dist.isend),
    }
    originals = {name: getattr(_collectives, name) for name in bytes_of}

    def booked(name: str) -> Callable:
        def call(*arguments, **options):
            sent.append(bytes_of[name](*arguments))
            return originals[name](*arguments, **options)

        return call

    try:
        for name in bytes_of:
            setattr(_collectives, name, booked(name))
        yield sent
    finally:
        for name, function in originals.items():
            setattr(_collectives, name, function)


IO = Path("/proc/self/io")


def written() -> int | None:
    """Bytes that this process has passed to write calls, which gloo's sockets use. None except on Linux."""
    if not IO.exists():
        return None
    return int(next(line for line in IO.read_text().splitlines() if line.startswith("wchar")).split()[1])


def sends(call: Callable[[], object]) -> tuple[object, float, int | None]:
    """The call's result, the bytes counted and those written."""
    dist.barrier()
    before = written()
    with counted() as sent:
        result = call()
    dist.barrier()  # our bytes have arrived
    return result, sum(sent), None if before is None else written() - before


def row(about: dict, formula: float, counted: float, wrote: int | None) -> dict:
    return about | {"formula": formula, "counted": counted, "written": wrote}


def of_op(case: Case, n: int, d: int) -> list[dict]:
    to = Link(dist.get_world_size())
    own = n // to.ranks
    tensors = [torch.randn(own, d, requires_grad=True) for _ in range(case.inputs)]
    out, forward, wrote_forward = sends(lambda: case.call(*tensors))
    _, backward, wrote_backward = sends(lambda: out.sum().backward())
    about = {"what": case.op, "exchange": case.exchange, "ranks": to.ranks, "n": n, "d": d}
    sizes = to, own * d * 4, d
    return [
        row(about | {"pass": "forward"}, case.forward(*sizes), forward, wrote_forward),
        row(about | {"pass": "backward"}, case.backward(*sizes), backward, wrote_backward),
    ]


def of_step(system: str, setting: str) -> list[dict]:
    """A training step's exchange of gradients: an all-reduce of P floats for any batch."""
    to, seen = Link(dist.get_world_size()), []
    settings = settings_of(system, setting)
    run = run_of(settings, images_of(setting))
    average = Ranks.average_gradients

    def exchanged(ranks, parameters):
        parameters = list(parameters)
        _, *sent = sends(lambda: average(ranks, parameters))
        seen.append((4 * sum(p.numel() for p in parameters if p.grad is not None), *sent))

    run.ranks.average_gradients = exchanged.__get__(run.ranks)
    _, whole, _ = sends(run.advance)
    sizes, bytes_counted, bytes_written = zip(*seen, strict=True)
    about = {"what": f"{system}, {setting}", "n": settings.batch_size, "d": settings.latent_dim, "ranks": to.ranks}
    wrote = None if None in bytes_written else sum(bytes_written)
    gradients = about | {"exchange": "reduce", "pass": "a step's gradients", "parameters": sum(sizes) // 4}
    return [row(gradients, sum(map(to.reduce, sizes)), sum(bytes_counted), wrote) | {"whole_step": whole}]


def bandwidth(size: int = 1 << 22, turns: int = 9) -> float:
    """Bytes per second that this rank sends to the next one while it receives as many: a median over turns."""
    block = torch.zeros(size)
    rows = distributed.rows_of(None, True, block=block[None])[0]
    seconds = []
    for _ in range(turns):
        dist.barrier()
        start = time.perf_counter()
        for _ in distributed.exchange.ring([block[None]], [rows]):
            pass
        seconds.append(time.perf_counter() - start)
    return (len(rows.counts) - 1) * block.nbytes / sorted(seconds)[turns // 2]


def rank_main(rank: int, world: int, folder: str, n: int, d: int, steps: tuple[tuple[str, str], ...]) -> None:
    torch.set_num_threads(1)
    store, limit = f"file://{folder}/store{world}", datetime.timedelta(minutes=5)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=limit)
    try:
        rows = [row for case in CASES for row in of_op(case, n, d)]
        rows += [row for step in steps for row in of_step(*step)]
        found = {"rows": rows, "bytes_per_s": bandwidth() if world == 2 and steps else None}
        Path(folder, f"{world}-{rank}.json").write_text(json.dumps(found))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def measure(world: int, n: int = 512, d: int = 64, steps: tuple[tuple[str, str], ...] = ()) -> list[dict]:
    """What each of `world` ranks found, the first's first."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(rank_main, (world, folder, n, d, steps), nprocs=world)
        return [json.loads(Path(folder, f"{world}-{rank}.json").read_text()) for rank in range(world)]
