"""Training on several gloo ranks: the same weights and log as one process on the same batches, for every system.

As a script, this file runs the ranks.
"""

import dataclasses
import functools
import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import as_ranks, run_script, settings_with

from ivfast import _defaults, models
from ivfast.models import build
from ivfast.models.ivaae import IvaaeRadial
from ivfast.train import Settings, checkpoint
from ivfast.train.loop import NonFiniteLoss, RankLost, fit
from ivfast.train.run import Run

SHAPE = (1, 8, 8)
VALUES = {
    "steps": 20,
    "batch_size": 12,
    "latent_dim": 4,
    "width": 16,
    "discriminator_width": 16,
    "log_every": 6,
    "evaluate_every": 1,
    "tensorboard": False,
    "ema": 0.9,
}
SMALL = models.settings("ivaae-rad", **VALUES)
RUNS = {
    "wae-mmd": {"lam": 10.0},
    "ivaae-svgd": {"fld_weight": 0.1},
    "as-introvae": {"vae_steps": 2, "anneal_steps": 10},
}


TINY = {
    "steps": 5,
    "batch_size": 8,
    "latent_dim": 4,
    "width": 12,
    "depth": 1,
    "discriminator_width": 12,
    "discriminator_depth": 1,
    "discriminator_steps": 2,
    "instance_noise": 0.1,
    "unroll": 2,
    "vae_steps": 1,
    "gamma_r": 0.1,
    "tensorboard": False,
}
CONV = {"net": "conv", "width": 4}
# Every system, then what other settings of it draw or make of a batch.
CASES = {
    **{name: {"system": name} for name in models.SYSTEMS},
    "packs": {"system": "ivdcgan", "packing": 2, "code_reconstruction": "codes", "encoder_loss": "confusion"},
    "packed-pairs": {"system": "veegan", "packing": 2},
    "adaptive": {"system": "avb", "contrast": "adaptive", "contrast_draws": 3, "divergence": "kl"},
    "additive": {"system": "as-introvae", "as_kernel": "additive"},
    "fld": {"system": "ivaae-svgd", "fld_weight": 0.3},
    "confusion": {"system": "ivaae-rad", "encoder_loss": "confusion"},
    # batch norm in E and G, in D, with fakes by themselves, in pairs and over draws of ε, on each class
    "wae-mmd-conv": {"system": "wae-mmd", **CONV},
    "ivlsgan-conv": {"system": "ivlsgan", **CONV},
    "introvae-conv": {"system": "introvae", **CONV},
    "avb-conv": {"system": "avb", "contrast": "adaptive", **CONV},
    "avb-residual": {"system": "avb", **CONV, "net": "residual"},
    "svae-conv": {"system": "svae", **CONV},
    # batch norm and the mean of gradients, which G's loss differentiates twice
    "unrolled-conv": {"system": "unrolled-gan", **CONV},
}


def settings_of(system: str) -> Settings:
    return settings_with(VALUES, {"system": system, **RUNS[system]})


def images():
    return torch.randint(256, (64, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def train(settings, out, system=None, **keywords):
    def draw(system, folder, epoch):
        (folder / f"{os.getpid()}-{epoch}").touch()

    def evaluate(system):
        # must not affect the run's own random numbers, and is of one process
        return {"noise": float(torch.randn(())), "of the system": float(system.randn(3, 2).sum())}

    made = build(settings, SHAPE)
    if system is not None:
        made, weights = system(settings, SHAPE), torch.nn.ModuleDict(made.modules).state_dict()
        first = not dist.is_initialized() or dist.get_rank() == 0
        torch.nn.ModuleDict(made.modules).load_state_dict(weights if first else {k: -v for k, v in weights.items()})
    return fit(made, images(), settings, out, progress=False, draw=draw, evaluate=evaluate, **keywords)


class Failing(IvaaeRadial):
    """The rows of the last rank give NaN in step 9."""

    steps = 0

    def discriminator_loss(self, shared):
        terms = super().discriminator_loss(shared)
        self.steps += 1
        bad = self.steps == 9 and dist.get_rank() == dist.get_world_size() - 1
        return {**terms, "own": terms["intervention"] * (float("nan") if bad else 0.0)}


class Killed(IvaaeRadial):
    """The last rank is killed in step 9."""

    steps = 0

    def autoencoder_loss(self, shared):
        self.steps += 1
        if self.steps == 9 and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().autoencoder_loss(shared)


class Bypassing(IvaaeRadial):
    """Draws by itself."""

    def discriminator_loss(self, shared):
        noisy = shared._replace(bridge=shared.bridge + torch.randn_like(shared.bridge))
        return super().discriminator_loss(noisy)


class Dropping(IvaaeRadial):
    """Has a network that draws by itself."""

    def encode(self, x):
        return torch.nn.functional.dropout(super().encode(x), 0.1)


def five_steps(case: str) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Weights and losses of a case, in float64: the system's casts to float32, meant for half precision, do nothing."""
    settings = settings_with(TINY, CASES[case])
    labels = torch.arange(24) % 10
    system = build(settings, SHAPE)
    if system.labels in ("some", "source"):
        labels[::3] = -1
    x = images()[:24].double() / 127.5 - 1
    run = Run(system, x, settings, None, None if system.labels == "none" else labels)
    system.train()
    for _ in range(settings.steps):
        run.advance()
    losses = run.record.read(settings.steps)
    run.close()
    return torch.nn.ModuleDict(system.modules).state_dict(), losses


def on_two_ranks(rank, folder):
    for system in RUNS:
        train(settings_of(system), folder / system)
    train(dataclasses.replace(SMALL, steps=10), folder / "parts")
    failing = dataclasses.replace(SMALL, steps=40)
    with pytest.raises(NonFiniteLoss) as raised:
        train(failing, folder / "failing", Failing)
    (folder / f"error{rank}").write_text(str(raised.value))
    odd = dataclasses.replace(SMALL, batch_size=7)
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 2 ranks, got 7"):
        train(odd, folder / "odd")
    packs = settings_with({**VALUES, "batch_size": 6}, {"system": "pacdcgan", "packing": 2})
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 2 ranks times packing = 2, got 6"):
        train(packs, folder / "odd")
    own = "which draws the same numbers on every rank: draw by System.randn"
    with pytest.raises(RuntimeError, match=rf"^phase 'discriminator' calls randn_like, {own}"):
        train(SMALL, folder / "bypassing", Bypassing)
    with pytest.raises(RuntimeError, match=rf"^the shared forward calls \w+, {own}"):
        train(SMALL, folder / "dropping", Dropping)
    torch.set_default_dtype(torch.float64)
    _defaults.DTYPE = torch.float64
    torch.Tensor.float = torch.Tensor.double
    torch.save({case: five_steps(case) for case in CASES}, folder / f"every{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def on_three_ranks(rank, folder):
    train(SMALL, folder / "parts", resume=True)
    with pytest.raises(RankLost) as raised:
        train(dataclasses.replace(SMALL, save_every=1), folder / "killed", Killed)
    (folder / f"lost{rank}").write_text(str(raised.value))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of two ranks, one of them resumed by three ranks, one of which is killed at last."""
    folder = tmp_path_factory.mktemp("ranks")
    run_script(__file__, folder)
    return folder


@pytest.fixture(scope="module")
def every(folder):
    """The cases' weights and losses, by rank."""
    return [torch.load(folder / f"every{rank}.pt") for rank in range(2)]


def lines(run, kind="losses"):
    return [line for line in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if line["kind"] == kind]


def assert_same_run(run, alone):
    """Weights and averages agree within 1e-5 after 20 steps, and the log except for timings."""
    ours, theirs = checkpoint.read(run / checkpoint.LAST), checkpoint.read(alone / checkpoint.LAST)
    assert ours.tensors.keys() == theirs.tensors.keys()
    for part in ("weights", "average", "batches", "random"):
        for name, value in theirs.part(part).items():
            difference = float((ours.part(part)[name].double() - value.double()).abs().max())
            assert difference < (1e-5 if part in ("weights", "average") else 1e-9), (name, difference)
    assert len(lines(run)) == len(lines(alone)) == 4
    for one, other in zip(lines(run), lines(alone), strict=True):
        assert one["step"] == other["step"]
        assert one["losses"] == pytest.approx(other["losses"], rel=1e-4, abs=1e-5)
    metrics = [[{"step": m["step"], **m["metrics"]} for m in lines(r, "metrics")] for r in (run, alone)]
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize("system", RUNS)
def test_weights_of_one_process_on_the_whole_batch(system, folder, tmp_path):
    train(settings_of(system), tmp_path)
    assert_same_run(folder / system, tmp_path)


@pytest.mark.parametrize("case", CASES)
def test_every_system_has_the_weights_of_one_process(case, every, monkeypatch):
    """In float64 the order of a sum changes a gradient by about 1e-16. Adam, which divides by no less than its ε = 1e-8,
    makes of that at most 1e-8 of a step of 1e-3, or 1e-10 in five steps; other noise changes whole steps."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(_defaults, "DTYPE", torch.float64)
    torch.set_default_dtype(torch.float64)
    try:
        expected, losses = five_steps(case)
    finally:
        torch.set_default_dtype(torch.float32)
    for rank in range(2):
        found, its = every[rank][case]
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
        assert its == pytest.approx(losses, rel=1e-9, abs=1e-9)


def test_no_system_draws_by_itself():
    """Nor where no step above comes: all draws have one source, which knows the ranks."""
    functions = r"torch\.(?:rand(?!om\b)|normal|bernoulli|multinomial|poisson)\w*|ivfast\.(?:reparameterize|\w+_bridge)"
    methods = r"\.(?:normal|uniform|bernoulli|random|exponential)_\b|[dD]ropout"
    sources = Path(models.__file__).parent.glob("*.py")
    assert [found for path in sources for found in re.findall(f"{functions}|{methods}", path.read_text())] == []


def test_a_killed_rank_says_how_to_resume(folder, tmp_path):
    """The others raise; the run, resumed by one process, is the one that nothing happened to."""
    out = folder / "killed"
    for rank in range(2):
        said = (folder / f"lost{rank}").read_text()
        assert re.fullmatch(
            rf"rank {rank} of 3 lost another one \(.+\); the last checkpoint is {out / checkpoint.LAST}; "
            rf"resume, on any number of ranks, with: ivfast train --resume --out {out}",
            said,
        )
    assert checkpoint.read(out / checkpoint.LAST).about["step"] == 5
    train(SMALL, out, resume=True)
    train(SMALL, tmp_path)
    assert_same_run(out, tmp_path)


def test_one_rank_draws(folder):
    pictures = [path.name.split("-") for path in (folder / "wae-mmd" / "pictures").iterdir()]
    assert len({process for process, _ in pictures}) == 1
    assert sorted(int(epoch) for _, epoch in pictures) == [1, 2, 3, 4]


def test_resumed_on_another_number_of_ranks(folder, tmp_path):
    """Two ranks, then three from the middle of an interval of the log; and one process from there."""
    train(SMALL, tmp_path / "straight")
    assert_same_run(folder / "parts", tmp_path / "straight")


def test_a_loss_that_is_nan_on_one_rank_stops_all(folder):
    messages = [(folder / f"error{rank}").read_text() for rank in range(2)]
    assert messages[0] == messages[1]
    assert "the term 'own' of phase 'discriminator' became nan at step 9" in messages[0]


if __name__ == "__main__":
    its_folder = Path(sys.argv[1])
    as_ranks(2, functools.partial(on_two_ranks, folder=its_folder), its_folder)
    as_ranks(3, functools.partial(on_three_ranks, folder=its_folder), its_folder, [0, 0, -signal.SIGKILL])
