"""Labels and label shares, from the data set to the systems that read them."""

import json
import re
from pathlib import Path

import pytest
import torch
from helpers import command
from test_unified import small

from ivfast import data, runs
from ivfast.models import build
from ivfast.train.loop import fit

SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def test_stratified_rows_keep_the_classes_and_are_nested(digits):
    labels = digits.train_labels
    one, ten = (data.stratified(labels, share) for share in (0.01, 0.1))
    assert torch.equal(ten, data.stratified(labels, 0.1))
    assert set(one.tolist()) < set(ten.tolist())
    for rows, share in ((one, 0.01), (ten, 0.1)):
        assert rows.tolist() == sorted(set(rows.tolist()))
        expected = [max(1, round(share * int(n))) for n in labels.bincount()]
        assert labels[rows].bincount(minlength=10).tolist() == expected
    assert torch.equal(data.stratified(labels, 1.0), torch.arange(len(labels)))
    assert data.stratified(torch.arange(5), 0.01).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="share must be above 0 and at most 1, got 0"):
        data.stratified(labels, 0)


def test_training_sets_hide_and_drop_what_the_shares_say(digits):
    def of(name, **changes):
        settings = runs.with_classes(small(name, **changes), digits)
        return runs.training_set(build(settings, SHAPE), digits)

    images, labels = of("svae", label_share=0.1)
    rows = data.stratified(digits.train_labels, 0.1)
    assert torch.equal(images, digits.train)
    assert torch.equal((labels >= 0).nonzero()[:, 0], rows)
    assert torch.equal(labels[rows], digits.train_labels[rows])
    half = digits._replace(train_labels=digits.train_labels.where(torch.arange(len(digits.train)) % 2 == 0, -1))
    with pytest.raises(ValueError, match=r"label_share must be at most 0\.50.., the share of digits that has labels"):
        runs.training_set(build(small("svae"), SHAPE), half)
    _, labels = runs.training_set(build(small("svae", label_share=0.2), SHAPE), half)
    assert float((labels >= 0).double().mean()) == pytest.approx(0.2, abs=0.005)
    assert torch.equal(labels[labels >= 0], half.train_labels[labels >= 0])
    images, labels = of("cvae", data_share=0.1)
    assert torch.equal(images, digits.train[rows])
    assert torch.equal(labels, digits.train_labels[rows])
    images, labels = of("vae", data_share=0.1)
    assert torch.equal(images, digits.train[rows])
    assert labels is None
    images, labels = of("ada")
    assert torch.equal(images, torch.cat([digits.train, 255 - digits.train]))
    assert torch.equal(labels, torch.cat([digits.train_labels, torch.full((len(digits.train),), -1)]))
    with pytest.raises(ValueError, match="label_share has no effect on cgan; it is read by svae, aasvae"):
        of("cgan", label_share=0.1)
    without = digits._replace(name="celeba", train_labels=None, classes=())
    with pytest.raises(ValueError, match="cgan learns from labels, and celeba has none"):
        runs.with_classes(small("cgan"), without)
    unlabelled = small("gan")
    assert runs.with_classes(unlabelled, without) == unlabelled


def test_fit_refuses_labels_that_the_system_cannot_read(digits, tmp_path):
    def train(name, labels):
        settings = small(name, steps=1)
        fit(build(settings, SHAPE), digits.train[:60], settings, tmp_path, labels=labels, progress=False)

    for name, labels, message in (
        ("gan", torch.zeros(60).long(), "labels must be None: gan does not read labels"),
        ("cgan", None, "labels must be given: cgan learns from them"),
        (
            "cvae",
            torch.arange(60) % 10 - 1,
            r"labels must be 0\.\.9, got -1\.\.8; −1 stands for no label, and cvae needs one",
        ),
        ("svae", torch.arange(60) % 11, r"labels must be -1\.\.9, got 0\.\.10"),
    ):
        with pytest.raises(ValueError, match=message):
            train(name, labels)
    for changes, message in (({"data_share": 0}, "data_share"), ({"label_share": 1.1}, "label_share")):
        with pytest.raises(ValueError, match=f"{message} must be above 0 and at most 1"):
            small("svae", **changes)


@pytest.mark.parametrize(
    ("name", "measured"),
    [("iwcgan", ()), ("aasvae", ("bound", "accuracy")), ("ada", ("accuracy",))],
)
def test_command_line_hands_labels_to_what_needs_them(name, measured, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    more = ("--label-share", 0.1) if name == "aasvae" else ()
    fast = ("--set", "tensorboard=false", "--set", "width=32", "--device", "cpu")
    text = command("train", name, "--steps", 3, "--out", "run", *more, *fast)
    assert f"{2994 if name == 'ada' else 1497:,} training and" in text
    record = json.loads(Path("run/log.jsonl").read_text().splitlines()[-1])
    values = record.get("metrics", {})
    assert set(values) == set(measured)
    if measured:
        command("evaluate", "run", "--metrics", ",".join(measured))
        again = json.loads(Path("run/metrics.json").read_text())
        assert {m: again[m] for m in measured} == pytest.approx({m: values[m] for m in measured}, rel=1e-4)
    if name == "ada":
        assert "does not generate images" in command("sample", "run", code=2)
    else:
        command("sample", "run", "-n", 20)


def test_class_names_are_kept_and_compared(tmp_path):
    """Labels are numbers: of other classes they would be read as if they were of those the run learnt."""
    from PIL import Image

    root, out = tmp_path / "images", tmp_path / "run"
    for i, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        for k in range(6):
            Image.new("L", (8, 8), 20 * k + 100 * i).save(root / name / f"{k}.png")
    options = ("--root", root, "--out", out, "--device", "cpu")
    fast = ("--image-size", 8, "--batch-size", 4, "--set", "tensorboard=false", "--set", "width=16")
    command("train", "svae", "--data", "folder", "--steps", 2, *fast, *options)
    system, _ = runs.load_system(out)
    assert system.class_names == ("cat", "dog")
    command("evaluate", out, "--metrics", "accuracy")
    (root / "dog").rename(root / "ant")  # the numbers change places
    said = "classes of .*: 2 classes, from number 0 on cat, dog; got 2 classes, from number 0 on ant, cat"
    for arguments in (("evaluate", out, "--metrics", "accuracy"), ("train", "--resume", "--steps", 3, *options)):
        assert re.search(said, command(*arguments, code=2))


def test_the_root_of_evaluate_is_that_of_the_target_too(tmp_path, monkeypatch):
    """The images were moved after training; and a target is read once in a run, not at each look."""
    from PIL import Image

    root, out, read = tmp_path / "images", tmp_path / "run", []
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for k in range(6):
            Image.new("L", (8, 8), 20 * k + 10 * len(read)).save(root / name / f"{k}.png")
    load = data.load
    monkeypatch.setattr(data, "load", lambda name, *_, **__: read.append(name) or load(name, *_, **__))
    options = (
        "--image-size",
        8,
        "--batch-size",
        4,
        "--set",
        "tensorboard=false",
        "--set",
        "width=16",
        "--device",
        "cpu",
    )
    command("train", "ada", "--data", "folder", "--target", "folder", "--root", root, "--out", out, "--epochs", 3,
            "--set", "evaluate_every=1", *options)  # fmt: skip
    assert len(read) == 3  # the images, then the target's for training and for looking
    looks = [line for line in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if "metrics" in line]
    assert len(looks) == 3
    root.rename(tmp_path / "moved")
    assert "images" in command("evaluate", out, "--metrics", "accuracy", code=2)
    command("evaluate", out, "--metrics", "accuracy", "--root", tmp_path / "moved")
    found = json.loads((out / "metrics.json").read_text())["accuracy"]
    assert found == pytest.approx(looks[-1]["metrics"]["accuracy"])
    assert runs.load_system(out, root="elsewhere")[1].root == "elsewhere"


def test_a_target_with_as_many_other_classes_is_refused(digits, monkeypatch):
    other = digits._replace(name="clothes", classes=(*digits.classes[:9], "boot"))
    monkeypatch.setattr(data, "load", lambda *_, **__: other)
    with pytest.raises(
        ValueError, match=r"the target mnist must have the classes of digits: 10 .* on 9; got 10 .* boot"
    ):
        data.target_of(digits, "mnist")
    monkeypatch.setattr(data, "load", lambda *_, **__: other._replace(classes=digits.classes))
    assert data.target_of(digits, "mnist").name == "clothes"
