"""Compiles csrc/cuda with g++ against the CUDA-on-CPU shim of this folder and loads it.

`load()` registers the CUDA C++ kernels for CPU tensors, so that `with ivfast.use("cuda"):` runs them there.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
TORCH = Path(torch.__file__).parent

COMPILE = [
    *("-std=c++17", "-O2", "-fPIC"),
    # self-contained: no symbol binds to another shim build in the same process
    *("-fvisibility=hidden", "-fno-gnu-unique", "-fno-extern-tls-init"),
    *(f"-I{HERE / 'include'}", f"-I{CSRC / 'cuda'}", f"-isystem{TORCH / 'include'}"),
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]


class NoCompilerError(RuntimeError):
    """g++ is missing, so the CUDA C++ kernels cannot run on the CPU."""


def build(name: str, sources: Sequence[Path]) -> Path:
    """A shared library of `sources` and the shim; objects are cached by content in the temporary folder."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise NoCompilerError("tests/simt needs g++ to build csrc/cuda for the CPU, and found none")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    cache = Path(tempfile.gettempdir(), f"ivfast-simt-{os.getuid()}")
    cache.mkdir(exist_ok=True)
    headers = sorted([*HERE.glob("include/*.h"), *CSRC.rglob("*.h")])
    common = repr((version, torch.__version__, COMPILE)).encode() + b"".join(h.read_bytes() for h in headers)

    objects = []
    for source in [HERE / "simt.cpp", *sources]:
        key = hashlib.sha256(common + str(source).encode() + source.read_bytes()).hexdigest()[:16]
        objects.append(cache / f"{source.stem}-{key}.o")
        _make(objects[-1], [compiler, *COMPILE, "-x", "c++", "-c", str(source)])
    key = hashlib.sha256(repr(objects).encode()).hexdigest()[:16]
    library = cache / f"{name}-{key}.so"
    torch_library = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
    _make(library, [compiler, "-shared", *map(str, objects), *torch_library])
    return library


def _make(target: Path, command: list[str]) -> None:
    """Runs `command -o target` unless the target exists; other processes may do the same at the same time."""
    if target.exists():
        return
    own = target.with_suffix(f".{os.getpid()}{target.suffix}")
    result = subprocess.run([*command, "-o", str(own)], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
    own.replace(target)


@functools.cache
def load() -> ctypes.CDLL:
    """Registers every kernel of csrc/cuda under the dispatch key CPU; the returned library has `simt_seed`."""
    import ivfast  # noqa: F401  defines the operators

    library = build("kernels", sorted(CSRC.glob("cuda/*.cu")))
    torch.ops.load_library(str(library))
    return ctypes.CDLL(str(library))


def shared_memory(kib: int = 163) -> None:
    """Sets how much of it a block may have: 163 KiB on sm_80, 99 on sm_86, sm_89 and sm_120, 227 on sm_90 and sm_100."""
    load().simt_shared(ctypes.c_uint64(kib << 10))


def schedule(seed: int) -> None:
    """Fixes the order in which the next launches run their threads and blocks."""
    load().simt_seed(ctypes.c_uint64(seed))
