"""The metrics of a run: what each needs, what is computed once, and folders of a few images."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from helpers import command, small
from PIL import Image

from ivfast import data, metrics, models
from ivfast.runs import evaluation

FAST = ("--device", "cpu", "--set", "tensorboard=false", "--set", "width=16")


def test_networks_samples_and_reference_are_computed_once(monkeypatch):
    digits = data.load("digits", limit=100)
    system = models.build(small("vae"), tuple(digits.train.shape[1:]))
    classifier = evaluation.classifier_of(digits)
    counts = {"classifier": 0, "samples": 0}

    def counted(name, result):
        def call(*args, **keywords):
            counts[name] += 1
            return result(*args, **keywords)

        return call

    monkeypatch.setattr(evaluation, "classifier_of", counted("classifier", lambda *_, **__: classifier))
    monkeypatch.setattr(metrics, "generate", counted("samples", metrics.generate))
    evaluated = evaluation.Evaluation(system, digits, n=50)
    values = [evaluated.run(name) for name in ("classifier-distance", "classifier-score", "classifier-distance")]
    assert counts == {"classifier": 1, "samples": 1}
    assert values[0] == values[2]
    expected = [
        metrics.frechet_classifier_distance(classifier, digits.train, x) for x in (evaluated.samples, digits.test)
    ]
    assert [value.value for value in values[0]] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("images", "batch"), [(2, 1), (3, 2), (6, 4)])
def test_a_few_images_train_sample_draw_and_evaluate(tmp_path, images, batch):
    run = tmp_path / ".run"
    for i in range(images):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    where = ("--data", "folder", "--root", tmp_path, "--image-size", 8)
    text = command("train", "vae", *where, "--steps", 2, "--batch-size", batch, *FAST, "--out", run)
    assert f"{images - 1} training and 1 test images" in text
    drawn = {path.stem for path in (run / "pictures").glob("*.png")}
    assert {"samples", "reconstructions", "curves"} <= drawn
    assert ("covariance" in drawn) == (images > 2)
    assert "interpolations" not in drawn  # they take two test images
    command("sample", run, "-n", 4)
    text = command("evaluate", run, "--samples", 8, "--device", "cpu")
    values = json.loads((run / "metrics.json").read_text())
    assert {"mse", "bound", "likelihood"} <= values.keys()
    assert ("fld" in values) == (images > 2)
    least = 6
    assert f"left out: kl-to-prior needs {least} training images or more, got {images - 1}" in text
    assert "No metric above judges the samples. --metrics fid does" in text
    text = command("evaluate", run, "--metrics", "kl-to-prior", "--device", "cpu", code=2)
    assert f"kl-to-prior needs {least} training images or more, got {images - 1}" in text


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_stream_that_is_not_utf8_gets_question_marks(encoding):
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    result = subprocess.run(
        [sys.executable, "-W", "error", "-m", "ivfast", "evaluate", "--help"], capture_output=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    assert "Fr?chet" in result.stdout.decode(encoding) or encoding == "cp1252"
