"""The machine and the versions behind the numbers."""

import os
import platform
import re
import time
from importlib import metadata
from pathlib import Path

import torch

import ivfast

PACKAGES = ("torch", "triton", "numpy", "jax", "pykeops", "blackjax")


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    return (names or [platform.processor() or platform.machine()])[0]


def describe(device: str) -> dict[str, object]:
    """The machine, without anything that can differ from run to run."""
    found = {
        "cpu": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device == "cuda":
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        gpu = torch.cuda.get_device_properties(0)
        found = {"gpu": gpu.name, "capability": capability, "gpu_GB": round(gpu.total_memory / 1e9)} | found
    return {"name": short(found)} | found


def short(machine: dict[str, object]) -> str:
    """The name for a file: nvidia-h100-80gb-hbm3, amd-epyc-9b14-avx512-2-threads."""
    name = str(machine.get("gpu") or f"{machine['cpu']} {machine['instructions']} {machine['threads']} threads")
    name = re.sub(r"\((r|tm|c)\)|\bcpu\b|@.*ghz|\bprocessor\b|\b\d+-core\b", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "ivfast": ivfast.__version__}
    installed = {distribution.name: distribution.version for distribution in metadata.distributions()}
    found |= {package: installed[package] for package in PACKAGES if package in installed}
    return found | {"torch": torch.__version__}


def use_threads(threads: int | None) -> None:
    """Limit all providers to `threads` processors, even JAX and KeOps, which count those available to the process."""
    threads = threads or int(os.environ.get("OMP_NUM_THREADS", "0"))
    if not threads:
        return
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if threads > available:
        raise ValueError(f"--threads must be at most {available}, the processors open to this process, got {threads}")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    torch.set_num_threads(threads)


def today() -> str:
    return time.strftime("%Y-%m-%d %H:%M")
