"""CUDA C++ compiled by nvcc, without a GPU: every kernel for every target, without spills."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from simt import build

REPOSITORY = Path(__file__).resolve().parents[1]
TARGETS = (80, 90, 100)  # A100, H100 and H200, B200


def toolkit() -> Path | None:
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", Path(nvcc).resolve().parents[1] if nvcc else None]
    usable = (Path(home) for home in homes if home)
    return next((h for h in usable if (h / "bin/nvcc").is_file() and (h / "include/cuda_runtime.h").is_file()), None)


@pytest.mark.skipif(toolkit() is None, reason="no CUDA toolkit with nvcc and cuda_runtime.h")
@pytest.mark.parametrize("source", sorted((REPOSITORY / "csrc/cuda").glob("*.cu")), ids=lambda path: path.name)
def test_cuda_kernels_compile_without_spills(source, tmp_path):
    nvcc = toolkit() / "bin/nvcc"
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    targets = [cc for cc in TARGETS if f"compute_{cc}" in known]
    command = [
        *(str(nvcc), "-std=c++17", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"),
        *(f"-I{build.TORCH / 'include'}", "-Xptxas", "-v", "--threads", "2"),
        *(f"-gencode=arch=compute_{cc},code=sm_{cc}" for cc in targets),
        *("-c", str(source), "-o", str(tmp_path / "kernels.o")),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    report = result.stdout + result.stderr
    kernels = re.findall(r"Compiling entry function '(\S+)' for '(\S+)'", report)
    assert {sm for _, sm in kernels} == {f"sm_{cc}" for cc in targets}
    used = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(used) == len(kernels)
    assert set(used) == {("0", "0", "0")}
