"""Peak memory of a provider's calls on the CPU, in a process of its own: the growth of its resident set over a call.

`python -m ivfast.bench.harness.memory` reads a job in JSON and prints a JSON line per call. Linux only.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def supported() -> bool:
    return sys.platform == "linux" and os.access(RESET, os.W_OK)


def _resident(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def growth(call) -> int:
    """Bytes by which the peak of the resident set exceeds the resident set before the call."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    RESET.write_text("5")  # the peak begins anew
    before = _resident("VmRSS")
    call()
    return max(0, _resident("VmHWM") - before)


def measured(op: str, provider: str, jobs: list[dict], threads: int, timeout: float = 300.0) -> Iterator[dict]:
    """The jobs, each {"size", "what", "warm"}, with "peak_bytes"; those that did not come to an end are left out."""
    # a threshold of its own keeps what is freed from staying in the heap, where the next call would find it
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    text = json.dumps({"op": op, "provider": provider, "jobs": jobs, "threads": threads})
    command = [sys.executable, "-W", "ignore", "-m", "ivfast.bench.harness.memory"]
    # in a clone of the repository, `-m` would find the sources instead of the installed package
    elsewhere = {"env": environment, "cwd": os.path.abspath(os.sep)}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, **elsewhere) as process:
        try:
            output, said = process.communicate(text, timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            output, said = process.communicate()
        except BaseException:
            process.kill()
            raise
    if process.returncode > 0 and not output:  # a job too large ends by a signal, or after others
        raise RuntimeError(f"the process that measures the memory of {provider} failed:\n{said[-2000:]}")
    for line in output.splitlines():
        if line.startswith('{"peak_bytes"'):  # compilers print too
            yield json.loads(line)


def main() -> None:
    import torch

    from .. import problem_of
    from .problem import Instance

    given = json.load(sys.stdin)
    torch.set_num_threads(given["threads"])
    problem = problem_of(given["op"])
    provider = next(p for p in problem.providers("cpu") if p.name == given["provider"])

    def bound(size, what):
        call = Instance(problem, tuple(size), torch.float32, "cpu").bind(provider, what)

        def forced():
            with provider.forced():
                call()

        return forced

    for what in problem.passes:
        bound(problem.sizes[0], what)()  # code, threads
    for job in given["jobs"]:
        call = bound(job["size"], job["what"])
        if job["warm"]:
            call()
        print(json.dumps({"peak_bytes": growth(call), **job}), flush=True)
        del call


if __name__ == "__main__":
    main()
