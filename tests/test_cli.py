"""The command line as users run it: short real runs on digits, and every error in one line."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer
from helpers import command
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from ivfast import cli, data, metrics, models
from ivfast.cli.app import explain
from ivfast.data import sources
from ivfast.runs import evaluation, load_system
from ivfast.train.checkpoint import LAST

MAIN = "from ivfast.cli import main; main()"  # the same as the installed command
SMALL = ("--set", "width=64", "--set", "discriminator_width=64", "--set", "tensorboard=false", "--device", "cpu")


@pytest.fixture(autouse=True)
def _one_thread_in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


def subprocess_of(*arguments, **keywords):
    """With SIGINT handled as in a terminal, because a shell starts background jobs with it ignored."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    keywords["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(
        [sys.executable, "-c", MAIN, *map(str, arguments)],
        env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **keywords,
    )  # fmt: skip


def log(run):
    return [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One trained run; tests must not change it."""
    out = tmp_path_factory.mktemp("run") / "rad"
    result = CliRunner().invoke(cli.app, ["train", "--epochs", "4", "--out", str(out), "--seed", "5", *SMALL])
    assert result.exit_code == 0, result.output
    return out


def test_train_with_defaults_makes_numbered_run_folders_and_says_what_is_where():
    for n in (1, 2):
        text = command("train", "--epochs", 1, *SMALL)
        folder = Path("runs") / f"ivaae-rad-digits-{n}"
        assert f"writing to {folder}" in text
        assert "1,497 training and 300 test images 1x8x8, codes of 16" in text
        named = re.findall(rf"^  ({folder}\S+)", text, re.MULTILINE)
        assert len(named) == 7
        assert all(Path(name).is_file() for name in named)
        for said in (f"sample {folder} -n 64", f"evaluate {folder}", f"train --resume --out {folder} --epochs 2"):
            assert f"ivfast {said}\n" in text
        assert load_file(folder / LAST)


def test_options_reach_the_settings_and_training_improves(run):
    saved = json.loads((run / "config.json").read_text())
    assert (saved["system"], saved["data"], saved["epochs"], saved["seed"]) == ("ivaae-rad", "digits", 4, 5)
    assert (saved["width"], saved["tensorboard"]) == (64, False)
    losses = [record["losses"]["autoencoder/recon"] for record in log(run) if record["kind"] == "losses"]
    assert losses[-1] < 0.7 * losses[0]
    text = command(
        "train", "aae", "--flip", "--data-memory", 0, "--epochs", 1, "--batch-size", 100, "--latent-dim", 8, "--image-size", 12, "--ema", 0.9,
        "--fld-weight", 0.5, "--precision", "bf16", "--set", 'learning_rates={"default": 0.002}', "--out", "other", *SMALL,
    )  # fmt: skip
    saved = json.loads(Path("other/config.json").read_text())
    expected = {
        "system": "wae-gan", "batch_size": 100, "latent_dim": 8, "image_size": 12, "ema": 0.9, "precision": "bf16",
        "fld_weight": 0.5, "learning_rates": {"default": 0.002}, "flip": True, "data_memory": 0,
    }  # fmt: skip
    assert {name: saved[name] for name in expected} == expected
    assert "the 1,497 training images stay on the host, and their batches are prefetched" in text
    system, _ = load_system("other")
    assert system.image_shape == (1, 12, 12)


def test_the_metrics_of_the_log_are_those_of_the_saved_system(run):
    system, _ = load_system(run)
    digits = data.load("digits")
    last = [record for record in log(run) if record["kind"] == "metrics"][-1]["metrics"]
    mse, psnr, ssim = metrics.reconstruction(system, digits.test)
    fld = metrics.latent_frechet_distance(metrics.codes(system, digits.train))
    assert last == pytest.approx({"fld": fld, "mse": mse, "psnr": psnr, "ssim": ssim}, rel=1e-4)


def test_resume_goes_on_where_the_run_stood(run):
    command("train", "--epochs", 2, "--seed", 5, "--out", "half", *SMALL)
    text = command("train", "--resume", "--out", "half", "--epochs", 4)
    assert "92 steps" in text
    whole, half = load_file(run / LAST), load_file("half" / LAST)
    for name in whole:
        if name.startswith("weights/"):
            torch.testing.assert_close(half[name], whole[name], rtol=0, atol=0)
    steps = [record["step"] for record in log("half") if record["kind"] == "metrics"]
    assert steps == sorted(set(steps))
    assert "already complete" in command("train", "--resume", "--out", "half")


def test_threads_are_one_for_small_networks_unless_named():
    torch.set_num_threads(2)
    command("train", "--steps", 1, "--threads", 2, "--out", "two", *SMALL)
    assert torch.get_num_threads() == 2
    command(
        "train", "--steps", 1, "--out", "wide", "--set", "width=600", "--set", "tensorboard=false", "--device", "cpu"
    )
    assert torch.get_num_threads() == 2
    command("train", "--steps", 1, "--out", "one", *SMALL)
    assert torch.get_num_threads() == 1


def test_sample_draws_the_same_grid_for_the_same_seed(run, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        command("sample", run, "-n", 20, "--columns", 5, "--seed", seed, "--out", f"{name}/grid.png")
    a, b, c = (Image.open(tmp_path / name / "grid.png") for name in "abc")
    assert a.tobytes() == b.tobytes() != c.tobytes()
    assert a.width / a.height == pytest.approx(5 / 4, rel=0.02)
    system, _ = load_system(run)
    command("sample", run, "-n", 3, "--seed", 1, "--out", "files")
    expected = metrics.generate(system, 3, seed=1)
    for i, image in enumerate(expected):
        assert Image.open(tmp_path / "files" / f"{i:06d}.png").tobytes() == image.numpy().tobytes()


def test_evaluate_writes_and_prints_what_the_metrics_give(run):
    text = command("evaluate", run, "--samples", 300)
    values = json.loads((run / "metrics.json").read_text())
    system, _ = load_system(run)
    digits = data.load("digits")
    assert values["fld"] == pytest.approx(metrics.latent_frechet_distance(metrics.codes(system, digits.train)))
    assert values["mse"] == pytest.approx(metrics.reconstruction(system, digits.test).mse)
    assert values["classifier_distance"] > values["classifier_distance_test"] > 0
    assert 1 <= values["classifier_score"] <= 10
    for name in ("fld", "mse", "psnr", "ssim", "classifier_distance", "classifier_distance_test", "classifier_score"):
        assert re.search(rf"{name} +{values[name]:.4g} ", text)
    assert 97 < float(re.search(r"accuracy ([\d.]+)%", text)[1]) <= 100
    command("evaluate", run, "--metrics", "reconstruction")
    assert set(json.loads((run / "metrics.json").read_text())) == {"mse", "psnr", "ssim", "samples", "seed"}


def test_modes_of_a_stacked_run(monkeypatch):
    monkeypatch.setattr(sources, "STACKED", (300, 100))
    command("train", "wae-gan", "--data", "stacked-digits", "--set", "net=mlp", "--image-size", 8, "--batch-size", 50,
           "--latent-dim", 8, "--epochs", 1, "--out", "stacked", *SMALL)  # fmt: skip
    text = command("evaluate", "stacked", "--samples", 200)
    values = json.loads(Path("stacked/metrics.json").read_text())
    assert 0 <= values["modes"] <= 200
    assert 0 <= values["modes_confident"] <= 1
    assert "modes_kl" in text


ERRORS = {
    "no such system": (["train", "waegan"], r"no system 'waegan'; did you mean wae-gan\?$"),
    "half a name": (["train", "wgan"], r"no system 'wgan'; did you mean wgan-gp\?$"),
    "no name at all": (["train", "zzz"], r"no system 'zzz'; ivfast train --help lists them$"),
    "data of another kind": (
        ["train", "vae", "--data", "ring"],
        r"vae decodes to Bernoulli means, and ring does not hold only 0 and 1; what can learn from it: wae-mmd, .*introvae; "
        r"vae can learn from digits, .*celeba.*folder, stacked-digits, stacked-mnist, four-points$",
    ),
    "data without labels": (
        ["train", "cgan", "--data", "ring"],
        r"cgan learns from labels, and ring has none; what can learn from it: wae-mmd, .*introvae; "
        r"cgan can learn from digits, mnist, .*, stl10-all, folder, stacked-digits, stacked-mnist$",
    ),
    "images without labels": (
        ["train", "aasvae", "--data", "lsun:bedroom"],
        r"aasvae learns from labels, and lsun:bedroom has none; what can learn from it: wae-mmd, .*; aasvae can .* digits",
    ),
    "one sample for an unbiased estimate": (
        ["train", "wae-mmd", "--batch-size", "1"],
        r"batch_size must be at least 2 for the unbiased MMD, got 1",
    ),
    "no such data set": (["train", "--data", "celebs"], r"no data set 'celebs'; did you mean celeba\?"),
    "data not there": (["train", "--data", "mnist", "--root", "here"], r"MNIST is not in .*here/MNIST/raw.*--download"),
    "no such setting": (["train", "--set", "widht=3"], r"no setting 'widht'; did you mean width\?"),
    "setting of another system": (
        ["train", "wae-mmd", "--packing", "2"],
        r"packing has no effect on wae-mmd; it is read by ivdcgan, ivlsgan, dcgan",
    ),
    "setting of most": (
        ["train", "wae-mmd", "--set", "discriminator_width=8"],
        r"has no effect on wae-mmd; it is read by all but wae-mmd, introvae, s-introvae, as-introvae",
    ),
    "JSON of another type": (["train", "--betas", "3"], "betas must be a list of 2 numbers, got 3"),
    "setting without value": (["train", "--set", "width"], r"--set takes NAME=VALUE, got 'width'"),
    "setting of a wrong type": (["train", "--set", "lam=much"], r"--set lam takes a JSON value like 1.0, got 'much'"),
    "setting that is no JSON": (["train", "--set", "tensorboard=False"], r"tensorboard takes .*like true, got 'False'"),
    "batch too large": (["train", "--batch-size", "5000"], r"batch_size must be at most .*1497, got 5000"),
    "one code": (["train", "--fld-weight", "1", "--batch-size", "1"], r"fld_weight needs a batch_size of at least 2"),
    "no such device": (["train", "--device", "gpu"], r"--device must be cpu, cuda or cuda:N, got 'gpu'"),
    "absent device": (
        ["train", "--device", "cuda:99"],
        r"--device cuda:99 is not available: torch .* use --device cpu",
    ),
    "capture on a CPU": (
        ["train", "--capture", "--device", "cpu"],
        r"capture needs a CUDA device, .* use --no-capture",
    ),
    "resume what": (["train", "--resume"], r"--resume needs --out, the folder of the run"),
    "resume nothing": (["train", "--resume", "--out", "nope"], r"nope is not the folder of a run"),
    "sample nothing": (["sample", "nope"], r"nope is not the folder of a run.*Make one with ivfast train\."),
    "evaluate nothing": (["evaluate", "nope"], r"nope is not the folder of a run"),
}


@pytest.mark.parametrize(("arguments", "message"), ERRORS.values(), ids=ERRORS)
def test_error_in_one_line(arguments, message):
    text = command(*arguments, code=2)
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert re.search(message, line)
    assert "Traceback" not in text
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "wae-mmd", "--resume", "--out"), r"--system: .* has ivaae-rad, .* cannot change it to wae-mmd"),
        (("train", "--latent-dim", "3", "--resume", "--out"), r"--latent-dim: the run .* has 16"),
        (("train", "--out"), r"already holds a run; add --resume"),
        (("evaluate", "--metrics", "flt"), r"no metric 'flt'; did you mean fld\?"),
        (("evaluate", "--metrics", "modes"), r"modes needs a stacked data set or a mixture, got digits"),
        (
            ("evaluate", "--metrics", "fid", "--inception-weights", "none.pth"),
            r"none\.pth does not exist.*classifier-dis",
        ),
    ],
)
def test_error_about_a_run(run, arguments, message):
    before = (run / "config.json").read_bytes()
    line = command(*arguments, run, code=2).splitlines()[-1]
    assert re.search(message, line)
    assert (run / "config.json").read_bytes() == before


def test_damaged_checkpoint_in_one_line(run, tmp_path):
    (tmp_path / "broken" / "checkpoints").mkdir(parents=True)
    (tmp_path / "broken" / "config.json").write_bytes((run / "config.json").read_bytes())
    (tmp_path / "broken" / LAST).write_bytes((run / LAST).read_bytes()[:5000])
    assert re.search(r"error: .*last\.safetensors: it is not a complete", command("sample", "broken", code=2))


def test_debug_shows_the_traceback():
    result = CliRunner().invoke(cli.app, ["train", "waegan", "--debug"])
    assert isinstance(result.exception, ValueError)


def test_divergence_names_the_term():
    text = command(
        "train", "--epochs", 1, "--set", "lam=1e38", "--set", 'learning_rates={"default": 1e30}', *SMALL, code=2
    )
    assert re.search(r"error: the term '\w+' of phase '\w+' became (nan|inf|-inf) at step \d+", text)


def test_ctrl_c_saves_and_tells_how_to_go_on(tmp_path):
    out = tmp_path / "a run"
    process = subprocess_of("train", "--epochs", 2000, "--out", out, *SMALL, cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not (out / "log.jsonl").exists() or '"losses"' not in (out / "log.jsonl").read_text():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    text, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert {"samples.png", "reconstructions.png", "curves.png"} <= {path.name for path in (out / "pictures").iterdir()}
    assert f"ivfast sample '{out}' -n 64\n" in text
    assert f"ivfast train --resume --out '{out}' --epochs 4000\n" in text
    assert errors.endswith(f"resume with: ivfast train --resume --out '{out}'\n")
    step = int(re.search(r"stopped after step (\d+); resume with: ivfast train --resume --out", errors)[1])
    assert "Traceback" not in errors
    epochs = step // 23 + 1
    assert f"{23 * epochs} steps" in command("train", "--resume", "--out", out, "--epochs", epochs)


@pytest.mark.parametrize(
    ("command", "wanted"), [(("-m", "ivfast"), "CPU tensors"), (("-c", MAIN, "--help"), "evaluate")]
)
def test_entry_points_in_fresh_processes(tmp_path, command, wanted):
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert wanted in done.stdout


def test_info_agrees_with_the_registry():
    from ivfast._registry import OPS

    text = command("info")
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.split()[:1] and line.split()[0] in OPS}
    assert set(lines) >= {name for name in OPS if not name.endswith("_backward")}
    for name, line in lines.items():
        assert (line[1] == "C++") == (OPS[name].missing("cpu", "cpu") is None)
        assert ("Triton" in line) == (OPS[name].missing("triton", "cuda") is None)


def test_help_lists_every_system_data_set_and_metric():
    train, evaluate = command("train", "--help"), command("evaluate", "--help")
    assert set(cli.SYSTEMS) == set(models.SYSTEMS)
    assert set(cli.METRICS) == set(evaluation.METRICS)
    for name in (*models.SYSTEMS, *sources.DATASETS):
        assert re.search(rf"^ *.*\b{re.escape(name)}\b", train, re.MULTILINE)
    for name in evaluation.METRICS:
        assert f"  {name} " in evaluate


@pytest.mark.parametrize(("name", "entries"), [("train", cli.SYSTEMS), ("train", cli.DATA), ("evaluate", cli.METRICS)])
def test_lists_of_the_help_fit_80_columns(name, entries):
    text = CliRunner().invoke(cli.app, [name, "--help"], env={"COLUMNS": "80"}).output
    lines, wide = [line.rstrip() for line in text.splitlines()], max(map(len, entries))
    for entry, about in entries.items():
        assert f"   {entry:{wide}}  {about}" in lines


def test_bare_command_teaches():
    result = CliRunner().invoke(cli.app, [])
    assert "train" in result.output
    assert "evaluate" in result.output


def test_torchvision_that_cannot_load_is_explained(capsys):
    error = RuntimeError("operator torchvision::nms does not exist")
    with pytest.raises(typer.Exit):
        explain(error, debug=False)
    assert re.search(r"torchvision \S+ does not fit torch \S+: install both from one index", capsys.readouterr().err)
