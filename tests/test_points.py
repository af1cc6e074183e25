"""Point sets: moments and supports by definition; modes counted on samples with known modes."""

import json
import math

import pytest
import torch
from helpers import command

from ivfast import metrics
from ivfast.data import load, points
from ivfast.data.points import POINTS, Mixture
from ivfast.models import build, preset
from ivfast.runs import load_system, report
from ivfast.runs.evaluation import Evaluation

N = 40_000
MIXTURES = [name for name, known in POINTS.items() if isinstance(known, Mixture)]


@pytest.mark.parametrize("name", POINTS)
def test_points_follow_the_seed(name):
    one, same, other = (points.load(name, 50, seed) for seed in (3, 3, 4))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert (one.dtype, one.shape) == (torch.float32, (50, 4 if name == "four-points" else 2))


@pytest.mark.parametrize("name", MIXTURES)
def test_moments_of_each_mode(name):
    mixture, x = POINTS[name], points.load(name, N, seed=int(torch.randint(1000, ()))).double()
    modes = len(mixture.centers)
    mode = torch.cdist(x, mixture.centers.double()).argmin(1)
    share = torch.bincount(mode, minlength=modes) / N
    assert (share - 1 / modes).abs().max() < 6 * math.sqrt(1 / modes / N)  # six deviations of a count
    for i in range(modes):
        own, n = x[mode == i] - mixture.centers[i], int((mode == i).sum())
        assert own.mean(0).abs().max() <= 6 * mixture.deviation / math.sqrt(n)
        if mixture.deviation:
            assert (own.std(0) / mixture.deviation - 1).abs().max() < 6 / math.sqrt(2 * n)


def test_centers_are_the_papers():
    ring, eight, grid = (POINTS[name] for name in ("ring", "8-gaussians", "grid"))
    assert (len(ring.centers), ring.deviation) == (8, 0.01)
    torch.testing.assert_close(ring.centers.norm(dim=1), torch.ones(8))
    torch.testing.assert_close(eight.centers, math.sqrt(2) * ring.centers)
    gaps = torch.pdist(ring.centers).sort().values[:8]
    torch.testing.assert_close(gaps, torch.full((8,), 2 * math.sin(math.pi / 8)))
    assert set(map(tuple, grid.centers.tolist())) == {(i, j) for i in range(-4, 5, 2) for j in range(-4, 5, 2)}
    assert torch.equal(POINTS["four-points"].centers, torch.eye(4))


def test_checkerboard_is_uniform_on_its_dark_squares():
    x = points.load("checkerboard", N)
    column, row = ((x + 4) / 2).floor().long().unbind(1)
    assert x.min() >= -4 and x.max() <= 4  # noqa: PT018  one interval
    assert ((column + row) % 2 == 0).all()
    share = torch.bincount(4 * column + row, minlength=16) / N
    assert (share[share > 0] - 1 / 8).abs().max() < 6 * math.sqrt(1 / 8 / N)
    assert (share > 0).sum() == 8
    assert abs(float((x / 2 % 1).mean()) - 0.5) < 0.01


def test_spirals_are_two_arms_turned_by_half():
    x = points.load("spirals", N)
    r = 3 * x.norm(dim=1)
    assert x.mean(0).abs().max() < 0.05
    assert 9 < r.quantile(0.99) < 3 * math.pi + 1.5
    # r = 3π √u: r² is uniform except for the blur, so a quarter of the points lie within half the radius
    assert abs(float((r < 1.5 * math.pi).float().mean()) - 0.25) < 0.03
    # every point lies near an arm or its rotation by 180°: blur is at most .5·√2/3, noise .1
    u = torch.linspace(0, 3 * math.pi, 400)
    arm = torch.stack([-u * u.cos() + 0.25, u * u.sin() + 0.25], 1) / 3
    distance = [torch.cdist(x, side * arm).min(1).values for side in (1, -1)]
    assert torch.minimum(*distance).max() < 0.36 / 3 + 0.6
    assert abs(float((distance[0] < distance[1]).float().mean()) - 0.5) < 0.02


def test_data_sets_of_points_load_like_the_others(tmp_path):
    ring = load("ring", tmp_path)
    assert torch.equal(ring.train, points.load("ring", 50_000, 0))
    assert torch.equal(ring.test, points.load("ring", 10_000, 1))
    assert (ring.train_labels, ring.test_labels, ring.classes) == (None, None, ())
    assert len(load("ring", limit=100).train) == 100
    with pytest.raises(ValueError, match=r"image_size and channels must be None for points \(ring\), got 8, None"):
        load("ring", image_size=8)
    with pytest.raises(ValueError, match="name must be one of 'ring'"):
        points.load("rings", 5)
    with pytest.raises(ValueError, match="n must be an integer >= 1, got 0"):
        points.load("ring", 0)


@pytest.mark.parametrize("name", MIXTURES)
def test_true_samples_cover_every_mode(name):
    mixture = POINTS[name]
    modes = metrics.point_modes(points.load(name, 20_000), mixture)
    within = 1 - math.exp(-4.5)  # in two dimensions, 3 deviations
    assert modes.covered == len(mixture.centers)
    assert modes.confident == pytest.approx(within if mixture.deviation else 1, abs=6e-3)
    # the histogram of n samples over k modes has a KL of (k − 1) / 2n on average
    assert modes.kl < 5 * len(mixture.centers) / 40_000


def test_modes_need_samples_of_quality():
    ring = POINTS["ring"]
    blur = ring.centers.repeat(100, 1) + 0.2 * torch.randn(800, 2)
    gate = 3 * ring.deviation
    good = (torch.cdist(blur, ring.centers).min(1).values <= gate).sum()
    assert metrics.point_modes(blur, ring).confident == pytest.approx(int(good) / 800)
    edge = ring.centers[:1] + torch.tensor([[0.0299, 0.0], [0.0301, 0.0]])
    assert metrics.point_modes(edge, ring) == (1, pytest.approx(math.log(8)), 0.5)
    assert metrics.point_modes(torch.zeros(5, 2), ring) == (0, math.inf, 0)


def test_kl_is_that_of_the_histogram():
    ring = POINTS["ring"]
    x = torch.cat([ring.centers[:1].expand(30, 2), ring.centers[3:4].expand(10, 2), torch.zeros(60, 2)])
    modes = metrics.point_modes(x, ring)
    assert (modes.covered, modes.confident) == (2, 0.4)
    assert modes.kl == pytest.approx(0.75 * math.log(0.75 * 8) + 0.25 * math.log(0.25 * 8))


@pytest.mark.parametrize("system", ["dcgan", "ivaae-rad"])
def test_looks_at_points_while_training_and_after(system, tmp_path):
    ring = load("ring", limit=500)
    settings = preset(system, "ring")
    network = build(settings, (2,))
    values = report.while_training(ring)(network)
    assert values.keys() == {"modes", "modes_confident"} | ({"fld"} if system == "ivaae-rad" else set())
    (tmp_path / "log.jsonl").touch()
    drawn = report.draw(network, ring, tmp_path)
    assert all(path.is_file() for path in drawn.values())
    evaluation = Evaluation(network, ring, n=300)
    found = {value.name: value.value for name in evaluation.default() for value in evaluation.run(name)}
    expected = metrics.point_modes(metrics.generate(network, 300), POINTS["ring"])
    assert [found[name] for name in ("modes", "modes_kl", "modes_confident")] == list(expected)
    with pytest.raises(ValueError, match="classifier-score needs images, and ring holds points"):
        evaluation.run("classifier-score")


def test_the_command_line_trains_samples_and_evaluates(tmp_path, monkeypatch, threads):
    threads(1)
    monkeypatch.chdir(tmp_path)

    options = ("--data", "ring", "--steps", 3, "--k", 2, "--mu", 0.25, "--lam", 0.5, "--packing", 4)
    text = command("train", "ivlsgan", *options, "--device", "cpu", "--set", "tensorboard=false", "--out", "run")
    assert "50,000 training and 10,000 test points 2, codes of 16" in text
    _, settings = load_system("run")
    assert (settings.k, settings.mu, settings.lam, settings.packing) == (2, 0.25, 0.5, 4)
    assert "100 samples of 2 coordinates in run/samples.png" in command("sample", "run", "-n", 100)
    assert "--out must end in .png for points" in command("sample", "run", "--out", "folder", code=2)
    command("evaluate", "run", "--samples", 500)
    assert set(json.loads((tmp_path / "run" / "metrics.json").read_text())) == {
        "fld", "modes", "modes_kl", "modes_confident", "histogram_kl", "histogram_jsd", "histogram_js", "samples", "seed",
    }  # fmt: skip
