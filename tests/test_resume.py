"""Runs that stop: exact resume, the guard against NaN, Ctrl-C, atomic checkpoints."""

import dataclasses
import json
import math
import os
import resource
import signal

import pytest
import safetensors.torch
import torch
from helpers import small
from test_train import losses, train

from ivfast.models import SYSTEMS, build
from ivfast.models.ivaae import IvaaeRadial
from ivfast.runs import load_system
from ivfast.train import checkpoint
from ivfast.train.batches import as_images
from ivfast.train.checkpoint import CheckpointError
from ivfast.train.loop import Interrupted, NonFiniteLoss, NonFiniteWeights, fit

SHAPE = (1, 8, 8)
PER_EPOCH = 7  # 60 images in batches of 8, four dropped


@pytest.fixture
def images():
    return torch.randint(256, (60, *SHAPE), dtype=torch.uint8)


def assert_same_bits(one, other):
    a, b = checkpoint.read(one / checkpoint.LAST), checkpoint.read(other / checkpoint.LAST)
    assert a.tensors.keys() == b.tensors.keys()
    different = [name for name in a.tensors if not torch.equal(a.tensors[name], b.tensors[name])]
    assert not different
    assert {k: v for k, v in a.about.items() if k != "seconds"} == {k: v for k, v in b.about.items() if k != "seconds"}


@pytest.mark.parametrize(
    ("system", "ema", "stop"), [(name, 0.0, 20) for name in SYSTEMS] + [("ivaae-rad", 0.9, 21), ("wae-gan", 0.9, 12)]
)
def test_resumed_run_has_the_bits_of_an_uninterrupted_one(system, ema, stop, images, tmp_path):
    settings = small(system, ema=ema, steps=40, milestones={2: 0.5, 4: 0.1})
    _, straight = train(settings, images, tmp_path / "straight")

    def evaluate(system):
        return {"noise": float(torch.randn(()))}  # must not affect the run's own random numbers

    _, first = train(dataclasses.replace(settings, steps=stop), images, tmp_path / "parts", evaluate=evaluate)
    assert first[-1]["kind"] == "metrics"
    _, history = train(settings, images, tmp_path / "parts", resume=True)
    assert losses(history) == losses(straight)
    assert_same_bits(tmp_path / "straight", tmp_path / "parts")
    logged = [json.loads(line) for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert logged == history
    assert [line["step"] for line in losses(history)] == [6, 12, 18, 24, 30, 36, 40]


def test_resume_drops_log_lines_that_the_checkpoint_does_not_cover(images, tmp_path):
    settings = small(steps=24)
    _, straight = train(settings, images, tmp_path / "straight")
    train(dataclasses.replace(settings, steps=13), images, tmp_path / "killed")
    with open(tmp_path / "killed" / "log.jsonl", "a") as log:
        log.write(json.dumps({"kind": "losses", "step": 18, "losses": {}}) + '\n{"kind": "los')
    _, history = train(settings, images, tmp_path / "killed", resume=True)
    assert losses(history) == losses(straight)


@pytest.mark.parametrize("looks", [0, 1, 2])  # after one, two and three epochs; the last is the run's end
def test_stopped_between_a_checkpoint_and_its_metrics_they_are_made_up_for(looks, images, tmp_path):
    settings = small(steps=3 * PER_EPOCH, save_every=1, evaluate_every=1)
    seen = []

    def evaluate(system):
        seen.append(float(next(iter(system.modules["encoder"].parameters())).sum()))
        return {"weights": seen[-1]}

    def stopping(system):
        if len(seen) == looks:
            raise KeyboardInterrupt
        return evaluate(system)

    _, straight = train(settings, images, tmp_path / "straight", evaluate=evaluate)
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        train(settings, images, tmp_path / "stopped", evaluate=stopping)
    for _ in range(2):  # the second time, nothing is left to do
        _, history = train(settings, images, tmp_path / "stopped", resume=True, evaluate=evaluate)
        assert len(seen) == 3
    metrics = [[line for line in lines if line["kind"] == "metrics"] for lines in (straight, history)]
    assert metrics[0] == metrics[1]
    assert [line["epoch"] for line in metrics[1]] == [1, 2, 3]


class Failing(IvaaeRadial):
    """A term of the encoder's loss becomes NaN in step `at`, or `at` sends signals."""

    at, signals, seen = 10**9, 0, 0

    def share(self, x):
        self.seen += 1
        if self.seen == self.at:
            for _ in range(self.signals):
                signal.raise_signal(signal.SIGINT)
        return super().share(x)

    def autoencoder_loss(self, shared):
        terms = super().autoencoder_loss(shared)
        if self.seen == self.at and not self.signals:
            terms["recon"] = terms["recon"] * torch.tensor(math.nan)
        return terms


def failing(settings, at, signals=0):
    system = Failing(settings, SHAPE)
    with torch.no_grad():  # the weights that build would have drawn
        for name, module in build(settings, SHAPE).modules.items():
            system.modules[name].load_state_dict(module.state_dict())
    system.at, system.signals = at, signals
    return system


@pytest.mark.parametrize("at", [2, 6, 17])
def test_nan_names_term_phase_and_step_and_keeps_the_last_good_checkpoint(at, images, tmp_path):
    settings = small(steps=30, save_every=1)
    with pytest.raises(NonFiniteLoss, match=rf"'recon' of phase 'autoencoder' became nan at step {at};") as caught:
        fit(failing(settings, at), images, settings, tmp_path, progress=False)
    assert (caught.value.term, caught.value.phase, caught.value.step) == ("recon", "autoencoder", at)
    last = tmp_path / checkpoint.LAST
    if at < PER_EPOCH:
        assert caught.value.checkpoint is None
        assert not last.exists()
    else:
        assert str(last) in str(caught.value)
        saved = checkpoint.read(last)
        assert saved.about["step"] == at // PER_EPOCH * PER_EPOCH
        assert all(x.isfinite().all() for x in saved.tensors.values())


def test_checkpoint_is_not_written_from_weights_that_are_not_finite(images, tmp_path):
    settings = small(steps=PER_EPOCH, save_every=1)
    system = build(settings, SHAPE)
    system.modules["decoder"].register_buffer("unused", torch.full((3,), math.inf))
    with pytest.raises(NonFiniteWeights, match=rf"decoder\.unused is not finite after step {PER_EPOCH}"):
        fit(system, images, settings, tmp_path, progress=False)
    assert not (tmp_path / checkpoint.LAST).exists()


def test_ctrl_c_finishes_the_step_saves_and_resumes_to_the_same_bits(images, tmp_path):
    settings = small(steps=23)
    _, straight = train(settings, images, tmp_path / "straight")
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="stopped after step 13; resume with") as caught:
        fit(failing(settings, 13, signals=1), images, settings, tmp_path / "stopped", progress=False)
    assert isinstance(caught.value, KeyboardInterrupt)
    assert signal.getsignal(signal.SIGINT) is handler
    assert checkpoint.read(tmp_path / "stopped" / checkpoint.LAST).about["step"] == 13
    _, history = train(settings, images, tmp_path / "stopped", resume=True)
    assert losses(history) == losses(straight)
    assert_same_bits(tmp_path / "straight", tmp_path / "stopped")


def test_second_ctrl_c_stops_at_once(images, tmp_path):
    settings = small()
    with pytest.raises(KeyboardInterrupt) as caught:
        fit(failing(settings, 13, signals=2), images, settings, tmp_path, progress=False)
    assert not isinstance(caught.value, Interrupted)
    assert not (tmp_path / checkpoint.LAST).exists()


def test_failed_write_keeps_the_old_checkpoint_and_says_so(tmp_path):
    path = tmp_path / "last.safetensors"
    checkpoint.write(path, {"weights/a": torch.arange(5.0)}, {"step": 1})
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))  # like a full disk: the write itself fails
    try:
        with pytest.raises(CheckpointError, match=r"could not be written .*; the previous checkpoint is intact"):
            checkpoint.write(path, {"weights/a": torch.zeros(2**20)}, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["last.safetensors"]


def test_load_system_names_the_file_and_the_reason(images, tmp_path):
    settings = small(steps=2)
    system, _ = train(settings, images, tmp_path)
    path = tmp_path / checkpoint.LAST
    loaded, its_settings = load_system(tmp_path)
    assert its_settings == settings
    x = as_images(images[:4])
    system.train(False)
    assert torch.equal(loaded.decode(loaded.encode(x)), system.decode(system.encode(x)))

    whole, saved = path.read_bytes(), checkpoint.read(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"last\.safetensors: it is not a complete safetensors file"):
        load_system(tmp_path)
    path.write_bytes(b"hello")
    with pytest.raises(CheckpointError, match="it is not a complete safetensors file"):
        load_system(tmp_path)
    safetensors.torch.save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="not a checkpoint of ivfast"):
        load_system(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match="the file does not exist"):
        load_system(tmp_path)

    about = {k: v for k, v in saved.about.items() if k != "format"}
    name = "weights/decoder.0.weight"
    for tensors, reason in (
        ({k: v for k, v in saved.tensors.items() if k != name}, "the weight decoder.0.weight is missing"),
        ({**saved.tensors, "weights/extra": torch.zeros(1)}, "it has a weight extra"),
        ({**saved.tensors, name: torch.zeros(3)}, r"decoder.0.weight must have shape \(32, 8\), it has \(3,\)"),
    ):
        checkpoint.write(path, tensors, about)
        with pytest.raises(CheckpointError, match=reason):
            load_system(tmp_path)
    about["settings"] = {**about["settings"], "system": "biggan"}
    checkpoint.write(path, saved.tensors, about)
    with pytest.raises(CheckpointError, match="its settings cannot be used: system must be one of"):
        load_system(tmp_path)
