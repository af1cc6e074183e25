"""Times of the kernels and of what they replace, on one device; `gpu.py` runs it after its checks.

Times are medians. "call" is what a caller in a loop sees, host work included; "device" replays it as a CUDA graph.
"""

import contextlib
import json
import math
import statistics
import time

import torch
import torch.nn.functional as F

import ivfast


def call_time(f, device: str) -> float:
    """Median seconds of one call among calls in a row."""
    for _ in range(3):
        f()
    if device == "cpu":
        return statistics.median(_clocked(f) for _ in range(3))
    calls, times = 10, []
    torch.cuda.synchronize()
    for _ in range(30):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            f()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3 / calls)
    return statistics.median(times)


def _clocked(f) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def device_time(f, device: str) -> float | None:
    """Median seconds of one call inside a CUDA graph of ten; None where it cannot be captured."""
    if device == "cpu":
        return None
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                f()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(10):
                f()
    except RuntimeError as error:
        print(f"not captured: {error}", flush=True)
        torch.cuda.synchronize()
        return None
    return call_time(graph.replay, device) / 10


def limits(device: str) -> dict:
    """What no kernel here can beat: an empty launch, and a copy of more than the caches hold."""
    x = torch.empty((1 << 28) if device == "cuda" else (1 << 16), device=device)
    y = torch.empty_like(x)
    launch = (lambda: torch.cuda._sleep(0)) if device == "cuda" else (lambda: None)
    on_device = device_time(launch, device)
    return {
        "empty_launch_call_us": call_time(launch, device) * 1e6,
        "empty_launch_device_us": None if on_device is None else on_device * 1e6,
        "copy_bytes_per_s": 2 * x.nbytes / call_time(lambda: y.copy_(x), device),
    }


def forced(implementation: str):
    return contextlib.nullcontext() if implementation == "default" else ivfast.use(implementation)


def svgd_eager(x, score, h):
    # squared distances through products: cdist has no finite gradient at distance 0
    norms = x.square().sum(-1)
    kernel = (-(norms[..., None] + norms[..., None, :] - 2 * x @ x.mT).clamp_min(0) / h).exp()
    return (kernel @ (score - (2 / h) * x) + (2 / h) * kernel.sum(-1, keepdim=True) * x) / x.shape[-2]


def timings(device: str) -> list[dict]:
    torch.set_float32_matmul_precision("highest")
    rows = []
    shapes = [(64, 16), (128, 64), (128, 128), (256, 128), (64, 64, 16), (1024, 64), (4096, 64)]
    for shape in shapes if device == "cuda" else [(8, 3)]:
        n, d, sets = shape[-2], shape[-1], math.prod(shape[:-2])
        x, score = (torch.randn(shape, device=device) for _ in range(2))
        h = float(d)

        def ours(x, score, h=h):
            return ivfast.svgd_direction(x, score, bandwidth=h)

        peers = {
            "ivfast": ("default", ours),
            "cuda": ("cuda", ours),
            "reference": ("reference", ours),
            "eager": ("default", lambda x, s, h=h: svgd_eager(x, s, h)),
            "torch.compile": ("default", compiled(lambda x, s, h=h: svgd_eager(x, s, h), device)),
        }
        work = {"unit": "flop", "forward": 4 * n * n * d * sets, "forward+backward": 14 * n * n * d * sets}
        rows += timed(
            "svgd_direction", "x".join(map(str, shape)), "float32", peers, (x, score), torch.randn_like(x), work, device
        )

    sizes = [(5, 64), (5, 128), (5, 1 << 20), (17, 1 << 16), (1000, 64)]
    for classes, n in sizes if device == "cuda" else [(3, 5)]:
        for dtype in (torch.float32, torch.bfloat16):
            logits = torch.randn(classes * n, classes, device=device).to(dtype)
            labels = torch.arange(classes, device=device).repeat_interleave(n)

            def eager(x, labels=labels):
                return -x.log_softmax(-1).gather(1, labels[:, None]).mean()

            def cross_entropy(x, labels=labels):
                return F.cross_entropy(x, labels)

            peers = {
                "ivfast": ("default", ivfast.multi_js_loss),
                "triton": ("triton", ivfast.multi_js_loss),
                "eager": ("default", eager),
                "F.cross_entropy": ("default", cross_entropy),
                "torch.compile": ("default", compiled(cross_entropy, device)),
            }
            work = {"unit": "byte", "forward": logits.nbytes, "forward+backward": 3 * logits.nbytes}
            label = f"C={classes}, n={n}"
            rows += timed("multi_js_loss", label, str(dtype)[6:], peers, (logits,), logits.new_ones(()), work, device)
    return rows


def compiled(f, device: str):
    return torch.compile(f, fullgraph=True, dynamic=False, backend="inductor" if device == "cuda" else "eager")


def timed(op, label, dtype, peers, tensors, cotangent, work, device) -> list[dict]:
    """Forward, and forward with gradients, of every peer on the same tensors."""
    torch.compiler.reset()
    rows = []
    for peer, (implementation, f) in peers.items():
        for what in ("forward", "forward+backward"):
            leaves = [x.detach().clone().requires_grad_(what != "forward") for x in tensors]

            def call(f=f, leaves=leaves):
                return torch.autograd.grad(f(*leaves), leaves, cotangent) if leaves[0].requires_grad else f(*leaves)

            row = {"op": op, "size": label, "dtype": dtype, "what": what, "peer": peer}
            try:
                with forced(implementation):
                    call()
                    row["peak_MB"] = peak(call, device)
                    row["call_us"] = call_time(call, device) * 1e6
                    seconds = device_time(call, device)
            except Exception as error:
                if "CUDA error" in str(error):
                    raise
                rows.append(row | {"reason": str(error).splitlines()[0][:200]})
                continue
            if seconds:
                row |= {"device_us": seconds * 1e6, f"{work['unit']}_per_s": work[what] / seconds}
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def peak(f, device: str) -> float | None:
    """MB allocated above what was there before the call."""
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    f()
    return (torch.cuda.max_memory_allocated() - before) / 1e6
