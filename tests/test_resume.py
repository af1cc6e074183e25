"""Runs that stop: exact resume, the guard against NaN, Ctrl-C, atomic checkpoints."""

import dataclasses
import json
import math
import os
import re
import resource
import shlex
import signal
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from helpers import size, small
from test_train import losses, train

from ivfast.models import SYSTEMS, build
from ivfast.models.ivaae import IvaaeRadial
from ivfast.runs import load_system
from ivfast.train import checkpoint, lock
from ivfast.train.batches import as_images
from ivfast.train.checkpoint import CheckpointError
from ivfast.train.loop import Interrupted, NonFiniteLoss, NonFiniteWeights, RunInUse, fit
from ivfast.train.run import Run

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
    schedule = {"anneal_steps": 8} if system == "as-introvae" else {}  # it follows the number of steps otherwise
    settings = small(system, ema=ema, steps=40, milestones={2: 0.5, 4: 0.1}, **schedule)
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

    at, signals, seen, number = 10**9, 0, 0, signal.SIGINT

    def share(self, x):
        self.seen += 1
        if self.seen == self.at:
            for _ in range(self.signals):
                signal.raise_signal(self.number)
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


def test_a_folder_is_held_by_one_run_and_free_afterwards(images, tmp_path):
    settings = small(steps=7, evaluate_every=1)

    def second(system):
        with pytest.raises(RunInUse, match=rf"{tmp_path} is in use by process {os.getpid()} on \S+ since .*: wait for"):
            train(settings, images, tmp_path, resume=True)
        return {"refused": 1.0}

    _, history = train(settings, images, tmp_path, evaluate=second)
    assert history[-1]["metrics"] == {"refused": 1.0}
    train(dataclasses.replace(settings, steps=8), images, tmp_path, resume=True)


def test_a_folder_is_free_while_a_child_lives_on(tmp_path):
    with lock.held(tmp_path):
        child = os.fork()
        if not child:
            signal.pause()
    try:
        with lock.held(tmp_path), pytest.raises(RunInUse), lock.held(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_what_is_refused_leaves_no_folder(images, tmp_path):
    settings, out = small(batch_size=61), tmp_path / "run"
    with pytest.raises(ValueError, match="batch_size must be at most the number of images, 60, got 61"):
        train(settings, images, out)
    with pytest.raises(CheckpointError, match="the file does not exist"):
        train(small(), images, out, resume=True)
    assert not out.exists()


@pytest.mark.parametrize("ignored", [True, False])
def test_a_hangup_stops_the_run_unless_it_is_ignored_as_under_nohup(ignored, images, tmp_path):
    settings = small(steps=20)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        system = failing(settings, 13, signals=1)
        system.number = signal.SIGHUP
        if ignored:
            fit(system, images, settings, tmp_path, progress=False)
        else:
            with pytest.raises(Interrupted, match="stopped after step 13") as caught:
                fit(system, images, settings, tmp_path, progress=False)
            assert caught.value.signal == signal.SIGHUP
            assert [line["step"] for line in losses(caught.value.history)] == [6, 12]
        assert signal.getsignal(signal.SIGHUP) == (signal.SIG_IGN if ignored else signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert checkpoint.read(tmp_path / checkpoint.LAST).about["step"] == (20 if ignored else 13)


def test_the_command_that_resumes_can_be_pasted():
    command = str(Interrupted(Path("my runs/it's"), 3)).partition("with: ")[2]
    assert shlex.split(command) == ["ivfast", "train", "--resume", "--out", "my runs/it's"]


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

    about, name = saved.about, "weights/decoder.0.weight"
    for tensors, reason in (
        ({k: v for k, v in saved.tensors.items() if k != name}, "the tensor decoder.0.weight is missing"),
        ({**saved.tensors, "weights/extra": torch.zeros(1)}, "it has a tensor extra, which the system does not have"),
        ({**saved.tensors, name: torch.zeros(3)}, r"decoder.0.weight must be float32 \(32, 8\), it is float32 \(3,\)"),
        ({**saved.tensors, name: torch.zeros(32, 8).double()}, r"must be float32 \(32, 8\), it is float64 \(32, 8\)"),
    ):
        checkpoint.write(path, tensors, about)
        with pytest.raises(CheckpointError, match=reason):
            load_system(tmp_path)
    about = {**about, "settings": {**about["settings"], "system": "biggan"}}
    checkpoint.write(path, saved.tensors, about)
    with pytest.raises(CheckpointError, match=r"its settings cannot be used: .*biggan"):
        load_system(tmp_path)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder of a run with every kind of tensor, stopped in the middle of an epoch and of a log interval, and a run
    that could go on with it; do not change them."""
    out = tmp_path_factory.mktemp("stopped")
    images = torch.randint(256, (60, *SHAPE), dtype=torch.uint8)
    settings = small("wgan-gp", steps=16, ema=0.9, flip=True, discriminator_steps=3)
    train(settings, images, out)
    with torch.random.fork_rng():
        return out, Run(build(settings, SHAPE), images, settings, out, None)


def refusal(stopped, path, damage) -> str:
    """What is said about a copy of the checkpoint after `damage(path, its tensors, its metadata)`; nothing is loaded."""
    out, run = stopped
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((out / checkpoint.LAST).read_bytes())
    with safetensors.safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata()  # noqa: SIM118
    damage(path, tensors, metadata)
    run.out = path.parents[1]
    before = {name: x.clone() for name, x in checkpoint.weights_of(run.system).items()}
    order, state = run.batches.state(), torch.get_rng_state()
    with pytest.raises(CheckpointError, match=re.escape(f"{path}: ")) as caught:
        run.load()
    assert all(torch.equal(x, before[name]) for name, x in checkpoint.weights_of(run.system).items())
    assert all(torch.equal(x, order[name]) for name, x in run.batches.state().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(phase.optimizer.state_dict()["state"] for phase in run.system.phases)
    assert run.step == 0
    text = str(caught.value).removeprefix(f"{path}: ")
    assert "\n" not in text
    return text


def saved_as_it_is(change):
    """Tensors are changed, and the file written again with the metadata that it had."""

    def damage(path, tensors, metadata):
        change(tensors)
        safetensors.torch.save_file(tensors, path, metadata)

    return damage


def saved_anew(change):
    """Tensors and description are changed and written as a run would, with checksums that fit."""

    def damage(path, tensors, metadata):
        about = json.loads(metadata["ivfast"])
        change(tensors, about)
        checkpoint.write(path, tensors, about)

    return damage


def test_a_tensor_that_is_not_what_was_written_is_refused(stopped, tmp_path):
    names = list(checkpoint.read(stopped[0] / checkpoint.LAST).tensors)
    kinds = {names[i].split("/")[0]: names[i] for i in torch.randperm(len(names)).tolist()}  # any one of each
    for i, name in enumerate(kinds.values()):
        path = tmp_path / str(i) / checkpoint.LAST

        def flip(path, tensors, metadata, name=name):
            data = tensors[name].reshape(-1).view(torch.uint8)
            data[size(0, len(data) - 1)] ^= 1 << size(0, 7)
            safetensors.torch.save_file(tensors, path, metadata)

        assert refusal(stopped, path, flip).startswith(f"the tensor {name} is damaged")
        missing = saved_as_it_is(lambda tensors, name=name: tensors.pop(name))
        assert refusal(stopped, path, missing) == f"the tensor {name} is missing"
        shape = saved_as_it_is(lambda tensors, name=name: tensors.update({name: torch.zeros(3, 3)}))
        assert refusal(stopped, path, shape).startswith(f"the tensor {name} is damaged")
        missing = saved_anew(lambda tensors, about, name=name: tensors.pop(name))
        assert refusal(stopped, path, missing) == f"the tensor {name} is missing"
        for other in (torch.zeros(3, 3), torch.zeros(5, dtype=torch.int32)):
            wrong = saved_anew(lambda tensors, about, name=name, other=other: tensors.update({name: other}))
            assert re.search(
                rf"the tensor {name} must be \w+ \(|its data order is for 5 images", refusal(stopped, path, wrong)
            )


def test_a_flipped_bit_anywhere_in_the_file_is_refused(stopped, tmp_path):
    out, _ = stopped
    whole, path = (out / checkpoint.LAST).read_bytes(), tmp_path / checkpoint.LAST
    path.parent.mkdir(parents=True)
    header = 8 + int.from_bytes(whole[:8], "little")
    for at in [size(0, header - 1) for _ in range(60)] + [size(header, len(whole) - 1) for _ in range(10)]:
        data = bytearray(whole)
        data[at] ^= 1 << size(0, 7)
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=re.escape(f"{path}: ")):
            checkpoint.read(path)


def changed(**fields):
    return saved_anew(lambda tensors, about: about.update(fields))


def without(*fields):
    return saved_anew(lambda tensors, about: [about.pop(field) for field in fields])


def filled(name, value):
    return saved_anew(lambda tensors, about: tensors[name].copy_(torch.as_tensor(value)))


REFUSED = {
    "zeros as order": (filled("batches/order", 0), "batches/order must have each of 60 images once"),
    "rows beyond": (filled("batches/order", 120), r"batches/order must be of rows 0..119, it is of 120..120"),
    "negative rows": (filled("batches/order", -1), r"batches/order must be of rows 0..119, it is of -1..-1"),
    "position beyond": (filled("batches/position", 8), r"batches/position must be 2 after step 16, it is 8"),
    "negative position": (filled("batches/position", -1), r"batches/position must be 2 after step 16, it is -1"),
    "generator of zeros": (filled("batches/generator", 0), "batches/generator is not the state of a generator"),
    "random state of ones": (filled("random/cpu", 255), "random/cpu is not the state of a generator"),
    "losses not finite": (filled("record/values", math.nan), "record/values must be finite"),
    "too many steps": (
        filled("optimizer/discriminator/0/step", 17), r"discriminator/0/step must be a number of steps from 1 to 16",
    ),
    "more steps than the phase ran": (
        filled("optimizer/generator/0/step", 16), r"generator/0/step must be a number of steps from 1 to 6, it is 16",
    ),
    "half a step": (filled("optimizer/discriminator/0/step", 0.5), "discriminator/0/step must be a number of steps"),
    "NaN steps": (filled("optimizer/discriminator/0/step", math.nan), "discriminator/0/step must be a number of steps"),
    "no steps": (changed(step=0), "the field step must be an integer >= 1, got 0"),
    "another step": (changed(step=17), "record/values must be float32 .5, |batches/position must be 3 after step 17"),
    "step as text": (changed(step="16"), 'the field step must be an integer >= 1, got "16"'),
    "step true": (changed(step=True), "the field step must be an integer >= 1, got true"),
    "seconds not finite": (changed(seconds=math.nan), "the field seconds must be a finite number >= 0, got NaN"),
    "another shape": (changed(image_shape=[3, 8, 8]), r"image_shape must be \[1, 8, 8\], it is \[3, 8, 8\]"),
    "shape as text": (changed(image_shape="188"), "the field image_shape must be a list of integers"),
    "settings as list": (changed(settings=[]), "the field settings must be an object"),
    "record without names": (changed(record={"ran": {}}), "the field record must be the names of losses"),
    "record of another phase": (
        changed(record={"names": [["x", "y"]] * 4, "ran": {}}), r"record.names must be of losses|must be float32 \(4, 4\)",
    ),
    "no optimizer of a phase": (changed(optimizer={}), "the field optimizer must be of the phases"),
    "a parameter too many": (
        changed(optimizer={"discriminator": [99], "generator": []}), "optimizer names parameter 99 of phase",
    ),
    "format of the future": (
        lambda path, tensors, metadata: safetensors.torch.save_file(
            tensors, path, {**metadata, "ivfast": metadata["ivfast"].replace('"format": 2', '"format": 3')}
        ),
        "it has format 3, this version of ivfast reads 2",
    ),
    "no JSON": (
        lambda path, tensors, metadata: safetensors.torch.save_file(tensors, path, {**metadata, "ivfast": "{"}),
        "its metadata 'ivfast' is not JSON",
    ),
    "list as JSON": (
        lambda path, tensors, metadata: safetensors.torch.save_file(tensors, path, {**metadata, "ivfast": "[]"}),
        "its metadata 'ivfast' must be an object",
    ),
    "other settings with the old checksum": (
        lambda path, tensors, metadata: safetensors.torch.save_file(
            tensors, path, {**metadata, "ivfast": metadata["ivfast"].replace('"ema": 0.9', '"ema": 0.8')}
        ),
        "its metadata 'ivfast' is damaged",
    ),
    **{
        f"no {field}": (without(field), f"the field {field} is missing")
        for field in ("step", "seconds", "settings", "image_shape", "record", "optimizer")
    },
}  # fmt: skip


@pytest.mark.parametrize(("damage", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_loaded(damage, reason, stopped, tmp_path):
    assert re.search(reason, refusal(stopped, tmp_path / checkpoint.LAST, damage))


def test_a_parameter_without_gradients_has_no_state_and_resumes(images, tmp_path):
    settings = small(steps=5)

    def idle(settings):
        system = build(settings, SHAPE)
        system.phases[0].optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))], "lr": 1e-3})
        return system

    fit(idle(settings), images, settings, tmp_path, progress=False)
    settings = dataclasses.replace(settings, steps=7)
    fit(idle(settings), images, settings, tmp_path, progress=False, resume=True)
    assert checkpoint.read(tmp_path / checkpoint.LAST).about["step"] == 7
