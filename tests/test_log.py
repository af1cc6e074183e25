"""The output of a run in progress, on terminals of any width and without a terminal."""

import errno
import io
import json

import pytest
from rich.console import Console

from ivfast.train.log import Bar, read_log

LOSSES = {f"{phase}/{term}": 0.123456 for phase in ("encoder", "generator") for term in ("recon", "kl", "exp_rec")}


def shown(console, steps=(50, 100)):
    with Bar(3000, 0, shown=True, console=console) as bar:
        for step in steps:
            bar.report(step, LOSSES, 1234.4)
            bar.at(step)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_a_narrow_terminal_cuts_the_losses_short_and_not_the_steps(width):
    text = shown(Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None))
    last = text.replace("\x1b[?25h", "").split("\x1b[2K")[-1].strip()
    assert last.startswith("step   50/3000")  # at most ten updates per second
    assert "e/recon 0.123" in last
    assert ("g/exp_re 0.123" in last) == (width == 200)
    assert len(last) <= width


@pytest.mark.parametrize("seconds", [0.0, 60.0])
def test_what_is_no_terminal_gets_a_line_now_and_then(seconds, monkeypatch):
    monkeypatch.setattr(Bar, "EVERY", seconds)
    lines = shown(Console(file=io.StringIO(), width=60, force_terminal=False)).splitlines()
    told = [line for line in lines if "images/s" in line]
    losses = "e/recon 0.123  e/kl 0.123  e/exp_re 0.123  g/recon 0.123  g/kl 0.123  g/exp_re 0.123"
    expected = [f"step {step}/3,000  1,234 images/s  {losses}" for step in (50, 100)]
    assert told == (expected if seconds == 0 else [])


def test_a_silent_run_says_nothing():
    console = Console(file=io.StringIO(), force_terminal=False)
    with Bar(10, 0, shown=False, console=console) as bar:
        bar.EVERY = 0
        bar.report(5, LOSSES, 1.0)
        bar.note("heard by nobody")
    assert console.file.getvalue() == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_an_output_that_is_gone_does_not_stop_the_run(terminal, monkeypatch):
    class Gone(io.StringIO):
        gone = False

        def write(self, text):
            if self.gone:
                raise OSError(errno.EIO, "Input/output error")
            return super().write(text)

    monkeypatch.setattr(Bar, "EVERY", 0)
    file = Gone()
    with Bar(100, 0, shown=True, console=Console(file=file, force_terminal=terminal)) as bar:
        file.gone = True
        bar.note("nobody hears")
        bar.report(50, LOSSES, 1.0)
        bar.at(100)


def test_a_log_is_read_up_to_a_line_cut_short(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps({"step": 1}) + "\n" + json.dumps({"step": 2}) + "\n" + '{"ste')
    assert read_log(path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("line", [b"{", b"\x00\xff", b"[]", b'{"kind": "losses"}', b'{"step": "1"}', b""])
def test_a_damaged_line_is_named(line, tmp_path):
    """A run that is resumed would otherwise lose all that comes after it."""
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"log\.jsonl: line 2 is not a record of a log"):
        read_log(path)
