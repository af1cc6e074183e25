"""Command-line runs that are interrupted, killed or out of disk space: each resumes to the same bits.

The processes are forked from a server that has imported everything, so that each costs only its steps.
"""

import json
import multiprocessing
import os
import random
import re
import resource
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import sklearn.datasets  # noqa: F401  for the server
import torch

import ivfast
from ivfast import cli, data, models, runs  # noqa: F401  likewise
from ivfast.runs import report
from ivfast.train import checkpoint, files, loop  # noqa: F401  likewise

PER_EPOCH = 23  # steps, on digits in batches of 64
ROOT = Path(ivfast.__file__).parent.parent
SMALL = [
    "--device", "cpu", "--seed", "3", "--ema", "0.9", "--flip", "--data-memory", "0", "--set", "tensorboard=false",
    *(f"--set={name}={value}" for name, value in {
        "width": 16, "discriminator_width": 16, "latent_dim": 8, "log_every": 10, "save_every": 1,
        "evaluate_every": 1000,
    }.items()),
]  # fmt: skip


def command(arguments: list[str], output: Path, die: tuple[str, int] | None) -> None:
    """`ivfast …` in a process that dies as `die` says, with its output in the file `output`."""
    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored,
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and what nohup starts with this one
    torch.set_num_threads(1)
    report.draw, report.draw_samples = (lambda *_: {}), None  # pictures would take longer than the steps
    if die is not None:
        _die(*die)
    sys.argv = ["ivfast", *arguments]
    cli.main()


def _die(when: str, write: int) -> None:
    """SIGKILL at the `write`-th checkpoint: half written, fully written, or already renamed."""
    replace, writes = os.replace, []

    def dying(source, target):
        writes.append(Path(target).name == checkpoint.LAST.name)
        last = writes[-1] and sum(writes) == write
        if last and when == "half":
            os.truncate(source, os.path.getsize(source) // 2)
        if last and when != "renamed":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = dying


class Started:
    def __init__(self, server, out: Path, *arguments: object, die=None, output: Path | None = None):
        self.out, self.output = out, output or out.with_suffix(".txt")
        arguments = ["train", "--out", str(out), *map(str, arguments)]
        self.process = server.Process(target=command, args=(arguments, self.output, die), daemon=True)
        self.process.start()

    def wait_for(self, condition) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert self.process.is_alive(), self.text()
            assert time.monotonic() < deadline
            time.sleep(0.002)

    def end(self, code: int) -> str:
        self.process.join(60)
        found = self.process.exitcode
        self.process.kill()  # one that goes on would disturb all other tests
        assert found == code, self.text()
        return self.text()

    def text(self) -> str:
        return self.output.read_text() if self.output.exists() else ""


@pytest.fixture(scope="module")
def server():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(Path(__file__).parent)]))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("COLUMNS", "300")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, "torch._dynamo"])  # which every optimizer imports
        yield context


@pytest.fixture(scope="module")
def undisturbed(server, tmp_path_factory):
    """The checkpoint of an undisturbed run with this many epochs."""
    found = {}

    def run(epochs: int) -> checkpoint.Checkpoint:
        if epochs not in found:
            out = tmp_path_factory.mktemp("undisturbed") / "run"
            Started(server, out, *SMALL, "--epochs", epochs).end(0)
            found[epochs] = checkpoint.read(out / checkpoint.LAST)
        return found[epochs]

    return run


def assert_goes_on(server, undisturbed, out: Path) -> None:
    """Resumed for at least one more epoch, the run has the bits and the log of an undisturbed one."""
    last = out / checkpoint.LAST
    epochs = max(10, (checkpoint.read(last).about["step"] if last.exists() else 0) // PER_EPOCH + 2)
    Started(server, out, "--resume", "--epochs", epochs).end(0)
    expected, saved = undisturbed(epochs), checkpoint.read(last)
    assert saved.tensors.keys() == expected.tensors.keys()
    assert not [name for name, x in expected.tensors.items() if not torch.equal(x, saved.tensors[name])]
    assert saved.about["step"] == PER_EPOCH * epochs
    assert os.listdir(last.parent) == [last.name]
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if line["kind"] == "losses" and not line.get("partial")]
    assert steps == list(range(10, PER_EPOCH * epochs + 1, 10))


def logged(out: Path) -> bool:
    return (out / "log.jsonl").exists() and bool((out / "log.jsonl").read_text())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(number, code, server, undisturbed, tmp_path):
    out = tmp_path / "run"
    run = Started(server, out, *SMALL, "--epochs", 10**6)
    run.wait_for(lambda: logged(out))
    time.sleep(random.uniform(0, 0.2))
    os.kill(run.process.pid, number)
    text = run.end(code)
    step = int(re.search(rf"stopped after step (\d+); resume with: ivfast train --resume --out {out}\n", text)[1])
    assert checkpoint.read(out / checkpoint.LAST).about["step"] == step
    assert "Traceback" not in text
    assert_goes_on(server, undisturbed, out)


def test_a_second_process_is_refused_and_told_of_the_first(server, undisturbed, tmp_path):
    out = tmp_path / "run"
    run = Started(server, out, *SMALL, "--epochs", 10**6)
    run.wait_for((out / checkpoint.LAST).exists)
    found = {}
    for resume in ("--resume", "--no-flip"):
        other = Started(server, out, resume, "--epochs", 10**6, output=tmp_path / f"{resume}.txt")
        found[resume] = other.end(2)
    holder = rf"process {run.process.pid} on {re.escape(socket.gethostname())} since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d"
    assert re.search(f"error: {out} is in use by {holder}: wait for it, stop it, or choose another", found["--resume"])
    assert "already holds a run" in found["--no-flip"]
    assert run.process.is_alive()
    run.process.kill()  # which ends the lock
    run.end(-signal.SIGKILL)
    assert_goes_on(server, undisturbed, out)


def test_killed_at_any_moment_again_and_again(server, undisturbed, tmp_path):
    out = tmp_path / "run"
    for arguments in (SMALL, ["--resume"], ["--resume"]):
        run = Started(server, out, *arguments, "--epochs", 10**6)
        run.wait_for(lambda: logged(out))
        time.sleep(random.uniform(0, 0.1))
        run.process.kill()
        run.end(-signal.SIGKILL)
    assert_goes_on(server, undisturbed, out)


def test_killed_before_the_first_checkpoint_it_begins_again(server, undisturbed, tmp_path):
    out = tmp_path / "run"
    Started(server, out, *SMALL, "--epochs", 10**6, die=("half", 1)).end(-signal.SIGKILL)
    assert not (out / checkpoint.LAST).exists()
    assert_goes_on(server, undisturbed, out)


@pytest.mark.parametrize(("when", "survives"), [("half", 3), ("whole", 3), ("renamed", 4)])
def test_killed_while_it_writes_the_fourth_checkpoint(when, survives, server, undisturbed, tmp_path):
    out = tmp_path / "run"
    Started(server, out, *SMALL, "--epochs", 10**6, die=(when, 4)).end(-signal.SIGKILL)
    assert checkpoint.read(out / checkpoint.LAST).about["step"] == survives * PER_EPOCH
    assert_goes_on(server, undisturbed, out)


@pytest.mark.parametrize("full_for", ["checkpoint", "everything"])
def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(full_for, server, undisturbed, tmp_path):
    out = tmp_path / "run"
    last, log = out / checkpoint.LAST, out / "log.jsonl"
    run = Started(server, out, *SMALL, "--epochs", 10**6)
    run.wait_for(lambda: last.exists() and log.stat().st_size > 4000)
    most = last.stat().st_size - 1 if full_for == "checkpoint" else log.stat().st_size + 1
    resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
    text = run.end(2)
    reason = rf"{checkpoint.LAST}: the checkpoint could not be written .*; the previous checkpoint is intact"
    if full_for == "everything":  # whichever is written first
        reason += r"|error: .*File too large: .*log\.jsonl"
    assert re.search(reason, text)
    assert "Traceback" not in text
    assert checkpoint.read(last).about["step"] % PER_EPOCH == 0
    assert_goes_on(server, undisturbed, out)
