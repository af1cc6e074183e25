"""A linear layer's weight gradient and Adam, in one pass or in two: `python -m ivfast.bench.studies.fused_adam`.

Peers compute the gradient gᵀx by a matrix product and pass it to `torch.optim.Adam`, fused or default. Times are
medians over turns.
"""

import statistics
import time
from collections.abc import Callable

import torch

from ivfast import optim
from ivfast.nn import Linear

SIZES = ((64, 256, 256), (64, 512, 256), (64, 512, 512), (64, 1024, 1024), (64, 1024, 4096), (64, 4096, 1024))
SIZES += ((128, 1024, 1024), (256, 1024, 1024), (320, 1024, 1024))  # samples, outputs, inputs


def provider(name: str, samples: int, outputs: int, inputs: int) -> Callable[[], None]:
    layer = Linear(inputs, outputs, bias=False)
    grad, x = torch.randn(samples, outputs), torch.randn(samples, inputs)
    adam = optim.Adam if name == "ivfast" else torch.optim.Adam
    optimizer = adam(layer.parameters(), fused=name != "Adam")
    if name == "ivfast":
        optimizer.fuse([layer])

    def call():
        optimizer.zero_grad()
        if name == "ivfast":
            layer.weight.pending.leave(grad, x)
        else:
            layer.weight.grad = grad.t() @ x
        optimizer.step()

    return call


def measure(calls: dict[str, Callable], seconds: float = 1.0) -> dict[str, float]:
    """Median ms of each, in turns."""
    samples = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, samples.values())) < 20:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            samples[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) * 1e3 for name, times in samples.items()}


def main() -> None:
    optim.LEAST, optim.MOST_SAMPLES = 1, 10**6  # the fused step at every size, to see where it starts to pay
    names = ("ivfast", "fused Adam", "Adam")
    print(f"{torch.get_num_threads()} threads, float32, ms\n\n| samples | weights | {' | '.join(names)} |")
    print("|---:|---:|" + "---:|" * len(names))
    for size in SIZES:
        times = measure({name: provider(name, *size) for name in names})
        cells = " | ".join(f"{times[name]:.3f}" for name in names)
        print(f"| {size[0]} | {size[1]} × {size[2]} | {cells} |")


if __name__ == "__main__":
    main()
