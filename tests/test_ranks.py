"""Training on several gloo ranks: the same weights and log as one process on the same batches.

As a script, this file runs one rank.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import join, settings_with

import ivfast
from ivfast import models
from ivfast.models import build
from ivfast.models.ivaae import IvaaeRadial
from ivfast.train import Settings, checkpoint
from ivfast.train.loop import NonFiniteLoss, fit

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
    "ivaae-rad": {"encoder_loss": "confusion"},
    "ivaae-bw": {},
    "wae-gan": {},
    "as-introvae": {"vae_steps": 2, "anneal_steps": 10},
}


def settings_of(system: str) -> Settings:
    return settings_with(VALUES, {"system": system, **RUNS[system]})


def images():
    return torch.randint(256, (64, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def train(settings, out, **keywords):
    def draw(system, folder, epoch):
        (folder / f"{os.getpid()}-{epoch}").touch()

    def evaluate(system):
        return {"noise": float(torch.randn(()))}  # must not affect the run's own random numbers

    system = build(settings, SHAPE)
    return fit(system, images(), settings, out, progress=False, draw=draw, evaluate=evaluate, **keywords)


class Failing(IvaaeRadial):
    """The rows of the last rank give NaN in step 9."""

    steps = 0

    def discriminator_loss(self, shared):
        terms = super().discriminator_loss(shared)
        self.steps += 1
        bad = self.steps == 9 and dist.get_rank() == dist.get_world_size() - 1
        return {**terms, "own": terms["intervention"] * (float("nan") if bad else 0.0)}


def rank_main(rank, world, folder):
    join(rank, world, folder)
    if world == 3:
        train(SMALL, folder / "parts", resume=True)
    else:
        for system in RUNS:
            train(settings_of(system), folder / system)
        train(dataclasses.replace(SMALL, steps=10), folder / "parts")
        failing = dataclasses.replace(SMALL, steps=40)
        with pytest.raises(NonFiniteLoss) as raised:
            fit(Failing(failing, SHAPE), images(), failing, folder / "failing", progress=False)
        (folder / f"error{rank}").write_text(str(raised.value))
        odd = dataclasses.replace(SMALL, batch_size=7)
        with pytest.raises(ValueError, match="batch_size must be a multiple of the 2 ranks, got 7"):
            train(odd, folder / "odd")
        conv = dataclasses.replace(SMALL, net="conv")
        with pytest.raises(ValueError, match="encoder normalises over the batch"):
            fit(build(conv, (1, 32, 32)), torch.zeros(20, 1, 32, 32), conv, folder / "conv", progress=False)
    dist.barrier()
    dist.destroy_process_group()


def start(world, folder):
    root = str(Path(ivfast.__file__).parent.parent)  # the same sources, whether installed or not
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    command = [sys.executable, __file__, str(world), str(folder)]
    started = [subprocess.Popen([*command, str(rank)], cwd="/", env=environment) for rank in range(world)]
    end = time.monotonic() + 120
    try:
        assert [process.wait(max(1, end - time.monotonic())) for process in started] == [0] * world
    finally:
        for process in started:
            process.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of two ranks, one of them resumed by three ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    start(2, folder)
    start(3, folder)
    return folder


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
    rank_main(int(sys.argv[3]), int(sys.argv[1]), Path(sys.argv[2]))
