"""S5's histogram estimator of divergences, against NumPy and known values."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ivfast import data, metrics
from ivfast.data import points
from ivfast.models import build, preset
from ivfast.runs import evaluation as measures


def published(real, fake, reach, bins=100):
    """The estimator by NumPy's histogram and PyTorch's kl_div with "batchmean", which divides by the number of rows."""
    edges = [[-reach, reach]] * 2
    p, q = (
        torch.from_numpy(np.histogram2d(*x.double().numpy().T, bins=bins, density=True, range=edges)[0])
        for x in (real, fake)
    )
    m = (p + q) / 2

    def kl(target, estimate):
        return float(F.kl_div((estimate + 1e-14).log(), target, reduction="batchmean"))

    return kl(p, q), (kl(m, p) + kl(m, q)) / 2


@pytest.mark.parametrize("reach", [1.3, 2.0, 4.0])
def test_histograms_are_the_published_ones(reach):
    real, fake = points.load("spirals", 3000, 1), 1.5 * torch.randn(2000, 2)
    found = metrics.histogram_divergence(real, fake, reach)
    assert (found.kl, found.jsd) == pytest.approx(published(real, fake, reach), rel=1e-9)
    assert 0 < found.js < math.log(2)
    edge = torch.tensor([[reach, -reach], [reach, reach], [0.0, 0.0]])
    assert metrics.histogram_divergence(real, edge, reach)[:2] == pytest.approx(published(real, edge, reach), rel=1e-9)


def test_known_values_of_the_histogram_estimator():
    real, again = (points.load("8-gaussians", 5000, seed) for seed in (1, 2))
    point = metrics.histogram_divergence(real, torch.zeros(5000, 2))
    assert (point.kl, point.jsd) == pytest.approx((220, 110), abs=2)
    assert point.js == pytest.approx(math.log(2))
    itself = metrics.histogram_divergence(real, again)
    assert itself.kl < 2
    assert itself.jsd < 1
    assert 0 < itself.js < 0.01
    assert metrics.histogram_divergence(real, real) == pytest.approx((0, 0, 0), abs=1e-9)
    mode = metrics.histogram_divergence(real, real[(real - real[0]).norm(dim=1) < 0.5])
    # one of eight equal modes: KL(p ‖ m)/2 + KL(q ‖ m)/2 with two levels
    p, q = torch.tensor([1 / 8, 7 / 8]).double(), torch.tensor([1.0, 0.0]).double()
    m = (p + q) / 2
    expected = float((torch.xlogy(p, p / m) + torch.xlogy(q, q / m)).sum() / 2)
    assert mode.js == pytest.approx(expected, abs=0.02)
    outside = metrics.histogram_divergence(real, torch.full((10, 2), 9.0))
    assert outside.js == pytest.approx(math.log(2))
    assert all(map(math.isfinite, outside))
    x, y = torch.randn(500, 2), torch.randn(700, 2) + 1
    assert metrics.histogram_divergence(x, y).js == pytest.approx(metrics.histogram_divergence(y, x).js)


def test_histogram_metric_of_a_trained_system():
    gaussians = data.load("8-gaussians", limit=400)
    system = build(preset("s-introvae", "8-gaussians"), (2,))
    evaluation = measures.Evaluation(system, gaussians, n=300)
    assert evaluation.default() == ["fld", "modes", "histogram"]
    values = {value.name: value.value for value in evaluation.run("histogram")}
    expected = metrics.histogram_divergence(gaussians.test[: measures.HISTOGRAM], metrics.generate(system, 300))
    assert list(values.values()) == list(expected)
    assert list(values) == ["histogram_kl", "histogram_jsd", "histogram_js"]
    with pytest.raises(ValueError, match="histogram needs points in the plane, got digits"):
        measures.Evaluation(build(preset("s-introvae", "digits"), (1, 8, 8)), data.load("digits")).run("histogram")
