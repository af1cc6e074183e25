"""Two-dimensional data sets with known distributions, drawn from a seed, and the four points of S4."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _check, _defaults


class Mixture(NamedTuple):
    """Equally likely Gaussians at `centers`, with the same standard deviation in every dimension."""

    centers: Tensor  # [modes, d]
    deviation: float
    about: str
    reach: float = 2.0  # histograms cover [-reach, reach]²

    @_defaults.initial()
    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        mode = torch.randint(len(self.centers), (n,), generator=generator)
        noise = torch.randn(n, self.centers.shape[1], generator=generator)
        return self.centers[mode] + self.deviation * noise


class Shape(NamedTuple):
    """A distribution without modes to count."""

    draw: Callable[[int, torch.Generator], Tensor]
    about: str
    reach: float = 4.0


def _circle(radius: float) -> Tensor:
    angle = torch.arange(8) * (math.pi / 4)
    return radius * torch.stack([angle.cos(), angle.sin()], 1)


@_defaults.initial()
def _spirals(n: int, generator: torch.Generator) -> Tensor:
    """±(−r cos r, r sin r)/3 for r = 3π √u, with blurred ends."""
    r = 3 * math.pi * torch.rand(n, generator=generator).sqrt()
    arm = torch.stack([-r * r.cos(), r * r.sin()], 1) + 0.5 * torch.rand(n, 2, generator=generator)
    sign = 2 * torch.randint(2, (n, 1), generator=generator) - 1
    return sign * arm / 3 + 0.1 * torch.randn(n, 2, generator=generator)


@_defaults.initial()
def _checkerboard(n: int, generator: torch.Generator) -> Tensor:
    """Uniform on the eight dark squares of side 2 in [-4, 4]²."""
    x = 4 * torch.rand(n, generator=generator) - 2
    row = 2 * torch.randint(2, (n,), generator=generator) - 2
    y = row + torch.rand(n, generator=generator) + x.floor() % 2
    return 2 * torch.stack([x, y], 1)


with _defaults.initial():
    POINTS: dict[str, Mixture | Shape] = {
        "ring": Mixture(_circle(1.0), 0.01, "8 Gaussians on a circle of radius 1, s.d. .01 (PacGAN)"),
        "grid": Mixture(
            torch.cartesian_prod(*[torch.arange(-4.0, 5.0, 2.0)] * 2),
            0.05,
            "25 Gaussians, 2 apart, s.d. .05 (VEEGAN)",
            5.0,
        ),
        "8-gaussians": Mixture(
            _circle(math.sqrt(2)), 0.02 / math.sqrt(2), "8 Gaussians, radius 1.41, s.d. .014 (Soft-IntroVAE; S5)"
        ),
        "spirals": Shape(_spirals, "two spirals (S5)"),
        "checkerboard": Shape(_checkerboard, "eight squares of a checkerboard (S5)"),
        "four-points": Mixture(torch.eye(4), 0.0, "the four unit vectors of four dimensions (S4)"),
    }


def find(name: str) -> Mixture | Shape:
    """The distribution of that name; ValueError if there is none."""
    _check.choice("name", name, tuple(POINTS))
    return POINTS[name]


def load(name: str, n: int, seed: int = 0) -> Tensor:
    """n points from a distribution in `POINTS`, float32 `[n, 2]` (`[n, 4]` for four-points), reproducible by seed.

    Raises:
        ValueError: an unknown name, n < 1, or a seed that is not an integer >= 0.
    """
    _check.count("n", n)
    _check.count("seed", seed, at_least=0)
    return find(name).draw(n, torch.Generator().manual_seed(seed))
