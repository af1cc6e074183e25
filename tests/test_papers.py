"""Paper commands: tiny runs of every experiment, exact known values, which results are stored or rerun, errors."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import command
from PIL import Image

from ivfast import cli, data, models
from ivfast.data import sources
from ivfast.metrics.probe import last_hidden_layer, probe
from ivfast.papers import EXPERIMENTS, find, report, s1, s2, s3, session
from ivfast.train.loop import Interrupted, NonFiniteLoss

TINY = {"steps": 2, "samples": 60, "seeds": [0], "workers": 1, "device": "cpu"}


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    patch.undo()


def cells(found, table=0):
    return {row[0]: row[1:] for row in found.tables[table].rows}


# One row of each table with the paper's numbers, as printed in the paper
PRINTED = {
    "s1-fig2": [["WAE-GAN (AAE)", 16, "towards 0"]],
    "s1-tables": [["WAE-GAN (AAE)", 53, 33, 109], ["WAE-GAN (AAE)", 5.5, 1.5, 15.1]],
    "s1-fig5": [["IVAAE svgd", "curve"]],
    "s2-example1": [[1.0, math.log(2)]],
    "s2-stacked": [["ivdcgan", 1000.0, 0.08]],
    "s2-ring": [["dcgan", None]],
    "s2-ablation": [[0.5, 10, 41.2]],
    "s3-table2": [["gan", "8.34 ± .03", "5.18 ± .03", "7.86 ± .05"], ["iwcgan", ".987 ± .002", ".798 ± .006"]],
    "s3-table3": [["aavae", "10%", -103.05]],
    "s3-table4": [["svae", "1%", 0.9412]],
    "s3-lemma1": [["optimal", 1.0]],
    "s4-table1": [["vae, S4", -1.593]],
    "s5-table1": [["vae", 220.2]],
}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_each_experiment_makes_its_tables_and_figures(name, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "STACKED", (200, 100))
    monkeypatch.setattr(s3, "FEWER", (3.0,))
    found = report.run(name, out=tmp_path, **TINY)
    saved = json.loads((tmp_path / "report.json").read_text())
    assert len(saved["tables"]) == len(PRINTED[name])
    for table, printed in zip(saved["tables"], PRINTED[name], strict=True):
        assert printed in [row[: len(printed)] for row in table["rows"]]
        assert all(len(row) == len(table["columns"]) for row in table["rows"])
        ours = [cell["values"] for row in table["rows"] for cell in row if isinstance(cell, dict)]
        if EXPERIMENTS[name].data:
            assert ours
            assert all(len(values) == 1 for values in ours)
    text = (tmp_path / "report.md").read_text()
    for path in found.figures.values():
        assert path.name in text
        extrema = Image.open(path).convert("L").getextrema()
        assert extrema[1] - extrema[0] > 100  # something is drawn
    assert found.figures
    if EXPERIMENTS[name].data:
        lines = (tmp_path / "rows.jsonl").read_text()
        monkeypatch.setattr(session, "_call", lambda task: pytest.fail("run again"))
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_: None)  # the slowest part, and already drawn
        again = report.run(name, out=tmp_path, **TINY)
        assert again.tables == found.tables
        assert (tmp_path / "rows.jsonl").read_text() == lines


def test_example_1_has_the_squares_own_divergences(tmp_path):
    for a, (_, two, _, four, _) in cells(report.run("s2-example1", out=tmp_path)).items():
        assert two == pytest.approx(math.log(2), abs=1e-12)
        assert four == pytest.approx((1 + a) * math.log(2), abs=1e-12)


def test_lemma_1_and_eq_14(tmp_path):
    (table,) = report.run("s3-lemma1", out=tmp_path).tables
    for name, theta, left, right, eq14, _ in table.rows:
        assert left == pytest.approx(right, abs=1e-9)
        assert (abs(left) < 1e-9) == (name == "uniform")
        if name == "optimal":
            assert left == pytest.approx(eq14, abs=1e-9)
            assert left * theta > 0  # downhill is towards the data's mean
    assert abs(s3.gradients(1.7, "logistic").left - s3.gradients(1.7, "logistic").eq14) > 0.05  # D is not the optimum


@pytest.mark.trains
def test_discriminator_alone_moves_nothing_else_and_learns():
    digits = data.load("digits")
    for name, chance in (("wae-gan", math.log(2)), ("ivaae-bw", math.log(5))):
        settings = replace(models.preset(name, "digits"), device="cpu", log_every=10, tensorboard=False, ema=0.0)
        system = models.build(settings, (1, 8, 8))
        before = {name: [p.clone() for p in module.parameters()] for name, module in system.modules.items()}
        losses = s1.discriminator_alone(system, digits, 60)
        assert len(losses) == 6
        assert losses[0] == pytest.approx(chance, rel=0.25)  # a D that knows little, in both scales
        assert losses[-1] < losses[0]
        moved = {
            name: any(not torch.equal(a, b) for a, b in zip(before[name], module.parameters(), strict=True))
            for name, module in system.modules.items()
        }
        assert moved == {"encoder": False, "decoder": False, "discriminator": True}


@pytest.mark.trains
def test_probe_learns_what_the_features_show_and_nothing_else():
    labels = torch.arange(300) % 3
    shown = torch.nn.functional.one_hot(labels).float() + 0.1 * torch.randn(300, 3)
    options = {"steps": 50, "every": 20}
    found = probe(shown, labels, shown, labels, **options)
    assert found.steps == [20, 40, 50]
    assert found.errors[-1] == 0
    assert probe(shown, labels, shown, labels, **options) == found
    noise = torch.randn(300, 3), torch.randn(300, 3)
    assert probe(noise[0], labels, noise[1], labels, **options).errors[-1] > 0.4
    hidden = labels.where(torch.arange(300) % 2 == 0, -1)
    assert probe(shown, hidden, shown, labels, **options).errors[-1] == 0
    with pytest.raises(ValueError, match="train_labels must hold one label per feature: 300, got 5"):
        probe(shown, labels[:5], shown, labels)
    with pytest.raises(ValueError, match="at least 2 classes, got 1"):
        probe(shown, 0 * labels, shown, 0 * labels)
    encoder = models.build(models.preset("wae-gan", "digits"), (1, 8, 8)).modules["encoder"]
    layer = last_hidden_layer(encoder)(torch.randn(5, 1, 8, 8))
    assert layer.shape == (5, 256)
    assert bool((layer >= 0).all())
    torch.testing.assert_close(encoder[-1](layer).shape, torch.Size([5, 16]))


@pytest.fixture
def at(tmp_path):
    """A session, and a job that counts its runs."""
    calls = []

    def job(job):
        calls.append((job.settings.seed, job.extra["n"]))
        if job.settings.seed == 13:
            raise NonFiniteLoss("discriminator", "fake", 5, float("nan"), None)
        return {"value": 10.0 * job.settings.seed}

    def run(seeds, n=1, **changes):
        here = session.start("s2-ablation", out=tmp_path, workers=1, device="cpu")
        return here.values(job, [session.Job(here.settings("dcgan", s, **changes), {"n": n}) for s in seeds])

    run.calls = calls
    return run


def test_only_rows_of_the_same_settings_are_kept(at, tmp_path):
    assert [row.values["value"] for row in at([2, 1])] == [20, 10]
    assert [row.values["value"] for row in at([1, 2, 3])] == [10, 20, 30]
    assert at.calls == [(2, 1), (1, 1), (3, 1)]
    at([1], n=2)
    at([1], instance_noise=0.5)
    at([1], root="elsewhere")
    assert at.calls[3:] == [(1, 2), (1, 1)]  # the location of the files is not a setting of the run
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"key": {"cut sh')
    at([1, 2, 3, 4])
    assert at.calls[5:] == [(4, 1)]
    assert len(at([1, 2, 3, 4])) == 4


def test_a_run_that_diverges_is_a_result(at):
    found = at([1, 2, 13])
    assert str(session.spread(found, "value")) == "15 ± 7.1, 1 diverged"
    assert str(session.Spread((), 2)) == "2 diverged"
    assert str(session.Spread((1 / 3,))) == "0.3333"
    assert str(session.Spread((2.0, math.inf))) == "2, inf"


def test_ctrl_c_keeps_what_is_finished(at, monkeypatch):
    whole = session._call

    def call(task):
        if task[2].settings.seed == 3:
            raise Interrupted(Path("gone"), 7)
        return whole(task)

    monkeypatch.setattr(session, "_call", call)
    with pytest.raises(KeyboardInterrupt, match="finished runs are kept: the same command continues"):
        at([1, 2, 3])
    monkeypatch.setattr(session, "_call", whole)
    at([1, 2, 3])
    assert at.calls == [(1, 1), (2, 1), (3, 1)]


def test_several_processes_give_the_same_rows(tmp_path):
    options = {**TINY, "seeds": [0, 1], "samples": 20}
    one, two = (report.run("s2-ring", out=tmp_path / str(n), **{**options, "workers": n}) for n in (1, 2))
    assert one.tables == two.tables


def test_data_that_is_not_there_is_said_and_replaced(tmp_path):
    found = report.run("s3-table2", full=True, root=tmp_path / "none", out=tmp_path, **TINY)
    saved = json.loads((tmp_path / "report.json").read_text())
    assert (saved["data"], saved["full"]) == ("digits", False)
    assert re.search(r"MNIST is not in .*none.* Running on digits instead, at the small size\.", found.notes[0])
    assert "on digits" in (tmp_path / "report.md").read_text().splitlines()[0]


ERRORS = {
    "no such experiment": (["s1-fig3"], r"no experiment 's1-fig3'; did you mean s1-fig[25]\?$"),
    "no such data set": (["s1-fig2", "--data", "mnits"], r"no data set 'mnits'; did you mean mnist\?"),
    "data of an exact one": (
        ["s3-lemma1", "--data", "mnist"],
        r"--data: s3-lemma1 is computed exactly and takes no data set",
    ),
    "stacked alone": (["s2-stacked", "--data", "digits"], r"one of stacked-digits, stacked-mnist, got digits"),
    "a mixture alone": (["s2-ring", "--data", "spirals"], r"one of ring, grid, 8-gaussians, got spirals"),
    "seeds": (["s2-ring", "--seeds", "one"], r"--seeds takes a number or a list like 0,1,2, got 'one'"),
    "no seeds": (["s2-ring", "--seeds", "0"], r"--seeds must be a number of seeds from 1 to 10000, .* got '0'"),
    "seeds twice": (["s2-ring", "--seeds", "1,1"], r"--seeds must be different numbers, at least one, got 1, 1"),
    "device": (["s2-ring", "--device", "gpu"], r"--device must be cpu, cuda or cuda:N, got 'gpu'"),
}


@pytest.mark.parametrize(("arguments", "message"), ERRORS.values(), ids=ERRORS)
def test_error_in_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = command("paper", *arguments, code=2)
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert re.search(message, line)
    assert "Traceback" not in text


def test_command_line_runs_lists_and_helps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = command(
        "paper", "s2-ring", "--steps", 2, "--samples", 50, "--seeds", "4,", "--workers", 1, "--device", "cpu"
    )
    assert "seeds 4" in text
    for name in ("ring.png", "report.md", "report.json", "rows.jsonl"):
        assert Path("papers/s2-ring", name).is_file()
    assert "papers/s2-ring/ring.png" in text
    listed, helped = " ".join(command("paper", "--list").split()), command("paper")
    for experiment in EXPERIMENTS.values():
        assert experiment.about in listed
        assert experiment.name in helped
    text = " ".join(command("paper", "s1-fig2", "--help").split())
    assert find("s1-fig2").about in text
    assert "with --full mnist" in text
    assert cli.paper._seeds("3") == [0, 1, 2]
    assert cli.paper._seeds("4,7") == [4, 7]
    assert s2.unpacked(s2.packed(images := torch.randint(0, 255, (3, 2, 4, 4), dtype=torch.uint8)), (2, 4, 4)).equal(
        images
    )
