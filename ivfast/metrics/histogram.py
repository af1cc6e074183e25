"""Histogram divergences between points in the plane and the distribution that they should follow."""

from typing import NamedTuple

import torch
from torch import Tensor


class HistogramDivergence(NamedTuple):
    kl: float  # as published, not a divergence in nats
    jsd: float  # as published
    js: float  # nats, from 0 to log 2


def histogram_divergence(real: Tensor, fake: Tensor, reach: float = 2.0, bins: int = 100) -> HistogramDivergence:
    """Divergences between two sets of points in the plane `[n, 2]`, by histograms on [-reach, reach]².

    Let p and q be the *densities* of real and generated points in bins² cells of side 2 reach/bins (points outside the
    square do not count), and ε = 1e-14. The published Soft-IntroVAE evaluation computes

        kl = Σ p log(p/(q + ε))/bins,   jsd = ½ Σ m [log(m/(p + ε)) + log(m/(q + ε))]/bins,   m = ½ (p + q).

    Sums run over cells without their area, so both are bins/(4 reach²) = 6.25 times a divergence in nats at the
    published bins = 100 and reach = 2. In cells where q is empty, log ε replaces log q, which gives about 220 for a set
    that misses all of p's cells. `jsd` has its arguments swapped, so it also counts empty cells by log ε and reaches
    110. Both mainly measure the share of points in cells that the other set left empty, and therefore depend on the
    number of points: published values use 5,000 per side. A set of points that all lie outside has q = 0.

    js is the Jensen–Shannon divergence of the masses of the same cells, with all points outside in one more cell: 0 if
    the histograms agree, log 2 if they are disjoint, and above 0 for two samples of the same distribution.

    Source: S5 Table 1; the public code of Daniel & Tamar 2021.
    """
    p, q = (_masses(points, reach, bins) for points in (real, fake))
    area = (2 * reach / bins) ** 2
    dp, dq = (mass[:-1] / (mass[:-1].sum().clamp_min(1e-300) * area) for mass in (p, q))
    dm, tiny = (dp + dq) / 2, 1e-14
    kl = (torch.xlogy(dp, dp) - dp * (dq + tiny).log()).sum() / bins
    jsd = sum((torch.xlogy(dm, dm) - dm * (d + tiny).log()).sum() for d in (dp, dq)) / (2 * bins)
    m = (p + q) / 2
    js = sum((torch.xlogy(mass, mass) - torch.xlogy(mass, m)).sum() for mass in (p, q)) / 2
    return HistogramDivergence(float(kl), float(jsd), float(js.clamp_min(0)))


def _masses(points: Tensor, reach: float, bins: int) -> Tensor:
    """Share of the points in each cell, row by row, and outside: float64 `[bins² + 1]`."""
    points = points.double()
    inside = (points.abs() <= reach).all(1)
    # the last cell of a row includes its upper edge, as in NumPy
    cell = ((points[inside] + reach) * (bins / (2 * reach))).long().clamp(max=bins - 1)
    counts = torch.bincount(cell[:, 0] * bins + cell[:, 1], minlength=bins**2)
    return torch.cat([counts, (~inside).sum().view(1)]).double() / len(points)
