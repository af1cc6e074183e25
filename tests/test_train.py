"""The training loop: exact resume, the guard against NaN, Ctrl-C, atomic checkpoints, EMA, precision, compilation."""

import dataclasses
import errno
import json
import math
import os
import resource
import shutil
import signal

import pytest
import safetensors.torch
import torch
from helpers import small
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import ivfast
from ivfast.models import SYSTEMS, build, preset
from ivfast.models.ivaae import IvaaeRadial
from ivfast.runs import load_system
from ivfast.train import Settings, checkpoint
from ivfast.train.batches import as_images
from ivfast.train.checkpoint import CheckpointError
from ivfast.train.log import Log
from ivfast.train.loop import Interrupted, NonFiniteLoss, NonFiniteWeights, fit
from ivfast.train.phase import Phase, System
from ivfast.train.run import Run

SHAPE = (1, 8, 8)
PER_EPOCH = 7  # 60 images in batches of 8, four dropped


@pytest.fixture
def images():
    return torch.randint(256, (60, *SHAPE), dtype=torch.uint8)


def labels_for(system, n):
    """The arguments beside the images: none, or labels that cycle through the classes."""
    return () if system.labels == "none" else (torch.arange(n) % 10,)


def train(settings, images, out, **keywords):
    system = build(settings, SHAPE)
    labels = labels_for(system, len(images))
    return system, fit(system, images, settings, out, progress=False, labels=labels[0] if labels else None, **keywords)


def losses(history):
    """Everything of the loss lines that does not measure time."""
    return [
        {k: v for k, v in line.items() if k not in ("seconds", "images_per_second")}
        for line in history
        if line["kind"] == "losses"
    ]


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
        return {"noise": float(torch.randn(()))}  # must leave no trace in the run's own random numbers

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


def test_events_that_cannot_be_written_are_said_unless_there_is_worse(tmp_path):
    class Full:
        def close(self):
            raise OSError(errno.ENOSPC, "No space left on device")

    with (
        pytest.raises(OSError, match=r"No space left on device: .*tensorboard"),
        Log(tmp_path, tensorboard=False, resume_at=None) as log,
    ):
        log.writer = Full()
    with pytest.raises(CheckpointError, match="worse"), Log(tmp_path, tensorboard=False, resume_at=None) as log:  # noqa: PT012
        log.writer = Full()
        raise CheckpointError(tmp_path, "worse")


def test_seed_decides_the_run_and_the_callers_generator_is_left_alone(images, tmp_path):
    settings = small(steps=5)
    torch.randn(3)
    before = torch.get_rng_state()
    train(settings, images, tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), before)
    torch.randn(7)
    train(settings, images, tmp_path / "b")
    assert_same_bits(tmp_path / "a", tmp_path / "b")
    train(dataclasses.replace(settings, seed=settings.seed + 1), images, tmp_path / "c")
    a, c = (checkpoint.read(tmp_path / name / checkpoint.LAST).tensors for name in "ac")
    assert not torch.equal(a["weights/encoder.1.weight"], c["weights/encoder.1.weight"])
    assert not torch.equal(a["batches/order"], c["batches/order"])


class Failing(IvaaeRadial):
    """A term of the encoder's loss turns into NaN in step `at`; or `at` sends signals."""

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
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))  # as a full disk: the write itself fails
    try:
        with pytest.raises(CheckpointError, match=r"could not be written .*; the one written before is untouched"):
            checkpoint.write(path, {"weights/a": torch.zeros(2**20)}, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["last.safetensors"]


@pytest.mark.parametrize("system", SYSTEMS)
def test_each_phase_moves_its_own_parameters_and_computes_no_other_gradient(system, images):
    settings = small(system)
    system = build(settings, SHAPE)
    run = Run(system, images, settings, None, None)
    labels = labels_for(system, 8)
    if system.labels == "source":
        labels[0][::2] = -1  # two domains, or a domain's bias has no gradient
    shared = system.share(as_images(images[:8]), *labels)
    everything = {p for module in system.modules.values() for p in module.parameters()}
    moved = set()
    for phase, loss in zip(system.phases, run.losses, strict=True):
        before = {p: p.detach().clone() for p in everything}
        for p in everything:
            p.grad = None
        run.update(phase, loss, shared)
        changed = {p for p in everything if not torch.equal(p, before[p])}
        assert changed == set(phase.parameters) == {p for p in everything if p.grad is not None}
        moved |= changed
    assert moved == everything


def test_a_step_encodes_once_and_discriminates_once_per_phase(images):
    settings = small("ivaae-svgd")
    system = build(settings, SHAPE)
    calls = {name: [] for name in system.modules}
    for name, module in system.modules.items():
        module.register_forward_hook(lambda _, args, out, name=name: calls[name].append(tuple(args[0].shape)))
    Run(system, images, settings, None, None).advance()
    assert calls == {"encoder": [(8, *SHAPE)], "decoder": [(8, 8)], "discriminator": [(5 * 8, 8)] * 2}


def test_no_step_waits_for_the_device(images):
    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    settings = small(ema=0.9)
    run = Run(build(settings, SHAPE), images, settings, None, None)
    with Reads() as reads:
        for _ in range(settings.log_every):
            run.advance()
        assert reads.count == 0
        run.record.values[0, 0].item()
        assert reads.count == 1  # the counter counts


class Intervals(System):
    """Two phases, the second every third step; each loss is the step's number or its own weight."""

    def __init__(self, settings, image_shape):
        super().__init__(settings, image_shape)
        self.modules = {"one": nn.Linear(1, 1), "two": nn.Linear(1, 1)}
        self.steps = 0
        self.phases = [
            Phase("often", self.adam("one"), lambda step: {"step": self.modules["one"].weight.sum() * 0 + step}),
            Phase("rare", self.adam("two"), lambda step: {"step": self.modules["two"].weight.sum() * 0 + step}, 3),
        ]

    def share(self, x):
        self.steps += 1
        return self.steps


def test_log_holds_the_means_over_the_steps_in_which_a_phase_ran(images, tmp_path):
    settings = small(log_every=4, steps=10)
    history = fit(Intervals(settings, SHAPE), images, settings, tmp_path, progress=False)
    assert [line["losses"] for line in losses(history)] == [
        {"often/step": 2.5, "rare/step": 2.5},  # steps 1..4; 1 and 4
        {"often/step": 6.5, "rare/step": 7.0},
        {"often/step": 9.5, "rare/step": 10.0},
    ]


def test_tensorboard_holds_the_lines_of_the_log(images, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = small(steps=12, tensorboard=True)
    train(settings, images, tmp_path)
    settings = dataclasses.replace(settings, steps=24)
    _, history = train(settings, images, tmp_path, resume=True, evaluate=lambda system: {"fld": 2.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = events.Scalars("losses/autoencoder/recon")
    assert [event.step for event in scalars] == [6, 12, 18, 24]
    expected = [line["losses"]["autoencoder/recon"] for line in losses(history)]
    assert [event.value for event in scalars] == pytest.approx(expected, rel=1e-6)
    assert [(event.step, event.value) for event in events.Scalars("metrics/fld")] == [(14, 2.0), (24, 2.0)]


def test_learning_rates_follow_the_milestones(images, tmp_path):
    rates = {"encoder": 1e-3, "decoder": 1e-3, "discriminator": 4e-4}
    settings = small(steps=4 * PER_EPOCH, log_every=PER_EPOCH, milestones={1: 0.5, 3: 0.1}, learning_rates=rates)
    _, history = train(settings, images, tmp_path)
    assert [line["learning_rates"]["discriminator"] for line in losses(history)] == pytest.approx(
        [4e-4, 2e-4, 2e-4, 2e-5], rel=1e-12
    )
    assert [line["epoch"] for line in losses(history)] == [1, 2, 3, 4]


def test_average_is_the_recursion_and_serves_evaluation_and_loading(images, tmp_path):
    settings = small(ema=0.8, steps=9, log_every=9)
    system = build(settings, SHAPE)
    run = Run(system, images, settings, tmp_path, None)
    weight = system.modules["encoder"][1].weight
    expected = weight.detach().double()
    for step in range(9):
        run.advance()
        decay = min(0.8, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight.detach().double()
    assert (run.average.values["encoder.1.weight"] - expected).abs().max() < 1e-6

    seen = {}

    def evaluate(system):
        assert not system.modules["encoder"].training
        seen["weight"] = system.modules["encoder"][1].weight.detach().clone()
        return {}

    system, _ = train(settings, images, tmp_path, evaluate=evaluate)
    assert torch.equal(seen["weight"], run.average.values["encoder.1.weight"])
    assert torch.equal(system.modules["encoder"][1].weight, weight)
    assert torch.equal(load_system(tmp_path)[0].modules["encoder"][1].weight, seen["weight"])
    assert torch.equal(load_system(tmp_path, average=False)[0].modules["encoder"][1].weight, weight)


def test_evaluate_and_draw_are_called_on_time(images, tmp_path):
    calls = []
    train(
        small(steps=5 * PER_EPOCH + 3),
        images,
        tmp_path,
        evaluate=lambda system: calls.append("evaluate") or {"fld": 1.0},
        draw=lambda system, folder, epoch: calls.append((folder, epoch)),
    )
    pictures = tmp_path / "pictures"
    assert calls == ["evaluate", (pictures, 2), "evaluate", (pictures, 4), "evaluate", (pictures, 5)]


def test_bf16_follows_fp32_through_both_phases(images, tmp_path):
    # a stale bfloat16 copy of D's weights moves E's loss by 2 to 4 % at this rate, rounding by 0.3 % at the most
    rates = {"default": 1e-3, "discriminator": 0.02}
    settings = small(log_every=1, steps=3, learning_rates=rates)
    _, full = train(settings, images, tmp_path / "fp32")
    system, half = train(dataclasses.replace(settings, precision="bf16"), images, tmp_path / "bf16")
    for a, b in zip(losses(full), losses(half), strict=True):
        assert b["losses"] == pytest.approx(a["losses"], rel=0.01)
    assert losses(full)[0]["losses"] != losses(half)[0]["losses"]
    assert {p.dtype for module in system.modules.values() for p in module.parameters()} == {torch.float32}


class Fixed(IvaaeRadial):
    """The bridge's noise is fixed: compiled code draws other random numbers."""

    noise = torch.randn(8, 8, generator=torch.Generator().manual_seed(3))

    def bridge(self, z):
        return ivfast.radial_bridge(z, self.settings.t, draws=self.noise)


# dynamo looks at .grad of a phase's input and hides the warning from users, but not from a filter that raises
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_run_follows_the_eager_one(images, tmp_path):
    settings = small(log_every=1, steps=5)
    torch.manual_seed(settings.seed)
    eager = Fixed(settings, SHAPE)
    compiled = Fixed(dataclasses.replace(settings, compile=True), SHAPE)
    for name, module in compiled.modules.items():
        module.load_state_dict(eager.modules[name].state_dict())
    a = fit(eager, images, eager.settings, tmp_path / "eager", progress=False)
    b = fit(compiled, images, compiled.settings, tmp_path / "compiled", progress=False)
    for x, y in zip(losses(a), losses(b), strict=True):
        assert y["losses"] == pytest.approx(x["losses"], rel=1e-4)
    assert all(p.requires_grad for module in compiled.modules.values() for p in module.parameters())


def test_settings_go_through_json_and_reject_what_makes_no_sense(tmp_path):
    for name in (*SYSTEMS, "aae"):
        for data in ("digits", "mnist", "celeba", "cifar10", "svhn"):
            settings = dataclasses.replace(preset(name, data), steps=3, ema=0.99)
            settings.save(tmp_path / "config.json")
            assert Settings.load(tmp_path / "config.json") == settings
    with pytest.raises(ValueError, match="unknown settings: colour"):
        Settings.from_dict({"colour": "red"})
    with pytest.raises(ValueError, match="batch_size must be an integer >= 1, got 0"):
        Settings(batch_size=0)
    with pytest.raises(ValueError, match="precision must be one of 'fp32', 'bf16', got 'fp8'"):
        Settings(precision="fp8")
    with pytest.raises(ValueError, match=r"ema must be 0 \(off\) or a decay below 1, got 1"):
        Settings(ema=1.0)
    with pytest.raises(ValueError, match="system must be one of wae-mmd"):
        preset("iva", "digits")


def test_fit_refuses_what_it_cannot_do(images, tmp_path):
    settings = small(steps=2)
    with pytest.raises(CheckpointError, match="there is no such file"):
        train(settings, images, tmp_path / "new", resume=True)
    train(settings, images, tmp_path / "run")
    with pytest.raises(FileExistsError, match="holds a run already"):
        train(settings, images, tmp_path / "run")
    with pytest.raises(ValueError, match=r"settings\.latent_dim must match those in .*last\.safetensors: 8, got 4"):
        train(dataclasses.replace(settings, latent_dim=4), images, tmp_path / "run", resume=True)
    with pytest.raises(CheckpointError, match="its data order is of 60 images, not 59"):
        train(dataclasses.replace(settings, steps=4), images[:59], tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match=r"images must have shape \[N, 1, 8, 8\], got \(60, 1, 8, 4\)"):
        train(settings, images[..., :4], tmp_path / "x")
    with pytest.raises(ValueError, match="images must be on the host or on cpu, got meta"):
        train(settings, images.to("meta"), tmp_path / "x")
    other = dataclasses.replace(settings, seed=settings.seed + 1)
    with pytest.raises(ValueError, match=r"settings\.seed must match those the system was built from"):
        fit(build(settings, SHAPE), images, other, tmp_path / "x", progress=False)


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
    with pytest.raises(CheckpointError, match=r"last\.safetensors: it is not a whole safetensors file"):
        load_system(tmp_path)
    path.write_bytes(b"hello")
    with pytest.raises(CheckpointError, match="it is not a whole safetensors file"):
        load_system(tmp_path)
    safetensors.torch.save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="not a checkpoint of ivfast"):
        load_system(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match="there is no such file"):
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
    with pytest.raises(CheckpointError, match="its system cannot be built: system must be one of"):
        load_system(tmp_path)
