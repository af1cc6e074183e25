"""Which tiles a Triton kernel is fastest with: `python bench/gpu.py --tune`.

A module of `ivfast.kernels` that can be tuned has `forward_tile` and `backward_tile`, which take the padded dimension D
first and return a NamedTuple. One of its fields is changed at a time, and a change that helps is kept.
"""

import importlib
import importlib.util
import statistics
import time
from collections.abc import Iterator, Sequence
from unittest import mock

import torch

import ivfast

from .. import problem_of
from . import measure
from .problem import BACKWARD, FORWARD, Instance, Problem, Provider, Size, label

# rows and columns divide the 128 that particles are padded to; a width has to divide D
CHOICES = {"rows": (32, 64, 128), "columns": (32, 64, 128), "width": (16, 32, 64), "warps": (4, 8), "stages": (1, 2, 3)}
CHOOSERS = {FORWARD: "forward_tile", BACKWARD: "backward_tile"}
SIZES = ((4096, 16), (4096, 64), (4096, 128))


def module_of(name: str):
    """The op's Triton kernels, where they choose tiles."""
    if importlib.util.find_spec(f"ivfast.kernels.{name}") is None:
        return None
    module = importlib.import_module(f"ivfast.kernels.{name}")
    return module if all(hasattr(module, chooser) for chooser in CHOOSERS.values()) else None


def sweep(names: Sequence[str], device: str, deadline: float, sizes: Sequence[Size] | None = None) -> list[dict]:
    """A row per tile that was tried: op, size, pass, tile, µs or why not, and whether it is what the kernel has."""
    rows = []
    for name in names:
        module, p = module_of(name), problem_of(name)
        for size in sizes or SIZES if module else ():
            instance = Instance(p, size, torch.float32, device)
            for what in p.passes:
                about = {"op": p.op, "size": list(size), "pass": what}
                tried = [about | row for row in _descent(module, p, instance, what, deadline)]
                best = min((row for row in tried if "us" in row), key=lambda row: row["us"], default={})
                print(f"{name} {label(size)} {what}: {best}", flush=True)
                rows += tried
    return rows


def _descent(module, p: Problem, instance: Instance, what: str, deadline: float) -> Iterator[dict]:
    chooser, own = CHOOSERS[what], getattr(module, CHOOSERS[what])
    seen = []

    def watched(D, *args):
        seen.append((D, own(D, *args)))
        return seen[-1][1]

    with mock.patch.object(module, chooser, watched):
        row = _timed(p, instance, what)
    if not seen:
        yield row | {"tile": {}, "present": True}
        return
    (D, best), least = seen[0], row.get("us", float("inf"))
    yield row | {"tile": best._asdict(), "present": True}
    for field, values in CHOICES.items():
        for value in values if field in best._fields else ():
            tile = best._replace(**{field: value})
            if tile == best or (field == "width" and D % value) or time.monotonic() > deadline:
                continue
            with mock.patch.object(module, chooser, lambda *_, tile=tile: tile):
                row = _timed(p, instance, what)
            yield row | {"tile": tile._asdict(), "present": False}
            if row.get("us", least) < least:
                best, least = tile, row["us"]


def _timed(p: Problem, instance: Instance, what: str) -> dict:
    """Median µs on the device, or why there are none."""
    provider = Provider("triton", p.function, "implementation", "triton")
    cuda = instance.device == "cuda"
    try:
        with ivfast.use("triton"):
            call = instance.bind(provider, what)
            error = instance.error(call())
            if not error <= instance.allowed(provider):
                return {"reason": f"wrong: error {error:.1e}"}
            seconds = measure.on_device(call, 3) if cuda else None
            return {"us": (seconds or statistics.median(measure.clock(call, 1, cuda) for _ in range(3))) * 1e6}
    except Exception as error:
        if "CUDA error" in str(error):
            raise
        return {"reason": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"}
