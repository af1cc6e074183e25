"""What a caller has set by `torch.set_default_dtype` and `torch.set_default_device` changes no number.

The device "meta", whose tensors have no values, stands for a GPU.
"""

import contextlib
import importlib.util
import threading

import pytest
import torch
from helpers import set_by_caller, settings_with
from PIL import Image

import ivfast
from ivfast import _defaults, data, metrics, models, runs, testing
from ivfast.data.points import POINTS
from ivfast.runs import report
from ivfast.runs.evaluation import Evaluation
from ivfast.train import checkpoint
from ivfast.train.loop import fit

DEFAULTS = [(torch.float64, "cpu"), (torch.bfloat16, "cpu"), (torch.float32, "meta"), (torch.float64, "meta")]
SMALL = {
    "steps": 2,
    "batch_size": 8,
    "latent_dim": 4,
    "width": 12,
    "discriminator_width": 12,
    "log_every": 1,
    "vae_steps": 1,
    "tensorboard": False,
    "ema": 0.9,
}
FIRST = {case.op: case for case in reversed(testing.CASES)}


def flat(result):
    """The tensors and numbers of a result."""
    if isinstance(result, dict):
        return flat(list(result.items()))
    if isinstance(result, list | tuple):
        return [leaf for part in result for leaf in flat(part)]
    return [result]


def assert_unchanged(function, *defaults):
    """`function` gives the same tensors, of the same dtypes on the same devices, whatever the caller has set."""
    expected = flat(function())
    for default in defaults or DEFAULTS:
        with set_by_caller(*default):
            found = flat(function())
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert type(a) is type(b)
            if isinstance(a, torch.Tensor):
                assert (a.dtype, a.device) == (b.dtype, b.device), default
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
            else:
                assert a == b or a != a, default


@pytest.mark.parametrize("implementation", ["auto", "reference"])
@pytest.mark.parametrize("case", FIRST.values(), ids=str)
def test_ops(case, implementation):
    def call():
        tensors = testing.inputs(case, torch.float32, seed=3)
        with contextlib.nullcontext() if implementation == "auto" else ivfast.use("reference"):
            return testing.value_and_gradients(case, tensors)

    assert_unchanged(call)


def test_draws_of_ops():
    z = torch.randn(6, 4)

    def call():
        torch.manual_seed(5)
        bridges = [ivfast.radial_bridge(z, 2), ivfast.blockwise_bridge(z, 2), ivfast.svgd_bridge(z, 2)]
        return [*bridges, *ivfast.reparameterize(z, -z), ivfast.median_bandwidth(z)]

    assert_unchanged(call)


def test_sampling():
    x = torch.randn(7, 3)
    rules = {"default": None, "adagrad": lambda p: ivfast.sampling.AdaGradWithMomentum(p, 0.1)}
    assert_unchanged(
        lambda: [
            [*ivfast.svgd(x, 3, optimizer=rule)[:3], ivfast.svgd(x, 2, score=lambda x: -x, step_size=0.1).particles]
            for rule in rules.values()
        ]
    )


def test_statistics(tmp_path):
    x, path = torch.randn(300, 5), tmp_path / "x.npz"

    def call():
        both = ivfast.GaussianStatistics(5).update(x[:280]) + ivfast.GaussianStatistics(5).update(x[280:])
        both.save(path)
        again, copy = ivfast.GaussianStatistics.load(path), ivfast.GaussianStatistics(5)
        copy.load_state_dict(both.state_dict())
        states = [s.state_dict() for s in (both, again, copy)]
        return [*states, both.frechet_distance(again.update(x[:9])), copy.covariance]

    assert_unchanged(call)


@pytest.mark.parametrize("fused", [False, True])
def test_optimizer(fused):
    def call():
        torch.manual_seed(2)
        layer = ivfast.nn.Linear(1024, 1024, device="cpu", dtype=torch.float32)
        optimizer = ivfast.optim.Adam(layer.parameters(), fused=fused)
        optimizer.fuse([layer])
        for _ in range(2):
            layer(torch.ones(4, 1024, device="cpu", dtype=torch.float32)).square().sum().backward()
            optimizer.step()
        other = ivfast.optim.Adam(layer.parameters(), fused=fused)
        other.load_state_dict(optimizer.state_dict())
        return [list(state.values()) for state in (*optimizer.state.values(), *other.state.values())]

    assert_unchanged(call, *DEFAULTS[1::2])


def test_data(tmp_path):
    for name, of_class in (("a", 40), ("b", 200)):
        (tmp_path / name).mkdir()
        for i in range(6):
            Image.new("RGB", (8, 8), (of_class, 9 * i, 0)).save(tmp_path / name / f"{i}.png")

    def call():
        for path in (tmp_path / ".ivfast").glob("*"):
            path.unlink()
        sets = [data.load(name, limit=40) for name in ("digits", "stacked-digits", *POINTS)]
        sets.append(data.load("folder", tmp_path, 8, progress=False))
        digits = sets[0]
        return [
            *sets,
            data.target_of(digits, "negative"),
            data.stratified(digits.train_labels, 0.5),
            data.points.load("ring", 5),
            data.load("digits", image_size=5, channels=3, limit=9),
        ]

    assert_unchanged(call, DEFAULTS[0], DEFAULTS[3])


def test_modes_of_points_are_made_at_import():
    def call():
        spec = importlib.util.find_spec("ivfast.data.points")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return [known.centers for known in module.POINTS.values() if hasattr(known, "centers")]

    assert_unchanged(call)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", limit=60)


def trained(system, dataset, out):
    """Everything that a checkpoint holds, the log's losses and metrics, and what the system draws."""
    settings = runs.with_classes(settings_with(SMALL, {"system": system, "data": dataset.name}), dataset)
    made = models.build(settings, dataset.train.shape[1:])
    images, labels = runs.training_set(made, dataset)
    history = fit(made, images, settings, out, labels=labels, evaluate=report.while_training(dataset), progress=False)
    kept = [{**line.get("losses", {}), **line.get("metrics", {})} for line in history]
    again, _ = runs.load_system(out)
    drawn = again.sample(3, torch.Generator().manual_seed(1)) if hasattr(again, "sample") else None
    torch.manual_seed(4)
    return [checkpoint.read(out / checkpoint.LAST).tensors, kept, drawn, again.rand(2), again.randn(2, 3)]


@pytest.mark.parametrize("system", models.SYSTEMS)
def test_a_run(system, digits, tmp_path):
    folders = iter(tmp_path / str(i) for i in range(9))
    assert_unchanged(lambda: trained(system, digits, next(folders)), DEFAULTS[3])


def test_metrics(digits, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    trained("avb", digits, tmp_path / "run")
    points, codes = torch.randn(50, 2), torch.randn(40, 3)

    def call():
        for path in (tmp_path / "cache").rglob("*.safetensors"):
            path.unlink()
        system, _ = runs.load_system(tmp_path / "run")
        evaluation = Evaluation(system, digits, n=20)
        drawn = report.draw(system, digits, tmp_path / "run")
        classifier = evaluation.classifier
        return [
            [tuple(value) for name in evaluation.default() for value in evaluation.run(name)],
            [path.read_bytes() for path in drawn.values() if path.name != "curves.png"],
            metrics.histogram_divergence(points, points.flip(1)),
            metrics.point_modes(points, POINTS["ring"]),
            metrics.modes(classifier, digits.train[:4].expand(-1, 3, -1, -1), confidence=0.1),
            metrics.kl_to_prior(codes),
            metrics.latent_frechet_distance(codes),
            metrics.conditional_accuracy(classifier, digits.test),
            metrics.probe.probe(codes, digits.train_labels[:40], codes, digits.train_labels[:40], steps=2),
        ]

    assert_unchanged(call, DEFAULTS[3])


def test_a_loss_that_fails_leaves_the_callers_defaults(digits, tmp_path):
    settings = settings_with(SMALL, {"system": "wae-mmd"})
    with set_by_caller(torch.float64, "meta"), pytest.raises(ValueError, match="images must have shape"):
        fit(models.build(settings, (1, 8, 8)), digits.train[:, :, 1:], settings, tmp_path)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_autocast_of_the_caller(digits, tmp_path, precision):
    """The precision of a run is its setting; and what is measured afterwards is measured in float32."""

    def weights(out):
        settings = settings_with({**SMALL, "precision": precision}, {"system": "wae-gan"})
        made = models.build(settings, (1, 8, 8))
        fit(made, digits.train, settings, out, progress=False, evaluate=report.while_training(digits))
        return [*checkpoint.read(out / checkpoint.LAST).tensors.values(), metrics.codes(made, digits.test)]

    expected = weights(tmp_path / "without")
    with torch.autocast("cpu", torch.bfloat16):
        found = weights(tmp_path / "within")
        assert torch.is_autocast_enabled("cpu")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_threads_share_the_defaults():
    """The last one that is inside restores what the caller had set."""
    entered, leave = threading.Event(), threading.Event()

    def inside():
        with _defaults.initial():
            entered.set()
            leave.wait(10)

    other = threading.Thread(target=inside)
    with set_by_caller(torch.float64, "cpu"):
        with _defaults.initial():
            other.start()
            entered.wait(10)
        assert torch.get_default_dtype() == torch.float32
        leave.set()
        other.join()
        assert torch.get_default_dtype() == torch.float64
