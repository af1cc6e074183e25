"""What a command or a call refuses leaves nothing on disk, and the message names what is wrong."""

import os
import re

import pytest
import torch
from helpers import command, settings_with

import ivfast
from ivfast import _extra, data, metrics, models
from ivfast.data import points
from ivfast.models import build
from ivfast.train.loop import fit

SMALL = ("--device", "cpu", "--steps", 1, "--set", "width=8", "--set", "tensorboard=false")
LARGE = 10**20
VALUES = {"steps": 1, "batch_size": 8, "latent_dim": 4, "width": 8, "discriminator_width": 8, "tensorboard": False}


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert os.listdir() == []


RATES = 'learning_rates={"default":0.001,"judge":0.1}'
TRAIN = {
    "t": (["ivaae-bw", "--t", 5], "t must divide latent_dim = 16, got 5"),
    "t of few dimensions": (["ivaae-bw", "--latent-dim", 2], "t must divide latent_dim = 2, got 4"),
    "k": (["ivdcgan", "--k", 5], "k must divide latent_dim = 16, got 5"),
    "packing": (["veegan", "--packing", 5], "packing must divide batch_size = 64, got 5"),
    "one image": (["mrgan", "--net", "conv", "--batch-size", 1], "batch_size must be at least 2 for batch normal"),
    "one code": (["wae-gan", "--fld-weight", 1, "--batch-size", 1], "fld_weight needs a batch_size of at least 2"),
    "batch": (["vae", "--batch-size", 10**6], "batch_size must be at most the number of images, 1497, got 1000000"),
    "schedule": (["s-introvae", "--vae-steps", 9], "vae_steps must be below the run's 1 steps, got 9"),
    "mirrored points": (["dcgan", "--data", "ring", "--flip"], "flip needs images"),
    "target": (["ada", "--target", "ring"], "target must be negative or a data set of images, got 'ring'"),
    "no target": (["ada", "--target", "mnits"], "got 'mnits'; did you mean 'mnist'?"),
    "rates": (
        ["unrolled-gan", "--set", 'learning_rates={"generator":0.1,"discriminator":0.1}'],
        "learning_rates must name 'unrolled' or 'default'",
    ),
    "points": (["gan", "--data", "ring"], "gan generates numbers between −1 and 1, and ring holds others; what can"),
    "classes": (["cgan", "--set", "classes=5"], "classes must be 10, as digits has, got 5"),
    "category": (["gan", "--data", "digits:3"], "only lsun has categories: digits must be without one, got 'digits:3'"),
    "seed": (["avb", "--seed", LARGE], f"seed must be an integer from 0 to 2^63 - 1, got {LARGE}"),
    "negative seed": (["avb", "--seed", -1], "seed must be an integer >= 0, got -1"),
    "seed in json": (["avb", "--set", f"seed={LARGE}"], f"seed must be an integer from 0 to 2^63 - 1, got {LARGE}"),
    "steps": (["gan", "--steps", 0], "steps must be an integer >= 1, got 0"),
    "many steps": (["gan", "--steps", LARGE], "steps must be an integer from 1 to 2^63 - 1"),
    "epochs": (["gan", "--epochs", LARGE], "epochs must be an integer from 1 to 2^63 - 1"),
    "threads": (["gan", "--threads", LARGE], f"'--threads': it must be an integer from 1 to 4096, got {LARGE}"),
    "no threads": (["gan", "--threads", 0], "'--threads': it must be an integer from 1 to 4096, got 0"),
}


@pytest.mark.parametrize("case", TRAIN)
def test_train(case):
    arguments, message = TRAIN[case]
    text = command("train", *arguments[:1], *SMALL, *arguments[1:], code=2)
    said = text.strip().splitlines()[-1]
    assert said.startswith("error: ")
    assert message in said


@pytest.mark.parametrize("system", models.SYSTEMS)
def test_rates_of_networks_that_a_system_does_not_have(system):
    text = command("train", system, *SMALL, "--set", RATES, code=2)
    made = build(settings_with(VALUES, {"system": system}), (1, 8, 8))
    moved = {p for phase in made.phases for p in phase.parameters}
    names = [name for name, module in made.modules.items() if moved.intersection(module.parameters())]
    said = re.search(f"learning_rates has 'judge', which {system} does not have; its rates are (.*) and default", text)
    assert {*names} == {*said[1].split(", ")} - {"unrolled"}


@pytest.mark.parametrize("system", models.SYSTEMS)
def test_presets_have_rates_of_their_networks_alone(system):
    for name in data.DATASETS:
        rates = models.preset(system, name).learning_rates
        made = build(settings_with(VALUES, {"system": system, "learning_rates": rates}), (1, 8, 8))
        assert {*rates} <= {"default", *made.rated}


@pytest.mark.parametrize("system", models.SYSTEMS)
def test_fit_checks_before_it_makes_a_folder(system):
    settings = settings_with({**VALUES, "batch_size": 100}, {"system": system})
    images, labels = torch.randint(256, (20, 1, 8, 8), dtype=torch.uint8), None
    made = build(settings, (1, 8, 8))
    labels = None if made.labels == "none" else torch.arange(20) % 10
    with pytest.raises(ValueError, match="batch_size must be at most the number of images, 20, got 100"):
        fit(made, images, settings, "run", labels=labels)


def test_a_missing_package_is_found_before_a_folder_is_made(monkeypatch):
    monkeypatch.setattr(_extra, "_installed", lambda package: package != "tensorboard")
    settings = settings_with({**VALUES, "tensorboard": True}, {"system": "gan"})
    with pytest.raises(_extra.PackageNotFound, match=r"settings\.tensorboard needs tensorboard: pip install"):
        fit(build(settings, (1, 8, 8)), torch.zeros(20, 1, 8, 8, dtype=torch.uint8), settings, "run")


OTHERS = {
    "samples": (["sample", "none", "-n", LARGE], f"it must be an integer from 1 to 2^63 - 1, got {LARGE}"),
    "no samples": (["sample", "none", "-n", 0], "it must be an integer from 1 to 2^63 - 1, got 0"),
    "seed": (["sample", "none", "--seed", LARGE], f"'--seed': it must be an integer from 0 to 2^63 - 1, got {LARGE}"),
    "negative": (["sample", "none", "--seed", -1], "'--seed': it must be an integer from 0 to 2^63 - 1, got -1"),
    "columns": (["sample", "none", "--columns", 0], "'--columns': it must be an integer from 1 to"),
    "picture": (["sample", "none", "--out", "x.jpg"], "--out must end in .png, or be a folder, got x.jpg"),
    "word": (["sample", "none", "--seed", "one"], "'--seed': it must be an integer from 0 to 2^63 - 1, got one"),
    "evaluated": (
        ["evaluate", "none", "--seed", LARGE],
        "'--seed': it must be an integer from 0 to 2^63 - 1, got 1000",
    ),
    "one": (["evaluate", "none", "--samples", 1], "'--samples': it must be an integer from 2 to 2^63 - 1, got 1"),
    "seeds": (["paper", "s2-ring", "--seeds", LARGE], "--seeds must be a number of seeds from 1 to 10000, or a list"),
    "no seeds": (["paper", "s2-ring", "--seeds", 0], "--seeds must be a number of seeds from 1 to 10000, or a list"),
    "fewer": (["paper", "s2-ring", "--seeds", -3], "--seeds must be a number of seeds from 1 to 10000, or a list"),
    "a seed": (
        ["paper", "s2-ring", "--seeds", f"1,{LARGE}"],
        "--seeds must be an integer from 0 to 2^63 - 1, got 1000",
    ),
    "a negative": (["paper", "s2-ring", "--seeds", "1,-2"], "--seeds must be an integer >= 0, got -2"),
    "workers": (["paper", "s2-ring", "--workers", 0], "'--workers': it must be an integer from 1 to"),
    "paper's steps": (["paper", "s2-ring", "--steps", LARGE], "'--steps': it must be an integer from 1 to 2^63 - 1"),
    "no labels": (["paper", "s3-table2", "--data", "ring"], "ring"),
    "bench": (["bench", "--threads", LARGE], "'--threads': it must be an integer from 1 to 4096"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_commands(case):
    arguments, message = OTHERS[case]
    text = command(*arguments, code=2)
    assert message in text
    assert "Traceback" not in text


CALLS = {
    "points": lambda: points.load("ring", 3, seed=LARGE),
    "points, negative": lambda: points.load("ring", 3, seed=-1),
    "generate": lambda: metrics.generate(None, 3, seed=LARGE),
    "probe": lambda: metrics.probe.probe(*[torch.ones(4, 2), torch.arange(4)] * 2, seed=LARGE),
    "settings": lambda: models.settings("vae", seed=LARGE),
}


@pytest.mark.parametrize("call", CALLS)
def test_seeds_of_functions(call):
    with pytest.raises(ValueError, match=r"^seed must be an integer (from 0 to 2\^63 - 1|>= 0), got "):
        CALLS[call]()


def test_counts_of_functions():
    x = torch.randn(4, 2)
    calls = [
        lambda: ivfast.svgd(x, LARGE),
        lambda: ivfast.radial_bridge(x, LARGE),
        lambda: points.load("ring", LARGE),
        lambda: ivfast.GaussianStatistics(LARGE),
        lambda: data.load("digits", limit=LARGE),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=rf"must be an integer from \d to 2\^63 - 1, got {LARGE}"):
            call()
