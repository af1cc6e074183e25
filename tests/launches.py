"""What launching Triton's kernels for every case on a card would compile: `python launches.py TARGET` prints how many
variants of each kernel, and those with tiles that `cubin_variants` lacks.

Triton's own launch code runs up to the compiler, whose part is a stub, with a driver for a GPU that need not exist.
Values are those of memory that nothing wrote.
"""

import collections
import contextlib
import importlib
import json
import os
import sys

import torch
import triton
from cubin_variants import CARDS, TARGETS, Variant, variants
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction


class Driver(DriverBase):
    def __init__(self, target: GPUTarget):
        self.target = target
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0

    @classmethod
    def is_active(cls):
        return True

    def map_python_to_cpp_type(self, ty):
        return ty

    def get_current_target(self):
        return self.target

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_benchmarker(self):
        return None


class Kernel:
    function, packed_metadata = 1, ()

    def launch_metadata(self, *args):
        return None

    def run(self, *args):
        pass


def record(target: int | str) -> list[dict]:
    """Kernel, constants and options of what would be compiled for the cases of every op, in float32 and bfloat16."""
    card, found = CARDS[target], []
    triton.runtime.driver.set_active(Driver(GPUTarget(card.backend, target, card.warp)))

    def compiled(self, key, signature, device, constexprs, options, *_):
        names = [self.arg_names[i] for (i,) in constexprs]
        kernel = f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}"
        shape = {name: value for name, value in zip(names, constexprs.values(), strict=True) if value is not None}
        found.append({"kernel": kernel, "constants": shape, "warps": options.num_warps, "stages": options.num_stages})
        self.device_caches[device][0][key] = Kernel()
        return Kernel()

    JITFunction._do_compile = compiled
    import ivfast.kernels.card
    from ivfast import testing
    from ivfast._registry import OPS

    ivfast.kernels.card.INTERPRETED = card
    for op in OPS.values():
        if op.triton:
            _ = op._launcher  # the kernels are compiled, not interpreted,
    os.environ["TRITON_INTERPRET"] = "1"  # but may run on tensors of the CPU
    for dtype in (torch.float32, torch.bfloat16):
        for case in testing.CASES:
            op = OPS.get(case.op)
            if op is None or not any(o.triton for o in (op, *op.parts)):
                continue
            # an op refuses values that are not finite, or an iteration of its host's does not end
            with ivfast.use("triton"), contextlib.suppress(ValueError, FloatingPointError):
                testing.value_and_gradients(case, testing.inputs(case, dtype, seed=0))
    return found


def tile(constants: dict) -> dict[str, int]:
    return {name: int(constants.get(name, 0)) for name in ("ROWS", "COLUMNS", "VALUES", "WIDTH")}


def constants(variant: Variant) -> dict[str, str]:
    module, name = variant.kernel.split(".")
    names = getattr(importlib.import_module(f"ivfast.kernels.{module}"), name).arg_names
    return {n: text for n, text in zip(names, variant.types.split(), strict=True) if text.isdigit()}


def missing(rows: list[dict], target: int | str) -> list[dict]:
    """Tiles of products that no variant for a target matches or exceeds."""
    like = 80 if target not in TARGETS else target  # of the cards whose code is not in the table, none is `wide`
    known = [(v.kernel, CARDS[target].options(v.options), tile(constants(v))) for v in variants() if like in v.targets]
    found = []
    for row in rows:
        own = tile(row["constants"])
        if own["COLUMNS"] and "PRECISION" in row["constants"]:
            same = [
                other
                for kernel, options, other in known
                if (kernel, options["num_warps"], options.get("num_stages"))
                == (row["kernel"], row["warps"], row["stages"])
            ]
            if not any(
                all(own[k] == other[k] for k in ("ROWS", "COLUMNS")) and all(own[k] <= other[k] for k in own)
                for other in same
            ):
                found.append(row)
    return found


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)  # memory from torch.empty is NaN
    target = int(sys.argv[1]) if sys.argv[1].isdigit() else sys.argv[1]
    rows = record(target)
    counts = collections.Counter(row["kernel"] for row in rows)
    precisions = sorted({row["constants"]["PRECISION"] for row in rows if "PRECISION" in row["constants"]})
    print(json.dumps({"counts": counts, "precisions": precisions, "missing": missing(rows, target)}))
