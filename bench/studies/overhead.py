"""What a call costs before and behind its kernel, at the papers' sizes: `python -m ivfast.bench.studies.overhead`.

Each row adds one thing to the row above it. Times are medians of 31 blocks of calls on one thread.
"""

import statistics
import time
from collections.abc import Callable

import torch

import ivfast
from ivfast.ops import multi_js

from ..harness.problem import _Empty


def microseconds(call: Callable, calls: int = 400, blocks: int = 31) -> float:
    for _ in range(calls):
        call()
    samples = []
    for _ in range(blocks):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        samples.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(samples)


def until_the_op(logits: torch.Tensor, calls: int = 4000) -> float:
    """Microseconds from the call of multi_js_loss to that of its op: checks, `Function.apply`."""
    stamps, op = [], multi_js._forward

    def stamped(*args):
        stamps.append(time.perf_counter())
        return op(*args)

    multi_js._forward = stamped
    try:
        starts = []
        for _ in range(calls):
            starts.append(time.perf_counter())
            ivfast.multi_js_loss(logits)
    finally:
        multi_js._forward = op
    return statistics.median(end - start for start, end in zip(starts, stamps, strict=True)) * 1e6


def rows() -> list[tuple[str, float]]:
    """From nothing to a loss with its gradient, 5 blocks of 64 rows."""
    logits = torch.randn(5, 64, 5, requires_grad=True)
    plain, tiny, one = logits.detach(), torch.randn(2, 1, 2), torch.ones(())
    forward, backward = torch.ops.ivfast.multi_js_loss.default, torch.ops.ivfast.multi_js_loss_backward.default
    lse = forward(plain, None, 0.0)[1]
    like = torch.empty(())
    return [
        ("torch.empty", microseconds(lambda: torch.empty(4))),
        ("a product of two numbers by PyTorch", microseconds(lambda: one * one)),
        ("the forward op on 4 numbers: dispatch, boxing, two outputs", microseconds(lambda: forward(tiny, None, 0.0))),
        ("the forward op on 1,600 logits", microseconds(lambda: forward(plain, None, 0.0))),
        ("the backward op on 1,600 logits", microseconds(lambda: backward(one, plain, None, lse, 0.0))),
        ("from the call of multi_js_loss to that of its op, autograd on", until_the_op(logits)),
        ("of these, the checks", microseconds(lambda: multi_js._check_blocks(plain))),
        ("multi_js_loss without gradients", microseconds(lambda: ivfast.multi_js_loss(plain))),
        ("multi_js_loss with gradients, forward", microseconds(lambda: ivfast.multi_js_loss(logits))),
        ("an empty Function, forward", microseconds(lambda: _Empty.apply(logits, like))),
        ("an empty Function, forward and autograd.grad", microseconds(
            lambda: torch.autograd.grad(_Empty.apply(logits, like), logits))),
        ("multi_js_loss, forward and autograd.grad", microseconds(
            lambda: torch.autograd.grad(ivfast.multi_js_loss(logits), logits))),
    ]  # fmt: skip


def table() -> str:
    measured = rows()
    times = dict(measured)
    before = times["from the call of multi_js_loss to that of its op, autograd on"]
    to_kernel = before + times["the forward op on 4 numbers: dispatch, boxing, two outputs"]
    lines = ["| what | µs |", "|---|---|", *(f"| {name} | {us:.1f} |" for name, us in measured)]
    return "\n".join([*lines, f"| **from Python's call to the kernel, autograd on, at most** | **{to_kernel:.1f}** |"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(table())
