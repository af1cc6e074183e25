"""Build, test and time the kernels on a CUDA machine; one JSON and one table in bench/results/.

python bench/gpu.py                       # everything, in less than nine minutes
python bench/gpu.py --tune --minutes 20   # also finds the fastest tiles of the Triton kernels
python bench/gpu.py --device cpu          # the same code on the CPU: interpreted kernels, few and small sizes, no files

The table names what there was no time for. The exit status is 1 if any result is wrong.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
STARTED = "IVFAST_BENCH_STARTED"  # time.time() of the first process, before the build
TOOLS = ("memcheck", "racecheck", "synccheck")  # of compute-sanitizer
SMALL, LARGE = 2000, 200_000  # numbers that a case draws, for the sanitizer and for what is tried in every situation


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu is a dry run (default: cuda)")
    parser.add_argument("--out", type=Path, help="folder of the results (default: bench/results; none for cpu)")
    parser.add_argument("--minutes", type=float, default=8.5, help="for everything, including the build (default: 8.5)")
    parser.add_argument("--ops", nargs="+", metavar="OP", help="benchmarks to run (default: all)")
    parser.add_argument("--no-sanitizer", action="store_true")
    parser.add_argument("--tune", action="store_true", help="sweep the tiles of the Triton kernels at the end")
    parser.add_argument("--only", default="", help="a regular expression of cases to test, such as svgd_direction-odd")
    parser.add_argument("--check", action="store_true", help="run the tests and stop; compute-sanitizer runs this")
    options = parser.parse_args()
    began = float(os.environ.setdefault(STARTED, str(time.time())))
    end = time.monotonic() + 60 * options.minutes - (time.time() - began)
    prepare(options.device, options.check)

    # the checks get at most two fifths of the time, the sanitizer one fifth
    rows = checked(options.device, options.only, time.monotonic() + 0.4 * (end - time.monotonic()), not options.check)
    wrong = [row for row in rows if row["status"] in ("wrong", "error")]
    print(f"{len(rows)} checks, {sum(r['status'] == 'ok' for r in rows)} right, {len(wrong)} wrong", flush=True)
    for row in wrong:
        print("WRONG", json.dumps(row), flush=True)
    if options.check:
        return bool(wrong)

    from ivfast.bench.harness import tables

    found = {"checks": rows, "sanitizer": {}}
    if options.device == "cuda" and not options.no_sanitizer:
        found["sanitizer"] = sanitizer(0.3 * (end - time.monotonic()))
    results = timings(options, found, end)
    report = results.report()
    text = tables.markdown(report)
    if results.path:
        results.path.with_suffix(".md").write_text(text)
        print(f"wrote {results.path} and .md")
    print(text, flush=True)
    failed = any(result["status"] == "failed" for result in report["sanitizer"].values())
    return bool(wrong) or failed or any(r.get("wrong") and r["kind"] != "peer" for r in results.rows)


def prepare(device: str, quiet: bool) -> None:
    """Make ivfast importable with the kernels of this device."""
    sys.path[:] = [
        path for path in sys.path if Path(path).resolve() != RESULTS.parent
    ]  # its names are only for ivfast.bench
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
        sys.path.insert(0, str(REPOSITORY / "tests"))
        from simt import build

        build.load()
        return
    import torch

    if not torch.cuda.is_available():
        sys.exit("bench/gpu.py: PyTorch sees no CUDA device. `--device cpu` is a dry run without one.")
    importable = [sys.executable, "-c", "import torch, ivfast._cuda, ivfast.bench"]
    missing = subprocess.run(importable, capture_output=True, text=True, cwd="/")
    if missing.returncode:
        if os.environ.get("IVFAST_BENCH_BUILT"):
            sys.exit(f"bench/gpu.py: built, but ivfast._cuda cannot be imported:\n{missing.stderr}")
        print("building ivfast", flush=True)
        pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-v", "-e", str(REPOSITORY)]
        built = subprocess.run(pip, capture_output=True, text=True)
        log = (built.stdout + built.stderr)[-6000:]
        print(log if built.returncode or "was left out" in log else "built", flush=True)
        os.environ["IVFAST_BENCH_BUILT"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.argv])  # a process finds an editable install only at its start
    if not quiet:
        subprocess.run([sys.executable, "-m", "ivfast"], cwd="/")
        sys.stdout.flush()


def checked(device: str, only: str, deadline: float, further: bool) -> list[dict]:
    """Values and gradients of every case, and `further` what graphs, streams and training steps make of them."""
    from ivfast.bench.harness import checks, situations

    cases = checks.chosen(only)
    begun = time.monotonic()
    share = begun + 0.7 * (deadline - begun) if further else deadline
    rows = list(checks.values(device, cases, share))
    if further:
        kernels = [case for case in cases if checks.has_gpu_kernel(case)]
        rows += situations.all_rows(device, checks.of_each_op(kernels, LARGE), deadline)
    return rows


def sanitized() -> list[str]:
    """Two of the small cases of each op that has a kernel, including odd sizes and batches."""
    from ivfast.bench.harness import checks

    return [str(case) for case in checks.of_each_op(filter(checks.has_gpu_kernel, checks.chosen()), SMALL, 2)]


def sanitizer(seconds: float) -> dict:
    """A few cases under each tool of compute-sanitizer, with PyTorch's caching allocator off."""
    found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if found is None:
        return {"compute-sanitizer": {"status": "absent"}}
    results, deadline = {}, time.monotonic() + seconds
    only = "^(" + "|".join(map(re.escape, sanitized())) + ")$"
    for i, tool in enumerate(TOOLS):
        command = [found, "--tool", tool, "--error-exitcode", "9", sys.executable, __file__, "--check", "--only", only]
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        share = max(5.0, (deadline - time.monotonic()) / (len(TOOLS) - i))
        try:
            run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=share)
        except subprocess.TimeoutExpired:
            results[tool] = {"status": f"did not finish in {share:.0f} s"}
            continue
        # a tool that cannot attach prints its own message and finds nothing
        could_not = run.returncode != 0 and "Device not supported" in run.stdout + run.stderr
        status = "passed" if run.returncode == 0 else "could not run" if could_not else "failed"
        results[tool] = {"status": status, "output": (run.stdout + run.stderr)[-1500:]}
        print(f"compute-sanitizer {tool}: {status}", flush=True)
    return results


def timings(options, found: dict, end: float):
    """Every benchmark, written after each group of rows, and then the tiles."""
    import warnings

    from ivfast.bench import names
    from ivfast.bench.harness import command, tune
    from ivfast.bench.harness.session import Session

    warnings.simplefilter("ignore")  # from the peers
    dry = options.device == "cpu"
    order = [name for name in ("svgd", "svgd_bridge", "median", "multi_js") if name in names()]
    session = Session(
        options.ops or [*order, *(name for name in names() if name not in order)],
        options.device,
        sizes=[(8, 3)] if dry else None,
        providers=["ivfast:triton", "ivfast:cuda", "eager"] if dry else None,
        implementations=("triton", "cuda", "reference") if dry else None,
        quick=dry,
        deadline=end - (90 if options.tune else 20),
        step=lambda text: None,
    )
    results = command.open_results(session, options.out or (None if dry else RESULTS))
    results.extra |= found
    results.write()
    for group, rows in session.run():
        results.add(rows)
        for row in rows:
            told = {k: row[k] for k in ("provider", "us", "device_us", "reason") if k in row}
            print(group, json.dumps(told), flush=True)
    if options.tune:
        sizes = [(8, 3)] if dry else None
        results.extra["tiles"] = tune.sweep(session.names, options.device, end, sizes)
    results.write()
    return results


if __name__ == "__main__":
    sys.exit(main())
