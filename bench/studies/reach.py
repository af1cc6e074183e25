"""What n and what batch a number of devices reaches: t = a·n²/R + b + bytes sent/bandwidth.

On the CPU a and b are fitted to measured times and the bandwidth is measured; what more than one device takes is
extrapolated. On GPUs all is arithmetic from data-sheet peaks.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from .communication import Link

DEVICES = (1, 2, 4, 8)
D = 64
FLOAT = 4

# In streamed PyTorch (ivfast/distributed/stein.py) every step on a tile of pairs reads and writes it in memory. Of a
# direction: norms 4 bytes, product 4, difference 12, clamp 8, division 8, exp 8, K V 4, its row sums 4. Of a digit of
# the median: distances 28, shifted 8, their prefixes 8, and for each of two middles compared 5, masked 4, placed 12,
# selected 17, binned 24.
DIRECTION_BYTES, DIGIT_BYTES, DIGITS = 52, 168, 3
BLOCKS = 9  # of n_rank × d at the end of a ring: x, X, K V, V, the block that came, S, φ and its two terms
TILES = 4 * 4 << 25  # distances and temporaries of 2²⁵ pairs


class Gpu(NamedTuple):
    name: str
    flop_per_s: float
    memory_bytes_per_s: float
    link_bytes_per_s: float  # each way
    memory: float


H100 = Gpu("H100 SXM", 67e12, 3.35e12, 450e9, 80e9)


class Fit(NamedTuple):
    """t(x) = slope·x^power + start, and the largest relative error at the points that it was fitted to."""

    slope: float
    start: float
    power: int
    error: float

    def __call__(self, x: float) -> float:
        return self.slope * x**self.power + self.start


def fit(points: list[tuple[float, float]], power: int) -> Fit:
    """Least relative squares; a coefficient that would be negative is 0."""
    x, t = torch.tensor(points, dtype=torch.float64).T
    columns = torch.stack((x**power, torch.ones_like(x)), -1) / t[:, None]
    slope, start = torch.linalg.lstsq(columns, torch.ones_like(t)[:, None]).solution.flatten().tolist()
    if slope < 0 or start < 0:
        k = 0 if start < 0 else 1
        alone = float(columns[:, k].sum() / columns[:, k].square().sum())
        slope, start = (alone, 0.0) if k == 0 else (0.0, alone)
    error = float((columns @ torch.tensor([slope, start], dtype=torch.float64) - 1).abs().max())
    return Fit(slope, start, power, error)


def largest(seconds: Callable[[float], float], limit: float) -> float:
    """The largest x at which a growing time is within the limit; 0 where none is."""
    if seconds(1.0) > limit:
        return 0.0
    low, high = 1.0, 2.0
    while seconds(high) <= limit:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if seconds(middle) <= limit else (low, middle)
    return low


def direction_seconds(a: Fit, ranks: int, bandwidth: float, d: int = D, gather: bool = False) -> Callable:
    """A direction of n particles at a given bandwidth. With gather every rank does all pairs; a ring's blocks travel
    during the work, so that the sum is an upper bound."""
    to = Link(ranks)

    def seconds(n: float) -> float:
        pairs = n * n if gather else n * n / ranks
        return a.slope * pairs + a.start + to.ring(n / ranks * d * FLOAT) / bandwidth

    return seconds


def step_seconds(step: Fit, pair: float, ranks: int, parameters: float, bandwidth: float) -> Callable:
    """A training step of a batch: samples are shared out, the optimizer's part is not, nor are the pairs of codes,
    which are gathered; gradients are all-reduced."""

    def seconds(batch: float) -> float:
        samples = step.slope * batch / ranks + step.start
        return samples + pair * batch * batch + Link(ranks).reduce(parameters * FLOAT) / bandwidth

    return seconds


class Prediction(NamedTuple):
    """A direction by the ring on R GPUs: per rank, in bytes, flop and seconds."""

    pairs: float
    flop: float
    peak: float
    streamed: float
    median: float
    memory: float
    sent: float
    link: float


def on_gpus(n: float, ranks: int, gpu: Gpu = H100, d: int = D) -> Prediction:
    """`peak`: the products at the peak rate of fp32, a bound for any kernel. `streamed`: as it is written now, the
    products and then every elementwise step at the peak rate of memory. `median`: its passes, in the same way."""
    pairs, own = n * n / ranks, n / ranks * d * FLOAT
    flop = 4 * d * pairs
    sent = Link(ranks).ring(own)
    peak = flop / gpu.flop_per_s
    streamed = peak + pairs * DIRECTION_BYTES / gpu.memory_bytes_per_s
    median = DIGITS * pairs * (2 * d / gpu.flop_per_s + DIGIT_BYTES / gpu.memory_bytes_per_s)
    tile = min(TILES, 4 * pairs * FLOAT)
    return Prediction(pairs, flop, peak, streamed, median, BLOCKS * own + tile, sent, sent / gpu.link_bytes_per_s)


def fits_in_memory(gpu: Gpu = H100, ranks: int = 1, d: int = D) -> float:
    return (gpu.memory - TILES) / (BLOCKS * d * FLOAT) * ranks


def rounded(x: float) -> str:
    """Two digits: 41,000; 2.3e+08."""
    if x == 0:
        return "–"
    digits = 10 ** (math.floor(math.log10(x)) - 1)
    x = round(x / digits) * digits
    return f"{x:.1e}" if x >= 1e8 else f"{x:,.0f}" if x >= 10 else f"{x:.2g}"
