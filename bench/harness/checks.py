"""What must be right on a device before its times count: rows that say ok, wrong, error, not served, absent or not
started.

Every implementation is compared with the float64 reference on the CPU, fp32 of all ops first. What a device adds to
that, such as graphs, streams and a second device, is in `situations`.
"""

import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator

import torch

from ivfast import testing
from ivfast._registry import OPS

Row = dict[str, object]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
IMPLEMENTATIONS = ("default", "triton", "cuda", "reference")
# the words with which an implementation rejects a size or dtype
REFUSAL = re.compile(r"implementation here|in (CUDA C\+\+|Triton) (computes in float32 and )?takes")


def has_gpu_kernel(case: testing.Case) -> bool:
    op = OPS.get(case.op)
    return op is not None and any(part.triton or part.cuda for part in (op, *op.parts))


def chosen(only: str = "") -> list[testing.Case]:
    """The cases whose names match a regular expression, those of ops with kernels first."""
    return sorted((c for c in testing.CASES if re.search(only, str(c))), key=lambda case: not has_gpu_kernel(case))


def size(case: testing.Case) -> int:
    """How many numbers the case draws."""
    return sum(x.numel() for x in case.draw(torch.Generator().manual_seed(0)))


def of_each_op(cases: Iterable[testing.Case], most: int, count: int = 1) -> list[testing.Case]:
    """For each op the `count` largest cases of up to `most` numbers, or its smallest case."""
    by_op: dict[str, list[testing.Case]] = {}
    for case in cases:
        by_op.setdefault(case.op, []).append(case)
    found = []
    for its in by_op.values():
        its.sort(key=size)
        found += [case for case in its if size(case) <= most][-count:] or its[:1]
    return found


def row_of(
    what: str, case: object, deadline: float, check: Callable[[], Row], dtype=torch.float32, implementation="default"
) -> Row:
    """The row of one check: `check()` returns its status and what else is to be told."""
    row = {
        "what": what,
        "case": str(case),
        "dtype": str(dtype).removeprefix("torch."),
        "implementation": implementation,
    }
    if time.monotonic() > deadline:
        return row | {"status": "not started"}
    try:
        return row | check()
    except Exception as error:
        if "CUDA error" in str(error):
            raise  # the device is lost to this process
        refused = REFUSAL.search(str(error)) and implementation != "default"
        return row | {"status": "not served" if refused else "error", "reason": str(error)[:300]}


def judged(errors: dict[str, float]) -> Row:
    """The status of errors in units of what is allowed."""
    return {"status": "ok" if max(errors.values()) <= 1 else "wrong", "error_over_tolerance": errors}


def values(device: str, cases: list[testing.Case], deadline: float) -> Iterator[Row]:
    """Value and gradients of every case, dtype and implementation."""
    for dtype in DTYPES:
        for case in cases:
            tensors = testing.inputs(case, dtype, device=device)
            for name in IMPLEMENTATIONS:
                check = functools.partial(compared, case, tensors, None if name == "default" else name)
                yield row_of("value", case, deadline, check, dtype, name)


def compared(case: testing.Case, tensors: list[torch.Tensor], implementation: str | None = None) -> Row:
    return judged(testing.compare(case, tensors, implementation))
