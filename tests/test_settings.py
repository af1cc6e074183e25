"""A setting is declared in one place and found everywhere: options, checks, messages, files and documentation."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy
import pytest
from helpers import command
from typer.testing import CliRunner

from ivfast import cli, models, runs
from ivfast.cli.options import COMMON
from ivfast.data import sources
from ivfast.train import Settings
from ivfast.train.declare import setting

ROOT = Path(__file__).resolve().parents[1]
SMALL = ("--set", "width=16", "--discriminator-width", "16", "--no-tensorboard", "--device", "cpu")
RANGE = "must be at least 0.5 and below 2"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch, threads):
    threads(1)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def warmth(monkeypatch):
    """A new setting of wae-gan: this class is all that is written."""
    system = models.SYSTEMS["wae-gan"]

    @dataclass(frozen=True)
    class WarmSettings(system.Settings):
        warmth: float = setting(0.75, help="How warm the codes are.", at_least=0.5, below=2, metavar="DEGREES")
        taste: str = setting("sweet", help="How the codes taste.", choices=("sweet", "sour"))
        loud: bool = setting(False, help="Whether the codes are loud.")

    monkeypatch.setattr(system, "Settings", WarmSettings)


def error(*arguments: object) -> str:
    """The line about an error, which is the only one."""
    (line,) = command(*arguments, code=2).splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


@pytest.mark.usefixtures("warmth")
def test_a_new_setting_is_an_option_of_its_system_alone():
    text = command("train", "wae-gan", "--help")
    assert re.search(r"--warmth +DEGREES \[0.5<=x<2\] +How warm the codes are. \[default: 0.75\]", text)
    assert re.search(r"--taste +sweet\|sour +How the codes taste. \[default: sweet\]", text)
    assert re.search(r"--loud +--no-loud +<bool> +Whether the codes are loud. \[default: no\]", text)
    for other in ((), ("wae-mmd",), ("dcgan", "--data", "mnist")):
        assert "warm" not in command("train", *other, "--help")


@pytest.mark.usefixtures("warmth")
def test_a_new_setting_is_checked_wherever_it_comes_from():
    for arguments in (("--warmth", 2), ("--warmth=2.0",), ("--set", "warmth=2")):
        assert re.fullmatch(rf"warmth {RANGE}, got 2(\.0)?", error("train", "wae-gan", *arguments))
    assert error("train", "wae-gan", "--warmth", "hot") == "--warmth takes a number, got 'hot'"
    assert error("train", "wae-gan", "--taste", "bitter") == "taste must be one of 'sweet', 'sour', got 'bitter'"
    for value in (2, 0.4, float("nan"), float("inf"), True, "1", None, [1.0]):
        with pytest.raises(ValueError, match=f"warmth {RANGE}, got "):
            models.settings("wae-gan", warmth=value)
    with pytest.raises(ValueError, match="loud must be true or false, got 1"):
        models.settings("wae-gan", loud=1)


@pytest.mark.usefixtures("warmth")
def test_a_new_setting_is_refused_by_every_other_system():
    refused = "warmth has no effect on wae-mmd; it is read by wae-gan"
    for arguments in (("--warmth", 1), ("--warmth=1",), ("--set", "warmth=1")):
        assert error("train", "wae-mmd", *arguments) == refused
        assert error("train", *arguments, "wae-mmd") == refused
    assert error("train", "--warmth", 1) == "warmth has no effect on ivaae-rad; it is read by wae-gan"
    assert error("train", "wae-mmd", "--no-loud") == "loud has no effect on wae-mmd; it is read by wae-gan"
    for name in models.SYSTEMS:
        if name != "wae-gan":
            with pytest.raises(ValueError, match=f"^warmth has no effect on {name}; it is read by wae-gan$"):
                dataclasses.replace(models.preset(name, "digits"), warmth=1.0)
    assert error("train", "aae", "--warmht", 1) == "wae-gan has no option --warmht; did you mean --warmth?"
    assert error("train", "aae", "--set", "warmht=1").startswith("there is no setting 'warmht'; did you mean warmth?")
    with pytest.raises(ValueError, match=r"unknown settings: warmht; did you mean warmth\?"):
        models.settings("wae-gan", warmht=1.0)


@pytest.mark.usefixtures("warmth")
def test_a_new_setting_is_saved_and_read_back():
    new = ("--warmth", 1.5, "--taste", "sour", "--loud")
    command("train", "wae-gan", "--steps", 2, "--out", "run", *new, *SMALL)
    saved = json.loads(Path("run/config.json").read_text())
    assert (saved["warmth"], saved["taste"], saved["loud"], saved["width"]) == (1.5, "sour", True, 16)
    settings = runs.config(Path("run"))
    assert (settings.warmth, settings.taste, settings.loud) == (1.5, "sour", True)
    assert runs.load_system("run")[1] == settings
    assert error("train", "--resume", "--out", "run", "--warmth", 1).startswith("--warmth: the run in run has 1.5, and")
    command("train", "--resume", "--out", "run", "--steps", 3, "--warmth", 1.5)
    assert runs.config(Path("run")) == dataclasses.replace(settings, steps=3)
    Path("run/config.json").write_text(json.dumps({**saved, "colour": "red"}))
    assert error("train", "--resume", "--out", "run") == (
        "run/config.json: unknown settings: colour, which wae-gan does not have"
    )
    Path("run/config.json").write_text(json.dumps({**saved, "packing": 2}))
    assert "packing has no effect on wae-gan; it is read by ivdcgan" in error("evaluate", "run")


@pytest.mark.usefixtures("warmth")
def test_a_new_setting_is_documented():
    lines = models.documentation().splitlines()
    assert "| `warmth` | 0.75 | 0.5<=x<2 | How warm the codes are. | wae-gan |" in lines
    assert "| `taste` | sweet | sweet \\| sour | How the codes taste. | wae-gan |" in lines


def test_the_page_of_settings_is_up_to_date():
    assert (ROOT / "docs" / "settings.md").read_text() == models.documentation()


@pytest.mark.parametrize("name", models.SYSTEMS)
def test_a_systems_help_has_its_options_and_the_defaults_for_the_data(name):
    settings = models.preset(name, "four-points")
    text = " ".join(command("train", name, "--data", "four-points", "--help").replace("│", " ").split())
    rows = dict(re.findall(r" --([a-z][a-z0-9-]*) (?!--help)(.*?)(?= --[a-z]|$)", text))
    for field, entry in settings.declared().items():
        if field == "system":
            continue
        assert entry.flag[2:] in rows, field
        assert f"{' '.join(entry.help.split()[:3])}" in text
        assert f"[default: {entry.shown(getattr(settings, field))}]" in text
    others = {field for kind in models.SYSTEMS.values() for field in kind.Settings.declared()}
    assert not [field for field in others - {*settings.declared()} if field.replace("_", "-") in rows]


def test_the_defaults_of_all_systems_are_in_no_preset():
    for name, system in models.SYSTEMS.items():
        for data in (*sources.DATASETS, "ring"):
            settings = models.preset(name, data)
            assert not {*system.preset(data)} & {*COMMON}
            assert all(getattr(settings, field) == entry.default for field, entry in Settings.declared().items()
                       if field in COMMON and field != "data")  # fmt: skip


def test_values_of_every_type_come_by_option():
    rates, stones = '{"default": 0.002, "encoder": 0.001}', '{"2": 0.5}'
    command("train", "--steps", 1, "--out", "run", "--learning-rates", rates, "--milestones", stones,
            "--betas", "[0.4, 0.9]", "--flip", "--no-capture", "--ema", 0.5, "--seed", 3, *SMALL)  # fmt: skip
    settings = runs.config(Path("run"))
    assert settings.learning_rates == {"default": 0.002, "encoder": 0.001}
    assert (settings.milestones, settings.betas) == ({2: 0.5}, (0.4, 0.9))
    assert (settings.flip, settings.capture, settings.ema, settings.seed) == (True, False, 0.5, 3)
    command("train", "--resume", "--out", "run", "--betas", "[0.4, 0.9]", "--milestones", stones, "--steps", 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--epochs", "2.5"), "--epochs takes an integer, got '2.5'"),
        (("--epochs", "0"), "epochs must be an integer >= 1, got 0"),
        (("--betas", "half"), "--betas takes JSON like [0.9, 0.999], got 'half'"),
        (("--learning-rates", '{"encoder": 0}'), "learning_rates['encoder'] must be finite and positive, got 0"),
        (("--set", "flip=1"), "flip must be true or false, got 1"),
        (("--set", "system=avb"), "--set cannot change the system; use: ivfast train avb"),
        (("--epoch", "3"), "ivaae-rad has no option --epoch; did you mean --epochs?"),
        (("--zzz",), "ivaae-rad has no option --zzz; ivfast train ivaae-rad --help lists its options"),
        (("--epochs",), "Option '--epochs' requires an argument."),
        (("--seed", 10**20), f"seed must be an integer from 0 to 2^63 - 1, got {10**20}"),
        (("--seed", "-1"), "seed must be an integer >= 0, got -1"),
        (("--seed", "9" * 5000), f"--seed takes an integer, got '{'9' * 79}"),
        (("--width", 10**20), f"width must be an integer from 1 to 2^63 - 1, got {10**20}"),
        (("--set", "seed=null"), "seed must be an integer >= 0, got None"),
        (("--set", "lam=1" + "0" * 400), "lam must be finite and >= 0, got 1" + "0" * 79),
        (("--set", "betas=[0.5]"), "betas must be a list of 2 numbers, got [0.5]"),
        (("--betas", "[0.5, 0.9, 0.9]"), "betas must be a list of 2 numbers, got [0.5, 0.9, 0.9]"),
        (("--set", "betas=[0.5,2]"), "betas[1] must be at least 0 and below 1, got 2"),
        (("--betas", "[0.5, null]"), "betas[1] must be at least 0 and below 1, got None"),
        (("--betas", "0.5"), "betas must be a list of 2 numbers, got 0.5"),
        (("--set", "learning_rates=0.001"), "learning_rates must be an object, got 0.001"),
        (
            ("--set", 'learning_rates={"default":null}'),
            "learning_rates['default'] must be finite and positive, got None",
        ),
        (("--set", 'learning_rates={"default":"1"}'), "learning_rates['default'] must be finite and positive, got '1'"),
        (("--set", 'milestones={"a":0.1}'), "the keys of milestones must be integers >= 0, got ['a']"),
        (("--milestones", '{"-1":0.1}'), "the keys of milestones must be integers >= 0, got -1"),
        (("--milestones", '{"1":0.1,"01":0.2}'), "the keys of milestones must differ, got ['1', '01']"),
        (("--milestones", '{"1":-0.1}'), "milestones[1] must be finite and >= 0, got -0.1"),
        (("--set", "milestones=[5]"), "milestones must be an object, got [5]"),
        (("--set", "flip=" + "[" * 5000), f"--set flip takes a JSON value like false, got '{'[' * 79}"),
        (("wae-gan", "wae-mmd"), "train takes one system, got wae-gan and wae-mmd"),
    ],
)
def test_a_wrong_option_in_one_line(arguments, message):
    assert error("train", *arguments) == message


def test_a_field_without_a_declaration_is_an_error():
    @dataclass(frozen=True)
    class Bare(Settings):
        warmth: float = 1.0

    with pytest.raises(TypeError, match=r"warmth must be declared by setting\(default, help=\.\.\.\)"):
        Bare()


def test_settings_of_another_system_do_not_build_one():
    settings = dataclasses.replace(models.preset("dcgan", "digits"), system="wae-mmd")
    with pytest.raises(TypeError, match="settings must be AutoEncoderSettings, got GanSettings"):
        models.build(settings, (1, 8, 8))


def test_the_general_help_needs_no_torch():
    """Nor do the modules of the command line: only `import ivfast` itself does."""
    code = f"""
import sys, types
package = types.ModuleType("ivfast")
package.__path__ = [{str(ROOT / "ivfast")!r}]
sys.modules["ivfast"] = package
from ivfast.cli import app
try:
    app(["train", "--help"])
finally:
    assert "torch" not in sys.modules and "numpy" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--latent-dim" in done.stdout


def test_help_is_readable_in_a_terminal_of_80_columns():
    for arguments in ((), ("ivaae-svgd",), ("avb", "--data", "four-points")):
        result = CliRunner().invoke(cli.app, ["train", *arguments, "--help"], env={"COLUMNS": "80", "TERM": "dumb"})
        assert result.exit_code == 0
        assert max(map(len, result.output.splitlines())) <= 80
        assert "…" not in result.output


def test_numbers_of_numpy_are_numbers():
    settings = models.settings("wae-mmd", seed=numpy.int64(3), lam=numpy.float32(0.5), ema=numpy.float64(0.25))
    assert settings == models.settings("wae-mmd", seed=3, lam=0.5, ema=0.25)
    assert json.loads(json.dumps(settings.to_dict()))["seed"] == 3
    for value in (numpy.bool_(True), numpy.float64("nan"), numpy.float64(1.5)):
        with pytest.raises(ValueError, match="seed must be an integer >= 0"):
            models.settings("wae-mmd", seed=value)


@pytest.mark.parametrize(
    "text", ["{", "[]", "3", "null", '"ivaae-rad"', '{"system": []}', '{"system": 3}', "[" * 5000, "\xff"]
)
def test_a_file_of_settings_that_is_none_is_named(text):
    Path("run").mkdir()
    Path("run/config.json").write_bytes(text.encode("latin-1"))
    for arguments in (("train", "--resume", "--out", "run"), ("sample", "run")):
        assert error(*arguments).startswith("run/config.json: ")


def test_an_error_that_nobody_foresaw_ends_in_one_line_too(monkeypatch):
    def broken(*_):
        raise KeyError("a\nb")

    monkeypatch.setattr(runs, "fresh", broken)
    assert error("train") == "KeyError: 'a\\nb'; --debug shows where it comes from"
    monkeypatch.setattr(runs, "system_name", broken)
    assert error("train", "wae-mmd") == "KeyError: 'a\\nb'; --debug shows where it comes from"
    for arguments in (["train", "--debug"], ["train", "wae-mmd", "--debug"]):
        assert isinstance(CliRunner().invoke(cli.app, arguments).exception, KeyError)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_stream_that_is_not_utf8_gets_what_it_can_hold(encoding):
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    code = "from ivfast.cli import main; main()"
    for arguments in (["train", "as-introvae", "--help"], ["train", "--out", "λ✓", "--width", "λ"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, check=False
        )
        text = (done.stdout + done.stderr).decode(encoding)
        assert "Traceback" not in text
        assert "--latent-dim" in text if "--help" in arguments else "--width takes an integer, got '?'" in text
