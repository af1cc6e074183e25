"""The eager scripts that serve as the training baseline compute the same as ivfast: every loss and weight, at every
step."""

import json
import math
from dataclasses import replace

import pytest
import torch

from ivfast import bench
from ivfast.bench.studies import eager, train
from ivfast.data import load


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


@pytest.fixture(scope="module")
def digits():
    return load("digits").train


def assert_same(errors):
    of_losses, of_weights = errors
    assert of_losses <= train.LOSS_TOLERANCE
    assert of_weights <= train.WEIGHT_TOLERANCE


@pytest.mark.parametrize("joint", [False, True], ids=["eager", "joint"])
@pytest.mark.parametrize("system", eager.SCRIPTS)
def test_a_script_is_the_system(system, joint, digits, rounding):
    settings = train.settings_of(system, "digits")
    if torch.get_default_dtype() == torch.float64:
        assert max(train.compare(settings, digits, joint)) < rounding.gradient
    else:
        assert_same(train.check(settings, digits, joint))


def test_batch_normalisation_sees_the_same_batches():
    settings = replace(train.settings_of("ivaae-rad", "cifar10"), width=4, discriminator_width=16, batch_size=16)
    assert_same(train.check(settings, torch.randint(256, (60, 3, 16, 16), dtype=torch.uint8), joint=False))


def test_a_script_that_moves_the_encoder_too_early_is_found_out(digits, monkeypatch):
    gradients = eager.Script.decoder_gradients

    def early(self, x):
        self.optimizers["encoder"].step()
        gradients(self, x)

    monkeypatch.setattr(eager.Script, "decoder_gradients", early)
    _, of_weights = train.check(train.settings_of("wae-mmd", "digits"), digits, joint=False)
    assert of_weights > 10 * train.WEIGHT_TOLERANCE
    with pytest.raises(ArithmeticError, match="eager is not wae-mmd: losses"):
        train.measure("wae-mmd", "digits", steps=1, deadline=0)


def test_a_script_whose_weights_are_lost_is_found_out(digits, monkeypatch):
    monkeypatch.setattr(eager.Script, "recon_weight", lambda self: float("nan"))
    assert all(map(math.isnan, train.check(train.settings_of("wae-mmd", "digits"), digits, joint=False)))


def test_images_and_log_of_a_script(digits):
    system = train.run_of(replace(train.settings_of("wae-mmd", "digits"), log_every=2), digits).system
    script = eager.Script(system, digits)
    x = next(script.batches)
    assert (x.shape, x.dtype) == ((64, 1, 8, 8), torch.float32)
    assert (x.min(), x.max()) == (-1, 1)
    script = eager.WaeMmd(system, digits)
    for _ in range(24):  # an epoch has 23 batches
        script.advance()
    assert len(script.log) == 12
    assert all(isinstance(value, float) for line in script.log for value in line)


def test_the_table_has_ratios_and_the_parts_of_a_step(tmp_path, capsys):
    train.main(["ivaae-svgd:digits", "--steps", "2", "--threads", "1", "--out", str(tmp_path)])
    (path,) = tmp_path.glob("train-*.json")
    rows = {row["provider"]: row for row in json.loads(path.read_text())["rows"]}
    assert rows.keys() == {"ivfast", "eager", "eager-joint"}
    assert all(row["size"] == [64, 1, 8, 8] and row["steps"] >= 2 for row in rows.values())
    assert rows["eager"]["over_ivfast"] == pytest.approx(rows["eager"]["us"] / rows["ivfast"]["us"])
    assert 0 <= rows["eager"]["error"] <= train.LOSS_TOLERANCE
    assert list(rows["ivfast"]["parts_ms"])[:3] == ["batch", "share", "discriminator loss"]
    text = path.with_suffix(".md").read_text()
    assert f"| {rows['eager']['over_ivfast']:.2f} |" in text
    assert text in capsys.readouterr().out


def test_the_parts_of_a_step_are_no_more_than_the_step(digits):
    run = train.run_of(replace(train.settings_of("wae-gan", "digits"), ema=0.9), digits)
    parts = train.Parts(run)
    seconds = train.timed(run.advance)
    found = parts.milliseconds()
    phases = [
        f"{phase} {part}" for phase in ("discriminator", "autoencoder") for part in ("loss", "backward", "optimizer")
    ]
    assert list(found) == ["batch", "share", *phases, "record", "average"]
    assert min(found.values()) > 0
    assert sum(found.values()) < seconds * 1e3


def test_steps_take_turns(monkeypatch):
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    monkeypatch.setattr(train, "BLOCK", 0.0)
    samples = train.in_turns(calls, 3, deadline=float("inf"))
    assert [len(values) for values in samples.values()] == [3, 3]
    assert "".join(order[-6:]) == "abbaab"


def test_an_unknown_job_is_refused(capsys):
    with pytest.raises(SystemExit):
        train.main(["ivaae-svgd:mnits"])
    assert "got ivaae-svgd:mnits" in capsys.readouterr().err


def test_training_is_no_benchmark_of_an_op():
    assert "train" not in bench.names()
