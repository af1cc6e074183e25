"""The training loop: the computation, logs and averages of a step; precision, compilation, errors."""

import dataclasses
import errno
import shutil

import pytest
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
from ivfast.train.loop import fit
from ivfast.train.phase import Phase, System
from ivfast.train.run import Run

SHAPE = (1, 8, 8)
PER_EPOCH = 7  # 60 images in batches of 8, four dropped


@pytest.fixture
def images():
    return torch.randint(256, (60, *SHAPE), dtype=torch.uint8)


def labels_for(system, n):
    """The arguments other than the images: none, or labels that cycle through the classes."""
    return () if system.labels == "none" else (torch.arange(n) % 10,)


def train(settings, images, out, **keywords):
    system = build(settings, SHAPE)
    labels = labels_for(system, len(images))
    return system, fit(system, images, settings, out, progress=False, labels=labels[0] if labels else None, **keywords)


def losses(history):
    """Everything in the loss lines except timings."""
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


@pytest.mark.parametrize("system", SYSTEMS)
def test_each_phase_moves_its_own_parameters_and_computes_no_other_gradient(system, images):
    settings = small(system)
    system = build(settings, SHAPE)
    run = Run(system, images, settings, None, None)
    labels = labels_for(system, 8)
    if system.labels == "source":
        labels[0][::2] = -1  # two domains, otherwise a domain's bias has no gradient
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
    # a stale bfloat16 copy of D's weights changes E's loss by 2 to 4 % at this rate, rounding by at most 0.3 %
    rates = {"default": 1e-3, "discriminator": 0.02}
    settings = small(log_every=1, steps=3, learning_rates=rates)
    _, full = train(settings, images, tmp_path / "fp32")
    system, half = train(dataclasses.replace(settings, precision="bf16"), images, tmp_path / "bf16")
    for a, b in zip(losses(full), losses(half), strict=True):
        assert b["losses"] == pytest.approx(a["losses"], rel=0.01)
    assert losses(full)[0]["losses"] != losses(half)[0]["losses"]
    assert {p.dtype for module in system.modules.values() for p in module.parameters()} == {torch.float32}


class Fixed(IvaaeRadial):
    """The bridge's noise is fixed, because compiled code draws other random numbers."""

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
    with pytest.raises(ValueError, match="packing has no effect on wae-mmd; it is read by ivdcgan, ivlsgan, dcgan"):
        dataclasses.replace(preset("wae-mmd", "digits"), packing=2)
    with pytest.raises(ValueError, match="unknown settings: epoch; did you mean epochs"):
        dataclasses.replace(preset("wae-mmd", "digits"), epoch=2)
    with pytest.raises(ValueError, match="batch_size must be an integer >= 1, got 0"):
        Settings(batch_size=0)
    with pytest.raises(ValueError, match="precision must be one of 'fp32', 'bf16', got 'fp8'"):
        Settings(precision="fp8")
    with pytest.raises(ValueError, match=r"ema must be 0 \(off\) or a decay below 1, got 1"):
        Settings(ema=1.0)
    with pytest.raises(
        ValueError, match=r"there is no system 'iva'; did you mean ivaae-bw or ivaae-rad or ivaae-svgd\?"
    ):
        preset("iva", "digits")


def test_fit_refuses_what_it_cannot_do(images, tmp_path):
    settings = small(steps=2)
    with pytest.raises(CheckpointError, match="the file does not exist"):
        train(settings, images, tmp_path / "new", resume=True)
    train(settings, images, tmp_path / "run")
    with pytest.raises(FileExistsError, match="already holds a run"):
        train(settings, images, tmp_path / "run")
    with pytest.raises(ValueError, match=r"settings\.latent_dim must match those in .*last\.safetensors: 8, got 4"):
        train(dataclasses.replace(settings, latent_dim=4), images, tmp_path / "run", resume=True)
    with pytest.raises(CheckpointError, match="its data order is for 60 images, not 59"):
        train(dataclasses.replace(settings, steps=4), images[:59], tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match=r"images must have shape \[N, 1, 8, 8\], got \(60, 1, 8, 4\)"):
        train(settings, images[..., :4], tmp_path / "x")
    with pytest.raises(ValueError, match="images must be on the host or on cpu, got meta"):
        train(settings, images.to("meta"), tmp_path / "x")
    other = dataclasses.replace(settings, seed=settings.seed + 1)
    with pytest.raises(ValueError, match=r"settings\.seed must match those that the system was built from"):
        fit(build(settings, SHAPE), images, other, tmp_path / "x", progress=False)
