"""Build, test and time the kernels on a CUDA machine; one JSON and one table in bench/results/.

python bench/gpu.py                    # all of it; a few minutes
python bench/gpu.py --device cpu       # the same code on the CPU: kernels interpreted, few and small sizes, no files

The exit status is 1 if any result is wrong.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
SANITIZED = ("svgd_direction-odd", "svgd_direction-batch", "multi_js_loss-batch", "multi_js_loss-many-classes")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run")
    parser.add_argument("--out", type=Path, help="folder of the results (default: bench/results; none for cpu)")
    parser.add_argument("--no-sanitizer", action="store_true")
    parser.add_argument("--only", default="", help="a regular expression of cases to test, such as svgd_direction-odd")
    parser.add_argument("--check", action="store_true", help="test and stop: what runs under compute-sanitizer")
    options = parser.parse_args()
    prepare(options.device, options.check)

    checks = correctness(options.device, options.only)
    wrong = [row for row in checks if row["status"] in ("wrong", "error")]
    print(f"{len(checks)} checks, {sum(r['status'] == 'ok' for r in checks)} right, {len(wrong)} wrong", flush=True)
    for row in wrong:
        print("WRONG", json.dumps(row), flush=True)
    if options.check:
        return bool(wrong)

    import gpu_times

    report = {
        "machine": machine(options.device),
        "sanitizer": {} if options.no_sanitizer or options.device == "cpu" else sanitizer(),
        "limits": gpu_times.limits(options.device),
        "times": gpu_times.timings(options.device),
        "checks": checks,
    }
    out = options.out or (RESULTS if options.device == "cuda" else None)
    text = table(report)
    print(text)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        name = "gpu-" + re.sub(r"[^a-z0-9]+", "-", report["machine"]["device"].lower()).strip("-")
        (out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
        (out / f"{name}.md").write_text(text)
        print(f"wrote {out / name}.json and .md")
    return bool(wrong) or "failed" in [result["status"] for result in report["sanitizer"].values()]


def prepare(device: str, quiet: bool) -> None:
    """ivfast importable with the kernels of this device."""
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
        sys.path.insert(0, str(REPOSITORY / "tests"))
        from simt import build

        build.load()
        return
    import torch

    if not torch.cuda.is_available():
        sys.exit("bench/gpu.py: PyTorch sees no CUDA device. `--device cpu` is a dry run without one.")
    missing = subprocess.run([sys.executable, "-c", "import torch, ivfast._cuda"], capture_output=True, text=True)
    if missing.returncode:
        if os.environ.get("IVFAST_BENCH_BUILT"):
            sys.exit(f"bench/gpu.py: built, but ivfast._cuda cannot be imported:\n{missing.stderr}")
        print("building ivfast", flush=True)
        pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-v", "-e", str(REPOSITORY)]
        built = subprocess.run(pip, capture_output=True, text=True)
        log = (built.stdout + built.stderr)[-6000:]
        print(log if built.returncode or "was left out" in log else "built", flush=True)
        os.environ["IVFAST_BENCH_BUILT"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.argv])  # an editable install is found at the start of a process
    if not quiet:
        subprocess.run([sys.executable, "-m", "ivfast"])
        sys.stdout.flush()


def machine(device: str) -> dict:
    import torch
    import triton

    import ivfast

    nvcc = Path("/usr/local/cuda/bin/nvcc")
    nvcc = shutil.which("nvcc") or (str(nvcc) if nvcc.exists() else None)
    release = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout if nvcc else ""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu {platform.machine()}",
        "capability": ".".join(map(str, torch.cuda.get_device_capability())) if device == "cuda" else "",
        "ivfast": ivfast.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "nvcc": (re.findall(r"release (\S+),", release) or [""])[0],
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def correctness(device: str, only: str) -> list[dict]:
    """Every case by every implementation that serves it, against the float64 reference on the CPU."""
    import torch

    from ivfast import testing

    rows = []
    for case in (c for c in testing.CASES if re.search(only, str(c))):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            tensors = testing.inputs(case, dtype, device=device)
            for implementation in ("default", "triton", "cuda"):
                row = {"case": str(case), "dtype": str(dtype).removeprefix("torch."), "implementation": implementation}
                rows.append(row | compare(case, tensors, implementation))
    return rows


def compare(case, tensors, implementation) -> dict:
    from ivfast import testing

    try:
        errors = testing.compare(case, tensors, None if implementation == "default" else implementation)
    except Exception as error:
        if "CUDA error" in str(error):
            raise  # the device is lost to this process
        refused = "implementation here" in str(error) or "in CUDA C++ takes" in str(error)
        return {"status": "not served" if refused else "error", "reason": str(error)[:300]}
    return {"status": "ok" if max(errors.values()) <= 1 else "wrong", "error_over_tolerance": errors}


def sanitizer() -> dict:
    """A few cases under each tool of compute-sanitizer, with PyTorch's caching allocator off."""
    found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if found is None:
        return {"compute-sanitizer": {"status": "absent"}}
    results = {}
    only = "^(" + "|".join(SANITIZED) + ")$"
    for tool in ("memcheck", "racecheck", "synccheck"):
        command = [found, "--tool", tool, "--error-exitcode", "9", sys.executable, __file__, "--check", "--only", only]
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        try:
            run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
        except subprocess.TimeoutExpired:
            results[tool] = {"status": "ran out of time"}
            continue
        # a tool that cannot attach says so in words of its own and finds nothing
        could_not = run.returncode != 0 and "Device not supported" in run.stdout + run.stderr
        status = "passed" if run.returncode == 0 else "could not run" if could_not else "failed"
        results[tool] = {"status": status, "output": (run.stdout + run.stderr)[-1500:]}
        print(f"compute-sanitizer {tool}: {status}", flush=True)
    return results


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.1f}"


def table(report: dict) -> str:
    """Markdown: the machine, the checks in a line each, the times."""
    counts = {}
    for row in report["checks"]:
        key = (row["implementation"], row["status"])
        counts[key] = counts.get(key, 0) + 1
    limit = report["limits"]
    lines = [
        "# " + report["machine"]["device"],
        "",
        ", ".join(f"{k} {v}" for k, v in report["machine"].items() if v and k != "device"),
        "",
        "Checks against the float64 reference: " + "; ".join(f"{i} {n} {s}" for (i, s), n in sorted(counts.items())),
        "",
        "compute-sanitizer: "
        + ("; ".join(f"{tool} {r['status']}" for tool, r in report["sanitizer"].items()) or "not run"),
        "",
        f"Empty launch {number(limit['empty_launch_call_us'])} µs by call,"
        f" {number(limit['empty_launch_device_us'])} µs on the device;"
        f" copy {limit['copy_bytes_per_s'] / 1e9:.0f} GB/s read and written.",
        "",
        "| op | size | dtype | what | by | call µs | device µs | rate on the device | peak MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]

    for row in report["times"]:
        rate = "–"
        if "flop_per_s" in row:
            rate = f"{row['flop_per_s'] / 1e12:.2f} TFLOP/s"
        elif "byte_per_s" in row:
            rate = f"{row['byte_per_s'] / 1e9:.0f} GB/s"
        times = [number(row.get("call_us")), number(row.get("device_us"))]
        head = [row["op"], row["size"], row["dtype"], row["what"], row["peer"]]
        lines.append("| " + " | ".join([*head, *times, rate, number(row.get("peak_MB"))]) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
