"""Random numbers, shapes and layouts, all determined by one seed."""

import math
import random

import torch
from torch import Tensor

BORDERS = (15, 16, 17, 31, 32, 33, 63, 64, 65, 70)  # of the kernels' tiles
NUMBERS = 3000  # of an op's pairs and dimensions, n·m·d, in all sets of a batch


class Draw:
    """The random choices of one set."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = self.choice((torch.float64, torch.float32, torch.float32, torch.bfloat16, torch.float16))
        self.batch: tuple[int, ...] = ()
        self.scale = self.centre = 0.0
        self.renew()

    def renew(self) -> None:
        """The scale and the offset of the next tensors."""
        reach = 1 if self.dtype == torch.float16 else 4
        self.scale = 10 ** self.random.uniform(-reach, reach) if self.often(0.5) else 1.0
        self.centre = 0.0
        if self.often(0.3):
            self.centre = self.choice((-1, 1)) * 10 ** self.random.uniform(0, min(5, reach + 1))

    def choice(self, options):
        return self.random.choice(options)

    def often(self, probability: float) -> bool:
        return self.random.random() < probability

    def size(self, low: int = 1, most: int = 70) -> int:
        kind = self.random.random()
        size = self.random.randint(low, max(low, 8 if kind < 0.6 else 20))
        return min(max(low, self.choice(BORDERS) if kind > 0.9 else size), most)

    def leading(self, numbers: int) -> None:
        """Leading dimensions for sets of so many numbers."""
        count = self.choice((0, 0, 0, 1, 1, 2))
        self.batch = tuple(self.random.randint(1, 3) for _ in range(count))
        if count and self.often(0.04):
            self.batch = (0, *self.batch[1:])
        if math.prod(self.batch) * numbers > NUMBERS:
            self.batch = ()

    def pairs(self, low: int = 1) -> tuple[int, int, int]:
        """n, m and d of two sets of samples; large ones are rare, because formulas hold n·m·d numbers."""
        n, m, d = self.size(low), self.size(low), self.size()
        if n * m * d > 10 * NUMBERS:
            d = min(d, 5)
        return n, m, d

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def samples(self, *shape: int, repeats: bool = True) -> Tensor:
        """`[..., n, d]` of the current scale and offset, now and then with equal rows or constant columns."""
        x = self.normal(*self.batch, *shape) * self.scale + self.centre
        if repeats and self.often(0.15):
            rows = torch.randint(shape[-2], (shape[-2],), generator=self.generator)
            x = x[..., rows, :]
        if repeats and self.often(0.1):
            x[..., self.random.randrange(shape[-1])] = self.centre
        if self.batch and x.numel() and self.often(0.1):
            x = x[:1].expand(x.shape)
        return x

    def stored(self, x: Tensor) -> Tensor:
        """x rounded to the dtype, in one of the layouts that a caller may have."""
        x = x.to(self.dtype)
        layout = self.random.random()
        if x.dim() == 0 or layout < 0.5:
            return x if 0 in x.stride() else x.contiguous()
        if layout < 0.65 and x.dim() > 1:
            return x.mT.contiguous().mT
        if layout < 0.75 and x.dim() > 2:
            return x.movedim(0, -1).contiguous().movedim(-1, 0)
        if layout < 0.9:
            wide = torch.full((*x.shape, 2), float("nan"), dtype=x.dtype)
            wide[..., 1] = x
            return wide[..., 1]
        shifted = torch.empty(x.numel() + 1, dtype=x.dtype)  # off every alignment
        return shifted[1:].view(x.shape).copy_(x)
