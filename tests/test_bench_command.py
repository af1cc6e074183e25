"""`ivfast bench` and `bench/gpu.py`: no result or failure is lost, and errors name what was given."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from ivfast import bench, cli
from ivfast.bench.harness import command, machine, measure, session, tune
from ivfast.bench.harness.problem import BACKWARD, FORWARD

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    """Restores the processors for later tests, because the command restricts its own process."""
    monkeypatch.setattr(machine, "use_threads", lambda threads: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ivfast_bench(*arguments, code=0):
    result = CliRunner().invoke(cli.app, ["bench", *map(str, arguments)], env={"COLUMNS": "120", "TERM": "dumb"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


LIMITS = {"matmul_flop_per_s": 1e9, "copy_bytes_per_s": 1e8, "empty_forward_s": 1e-6, "empty_forward+backward_s": 5e-6}
TINY = ("svgd", "--quick", "--shapes", "8x3", "--providers", "eager", "--device", "cpu")


def test_the_command_writes_rows_a_table_and_a_picture(tmp_path):
    output = ivfast_bench(*TINY, "--out", tmp_path)
    (path,) = tmp_path.glob("*.json")
    report = json.loads(path.read_text())
    assert report["machine"]["name"] == path.stem
    (about,) = report["sessions"]
    assert about["versions"]["torch"] == torch.__version__
    assert about["date"]
    assert about["limits"]["matmul_flop_per_s"] > 1e6
    assert {(r["provider"], r["pass"]) for r in report["rows"]} == {
        (p, w) for p in ("ivfast", "eager") for w in (FORWARD, BACKWARD)
    }
    for r in report["rows"]:
        assert r["size"] == [8, 3]
        assert 0 < r["least_us"] <= r["us"]
        assert r["share"] > 0
        assert r["session"] == about["id"]
        assert r["error"] < 1e-4
    assert "| 8 × 3 | forward |" in path.with_suffix(".md").read_text()
    assert Image.open(path.with_name(f"{path.stem}-svgd_direction.png")).width > 500
    assert "svgd_direction" in output
    assert "8×3 fwd+bwd" in output


def test_rough_results_take_no_others_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ivfast_bench(*TINY)
    assert list(tmp_path.iterdir()) == []
    assert command.folder(None, partial=False) == Path("bench-results")
    (tmp_path / "bench/harness").mkdir(parents=True)
    (tmp_path / "bench/harness/peers.py").touch()
    assert command.folder(None, partial=False) == Path("bench/results")
    assert command.folder(tmp_path, partial=True) == tmp_path


def test_ctrl_c_leaves_what_was_measured_and_resume_goes_on(tmp_path, monkeypatch):
    arguments = (
        "svgd",
        "--shapes",
        "8x3,9x3",
        "--providers",
        "eager",
        "--device",
        "cpu",
        "--no-memory",
        "--out",
        tmp_path,
    )
    group, left = session.Session._group, [2]

    def interrupted(self, *args):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return group(self, *args)

    monkeypatch.setattr(session.Session, "_group", interrupted)
    monkeypatch.setattr(measure, "limits", lambda *_: LIMITS)
    output = ivfast_bench(*arguments, code=130)
    assert "--resume continues" in output
    (path,) = tmp_path.glob("*.json")
    before = json.loads(path.read_text())["rows"]
    assert {(tuple(r["size"]), r["pass"]) for r in before} == {((8, 3), FORWARD), ((8, 3), BACKWARD)}
    assert path.with_suffix(".md").exists()
    left[0] = 2
    ivfast_bench(*arguments, "--resume")
    after = json.loads(path.read_text())
    assert [r for r in after["rows"] if r["size"] == [8, 3]] == before
    assert {tuple(r["size"]) for r in after["rows"]} == {(8, 3), (9, 3)}
    assert len(after["sessions"]) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("sgvd",), "there is no benchmark 'sgvd'; did you mean svgd?"),
        (("svgd", "--shapes", "64"), "--shapes takes sizes like 64x16,1024x64, got '64'"),
        (("svgd", "--shapes", "0x3"), "--shapes takes sizes like 64x16,1024x64, got '0x3'"),
        (("svgd", "--providers", "egaer"), "there is no provider 'egaer'; did you mean eager?"),
        (("svgd", "--device", "tpu"), "--device must be cpu or cuda, got 'tpu'"),
    ],
)
def test_errors_name_what_was_given_and_what_exists(arguments, said):
    assert said in ivfast_bench(*arguments, code=2)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux alone binds a process")
def test_threads_bind_every_provider():
    code = "import os, torch; from ivfast.bench.harness import machine; machine.use_threads(1)"
    code += "; assert torch.get_num_threads() == len(os.sched_getaffinity(0)) == 1; machine.use_threads(10_000)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert "--threads must be at most 1, the processors open to this process, got 10000" in run.stderr


def test_help_teaches():
    text = ivfast_bench("--help")
    assert all(name in text for name in (*bench.names(), "KeOps", "--resume", "--quick", "checked against float64"))


def test_a_sweep_of_tiles_leaves_the_kernel_as_it_was(monkeypatch):
    module = pytest.importorskip("ivfast.kernels.svgd")
    own = module.forward_tile
    monkeypatch.setattr(tune, "CHOICES", {"columns": (64,), "width": (64,)})
    rows = tune.sweep(["svgd", "svgd_bridge"], "cpu", math.inf, [(8, 3)])
    assert module.forward_tile is own
    assert {(r["pass"], r["present"]) for r in rows} >= {(FORWARD, True), (BACKWARD, True), (BACKWARD, False)}
    assert all("us" in r for r in rows)  # a width of 64 does not divide the padded 16 dimensions, so it is not tried


CHECKED = ("float32", "bfloat16", "float16", "float64")  # in this order: what is lost first matters least


@pytest.mark.skipif(shutil.which("g++") is None, reason="the CUDA-on-CPU shim needs g++")
def test_gpu_py_without_a_gpu(tmp_path):
    pytest.importorskip("triton")
    arguments = ("--device", "cpu", "--ops", "multi_js", "--only", "^multi_js_loss-small", "--out", tmp_path)
    run = subprocess.run(
        [sys.executable, REPOSITORY / "bench/gpu.py", *map(str, arguments)],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    (path,) = tmp_path.glob("*.json")
    report = json.loads(path.read_text())
    values = [c for c in report["checks"] if c["what"] == "value"]
    assert {c["status"] for c in values if c["implementation"] == "triton" and c["dtype"] != "float64"} == {"ok"}
    assert [c["dtype"] for c in values] == sorted((c["dtype"] for c in values), key=list(CHECKED).index)
    assert {c["status"] for c in report["checks"]} <= {"ok", "not served", "absent"}
    right = {c["what"] for c in report["checks"] if c["status"] == "ok"}
    assert right >= {"streams", "resumed", "set_float32_matmul_precision('high')"}
    timed = {r["provider"] for r in report["rows"] if r.get("us")}
    assert timed == {"ivfast", "ivfast:triton", "ivfast:cuda", "eager"}
    assert run.stdout.rstrip().endswith(path.with_suffix(".md").read_text().rstrip())
    assert "compute-sanitizer: not run." in run.stdout
