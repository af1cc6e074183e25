"""Steps as CUDA graphs, as far as can be tested on a CPU: a tape replaces the graph."""

import dataclasses
import json
import re

import pytest
import torch
from helpers import small
from tapes import SHAPE, Tape, assert_same_bits, random_images, tapes, train
from torch import nn

from ivfast.models import SYSTEMS, build
from ivfast.models.ivaae import WaeMmd
from ivfast.train import Settings, checkpoint
from ivfast.train import run as run_module
from ivfast.train.capture import WARM_UP, Captured, CudaGraphs, choose
from ivfast.train.phase import Phase, System
from ivfast.train.run import Run
from ivfast.train.watch import CannotCapture

PER_EPOCH = 7  # 60 images in batches of 8, four dropped


@pytest.fixture
def images():
    return random_images()


@pytest.mark.parametrize(
    ("system", "changes"),
    [(name, {}) for name in SYSTEMS]
    + [
        ("ivaae-svgd", {"ema": 0.9, "milestones": {1: 0.5, 2: 0.1}}),
        ("ivaae-rad", {"net": "conv", "width": 4, "precision": "bf16"}),
        ("wae-gan", {"fld_weight": 0.5}),
        ("ivaae-bw", {"fld_weight": 0.5, "encoder_loss": "confusion"}),
    ],
)
def test_captured_run_has_the_bits_of_an_uncaptured_one(system, changes, images, tmp_path):
    settings = small(system, **{"ema": 0.8, "milestones": {1: 0.5}, **changes})

    def evaluate(system):
        return {"noise": float(system.sample(3).sum() if hasattr(system, "sample") else torch.rand(()))}

    train(settings, images, tmp_path / "plain", evaluate=evaluate)
    with tapes() as made:
        _, history = train(settings, images, tmp_path / "captured", evaluate=evaluate)
    assert [tape.recorded for tape in made] == [1]
    assert [(line["step"], line["captured"], line["why"]) for line in history if line["kind"] == "capture"] == [
        (WARM_UP + 1, True, "a test")
    ]
    assert_same_bits(tmp_path / "plain", tmp_path / "captured")


def test_captured_and_uncaptured_parts_of_a_run_go_together(images, tmp_path):
    settings = small(ema=0.9, steps=23, milestones={1: 0.5})
    train(settings, images, tmp_path / "straight")
    train(dataclasses.replace(settings, steps=9), images, tmp_path / "parts")
    with tapes():
        train(dataclasses.replace(settings, steps=17), images, tmp_path / "parts", resume=True)
    train(settings, images, tmp_path / "parts", resume=True)
    for out in ("straight", "parts"):  # evaluations at the ends of parts
        log = [json.loads(line) for line in (tmp_path / out / "log.jsonl").read_text().splitlines()]
        (tmp_path / out / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in log if x["kind"] == "losses"))
    assert_same_bits(tmp_path / "straight", tmp_path / "parts")


class Intervals(System):
    """Two phases, the second every third step."""

    def __init__(self, settings, image_shape):
        super().__init__(settings, image_shape)
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            self.modules = {"one": nn.Linear(64, 3), "two": nn.Linear(64, 3)}
        self.phases = [
            Phase("often", self.adam("one"), lambda x: {"fit": self.both(x)}),
            Phase("rare", self.adam("two"), lambda x: {"fit": self.both(x)}, 3),
        ]

    def both(self, x):
        x = (x + torch.randn_like(x)).flatten(1)
        return (self.modules["one"](x) - self.modules["two"](x)).square().mean()


def test_phases_of_an_interval_have_a_graph_per_pattern(images, tmp_path):
    settings = small(ema=0.9, steps=40, log_every=5)
    train(settings, images, tmp_path / "plain", Intervals)
    with tapes() as made:
        _, history = train(settings, images, tmp_path / "captured", Intervals)
    assert made[0].recorded == 2
    assert [line["step"] for line in history if line["kind"] == "capture"] == [6]  # the fourth step without "rare"
    assert_same_bits(tmp_path / "plain", tmp_path / "captured")


class Stubborn(Tape):
    """A device that refuses to capture, as CUDA does: in the middle, and again at the end."""

    def capture(self, body):
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nCompile with ...")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")


def test_a_capture_that_the_device_refuses_says_where(images, tmp_path, monkeypatch):
    with tapes():
        monkeypatch.setattr(run_module, "CudaGraphs", lambda device: Stubborn())
        with pytest.raises(CannotCapture) as caught:
            train(small(steps=9), images, tmp_path)
    expected = r"capture \(test_capture.py:\d+\) failed: operation not permitted when stream is capturing; the system"
    assert re.search(expected, str(caught.value))
    assert "Compile" not in str(caught.value)


class Descent(WaeMmd):
    def __init__(self, settings, image_shape):
        super().__init__(settings, image_shape)
        parameters = [p for module in self.modules.values() for p in module.parameters()]
        self.phases = [Phase("autoencoder", torch.optim.SGD(parameters, lr=1e-4), self.autoencoder_loss)]


def test_a_rate_that_is_a_number_is_refused_where_milestones_would_change_it(images, tmp_path):
    settings = small("wae-mmd", milestones={1: 0.5}, steps=9)
    with tapes() as made:
        _, history = train(settings, images, tmp_path / "a", Descent)
        assert "in phase 'autoencoder', SGD has a number as its learning rate" in history[0]["why"]
        _, history = train(dataclasses.replace(settings, milestones={}), images, tmp_path / "b", Descent)
        assert history[0]["captured"] is True
    assert [tape.recorded for tape in made] == [0, 1]


def test_everything_that_a_step_keeps_stays_where_it_is(images):
    settings = small(ema=0.9, milestones={1: 0.5})
    run = Run(build(settings, SHAPE), images, settings, None, None)
    run.advance()

    def addresses():
        weights = [p for module in run.system.modules.values() for p in (*module.parameters(), *module.buffers())]
        states = [x for phase in run.system.phases for s in phase.optimizer.state.values() for x in s.values()]
        rates = [group["lr"] for phase in run.system.phases for group in phase.optimizer.param_groups]
        others = run.batches.rows, run.batches.images, run.record.values, run.record.row, *run.average.weights.values()
        return [x.data_ptr() for x in (*weights, *states, *rates, *others, *run.average.values.values())]

    before = addresses()
    for _ in range(2 * PER_EPOCH):
        if run.step % settings.log_every == 0:
            run.record.clear()
        run.advance()
        assert addresses() == before
    assert float(run.system.phases[0].optimizer.param_groups[0]["lr"]) == 0.5 * settings.learning_rate("default")


def test_a_rate_in_a_tensor_gives_the_bits_of_a_number(images):
    settings = small("ivaae-svgd", milestones={1: 0.3}, log_every=20)
    runs = [Run(build(settings, SHAPE), images, settings, None, None) for _ in range(2)]
    for phase in runs[1].system.phases:
        for group in phase.optimizer.param_groups:
            group["lr"] = group.pop("initial_lr")
    weights = []
    for run in runs:
        torch.manual_seed(settings.seed)
        for _ in range(2 * PER_EPOCH):
            run.advance()
        weights.append(nn.utils.parameters_to_vector(p for m in run.system.modules.values() for p in m.parameters()))
    assert isinstance(runs[1].system.phases[0].optimizer.param_groups[0]["lr"], float)
    assert torch.equal(*weights)


def test_the_default_follows_the_device_and_says_why(images, tmp_path):
    gpu = small(device="cuda")
    assert choose(gpu) == (True, "the default on CUDA: one launch per step")
    assert choose(dataclasses.replace(gpu, capture=False)) == (False, "turned off by --no-capture")
    assert choose(dataclasses.replace(gpu, capture=True, compile=True)) == (True, "requested by --capture")
    assert choose(dataclasses.replace(gpu, compile=True))[0] is False
    with pytest.raises(ValueError, match="capture needs a CUDA device, the run is on cpu; use --no-capture"):
        train(small(capture=True), images, tmp_path / "asked")
    _, history = train(small(steps=2), images, tmp_path / "cpu")
    assert history[0] == {
        "kind": "capture",
        "step": 1,
        "captured": False,
        "why": "CUDA graphs need a CUDA device, the run is on cpu",
    }


def test_old_settings_and_checkpoints_load(images, tmp_path):
    settings = small(steps=9)
    old = {name: value for name, value in settings.to_dict().items() if name != "capture"}
    assert Settings.from_dict(old) == settings
    train(settings, images, tmp_path / "straight")
    train(dataclasses.replace(settings, steps=5), images, tmp_path / "old")
    path = tmp_path / "old" / checkpoint.LAST
    saved = checkpoint.read(path)
    about = {**saved.about, "settings": {**old, "steps": 5}}
    checkpoint.write(path, saved.tensors, {k: v for k, v in about.items() if k != "format"})
    train(settings, images, tmp_path / "old", resume=True)
    a, b = (checkpoint.read(tmp_path / out / checkpoint.LAST).tensors for out in ("straight", "old"))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_cuda_graphs_give_the_bits_of_eager_steps(system, precision, images, tmp_path):
    settings = small(system, device="cuda", precision=precision, ema=0.9, milestones={1: 0.5}, steps=30)
    for name, value in (("plain", False), ("captured", True)):
        _, history = train(dataclasses.replace(settings, capture=value), images.cuda(), tmp_path / name)
        assert history[0]["captured"] is value
    a, b = (checkpoint.read(tmp_path / out / checkpoint.LAST).tensors for out in ("plain", "captured"))
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_names_what_it_could_not_capture(images, tmp_path):
    settings = small(device="cuda", capture=True)
    run = Run(build(settings, SHAPE), images.cuda(), settings, None, None)
    body = run.body

    def waits(due):
        body(due)
        torch.cuda.synchronize()  # not visible to any operator

    run.take = Captured(waits, lambda: run.place, CudaGraphs(run.device), required=True)
    for _ in range(WARM_UP):
        run.advance()
    with pytest.raises(CannotCapture, match=r"in the record of losses, .* failed: "):
        run.advance()
