"""Times and memory of calls, and limits that no call on this machine can beat.

Providers are timed in turns, in short blocks and a rotating order, so that machine drift affects all of them.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from .problem import Call, Provider

T = TypeVar("T")

BLOCK = 2e-3  # seconds of calls per sample of a short call
ROUNDS = 31  # samples at most, odd
SHORT = 0.05  # below this many seconds, a call before each block warms the caches and quiets other threads


class Timing(NamedTuple):
    median: float  # seconds of a call
    least: float
    rounds: int
    calls: int  # in a round


def clock(call: Call, calls: int, cuda: bool) -> float:
    """Seconds of one call, averaged over calls in a row; on a GPU, from events around them."""
    if cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / calls
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def rounds_of(seconds: float, budget: float) -> tuple[int, int]:
    """Rounds, and calls in each, of a call that takes `seconds`, to fill about `budget` seconds."""
    calls = max(1, math.ceil(BLOCK / max(seconds, 1e-7)))
    return min(ROUNDS, max(3 if seconds < 1 else 1, int(budget / (calls * seconds)))), calls


def in_turns(calls: Mapping[Provider, tuple[Call, float]], budget: float, cuda: bool = False) -> dict[Provider, Timing]:
    """Timings of calls, each given with the seconds that it took before, in about `budget` seconds each."""
    plans = {provider: rounds_of(seconds, budget) for provider, (_, seconds) in calls.items()}
    samples = {provider: [] for provider in calls}
    longest = max((rounds for rounds, _ in plans.values()), default=0)
    order = list(calls)
    gc.collect()
    gc.disable()
    try:
        for turn in range(longest):
            start = turn % len(order)
            for provider in order[start:] + order[:start]:
                rounds, block = plans[provider]
                if turn * rounds // longest == (turn + 1) * rounds // longest:
                    continue  # spread its fewer rounds over all turns
                call, seconds = calls[provider]
                with provider.forced():
                    if seconds < SHORT:
                        call()
                    samples[provider].append(clock(call, block, cuda))
    finally:
        gc.enable()
    return {p: Timing(statistics.median(s), min(s), len(s), plans[p][1]) for p, s in samples.items()}


def recorded(call: Callable[[], T], copies: int = 1) -> tuple[torch.cuda.CUDAGraph, T]:
    """A CUDA graph of `copies` calls, recorded after a few that warm up, and what the last of them returned."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(copies):
            result = call()
    return graph, result


def on_device(call: Call, copies: int = 10) -> float | None:
    """Seconds of a call in a CUDA graph of several calls; None if it cannot be captured."""
    try:
        graph, _ = recorded(call, copies)
        graph.replay()
        return statistics.median(clock(graph.replay, 3, True) for _ in range(11)) / copies
    except RuntimeError as error:
        if "CUDA error" in str(error) and "captur" not in str(error):
            raise
        torch.cuda.synchronize()
        return None


def peak_on_gpu(call: Call) -> float:
    """Bytes that PyTorch allocates above the level before the call."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


class _Empty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


def limits(device: str, quick: bool = False) -> dict[str, float]:
    """The rates of a large fp32 matrix product and a large copy, and the seconds of a call that computes nothing."""
    cuda = device == "cuda"
    side, length = (512, 1 << 20) if quick else (8192, 1 << 28) if cuda else (2048, 1 << 26)
    products = torch.backends.cuda.matmul if cuda else torch.backends.mkldnn.matmul
    precision, products.fp32_precision = products.fp32_precision, "ieee"
    a, b = torch.randn(2, side, side, device=device)
    c, x = torch.empty_like(a), torch.ones(length, device=device)
    y = torch.empty_like(x)
    one = torch.ones(1, device=device)
    leaf, grad = one.clone().requires_grad_(), torch.ones_like(one)

    def least(call, calls=1, rounds=7):
        call()
        return min(clock(call, calls, cuda) for _ in range(rounds))

    found = {
        "matmul_flop_per_s": 2 * side**3 / least(lambda: torch.mm(a, b, out=c)),
        "copy_bytes_per_s": 2 * x.nbytes / least(lambda: y.copy_(x)),
        "empty_forward_s": least(lambda: _Empty.apply(one), 200),
        "empty_forward+backward_s": least(lambda: torch.autograd.grad(_Empty.apply(leaf), leaf, grad), 200),
    }
    products.fp32_precision = precision
    if cuda:
        found["empty_launch_s"] = least(lambda: torch.cuda._sleep(0), 200)
        found["empty_launch_on_device_s"] = on_device(lambda: torch.cuda._sleep(0)) or math.nan
    return found


def bound(limits: Mapping[str, float], work: float, traffic: float, what: str) -> tuple[str, float]:
    """What limits a call with this much flop and traffic, and the least seconds that this takes."""
    least = {
        "matmul": work / limits["matmul_flop_per_s"],
        "copy": traffic / limits["copy_bytes_per_s"],
        "call": limits[f"empty_{what}_s"],
    }
    name = max(least, key=least.get)
    return name, least[name]


def free_memory(device: str) -> float:
    """Available bytes; infinite if unknown."""
    if device == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    free = math.inf
    if Path("/proc/meminfo").exists():
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = (Path("/sys/fs/cgroup", name) for name in ("memory.max", "memory.current"))
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return free
