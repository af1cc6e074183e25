"""CUDA C++ compiled by nvcc, without a GPU: `ivfast._cuda` as `IVFAST_CUDA=1 pip install .` builds it, without spills."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
TARGETS = (80, 90, 100)  # A100, H100 and H200, B200
SOURCES = sorted((REPOSITORY / "csrc/cuda").glob("*.cu"))

# `setup.py build_ext`, with its own flags and environment variables, of one extension
BUILD = """
    import runpy, setuptools

    complete = setuptools.setup
    def setup(*, ext_modules, **metadata):
        complete(ext_modules=[e for e in ext_modules if e.name == "ivfast._cuda"], **metadata)
    setuptools.setup = setup
    runpy.run_path("setup.py", run_name="__main__")
"""

# prints the operators that declare a CUDA C++ kernel and do not get one from the library
LOAD = """
    import importlib.util, sys
    import torch

    sys.modules["ivfast._cuda"] = None  # not the one that may be installed
    from ivfast._registry import OPS

    spec = importlib.util.spec_from_file_location("ivfast._cuda", sys.argv[1])
    importlib.util.module_from_spec(spec)
    declared = [name for name, op in OPS.items() if op.cuda]
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    print(len(declared), *(name for name in declared if not has(f"ivfast::{name}.cuda", "CUDA")))
"""


def toolkit() -> Path | None:
    """As in setup.py, a toolkit that compiles and links."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", Path(nvcc).resolve().parents[1] if nvcc else None]
    needed = ("bin/nvcc", "include/cuda_runtime.h", "lib64/libcudart_static.a")
    return next((h for h in map(Path, filter(None, homes)) if all((h / file).is_file() for file in needed)), None)


def architectures() -> list[int]:
    """Those of TARGETS that this nvcc knows."""
    known = subprocess.run([toolkit() / "bin/nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True)
    return [cc for cc in TARGETS if f"compute_{cc}" in known.stdout.split()]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The library, and what ptxas said of each kernel."""
    folder = tmp_path_factory.mktemp("cuda")
    asked = {
        "IVFAST_CUDA": "1",
        "IVFAST_REQUIRE_KERNELS": "1",
        "CUDA_HOME": str(toolkit()),
        "TORCH_CUDA_ARCH_LIST": ";".join(f"{cc / 10:.1f}" for cc in architectures()),
        "NVCC_APPEND_FLAGS": "-Xptxas -v",
        "MAX_JOBS": "2",
    }
    to = ["build_ext", "--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
    command = [sys.executable, "-c", textwrap.dedent(BUILD), *to]
    result = subprocess.run(command, cwd=REPOSITORY, env=os.environ | asked, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "lib/ivfast/_cuda.abi3.so", result.stdout + result.stderr


@pytest.mark.skipif(toolkit() is None, reason="no CUDA toolkit with nvcc, cuda_runtime.h and libcudart_static.a")
@pytest.mark.skipif(torch.version.cuda is None, reason="PyTorch is a CPU build, whose headers have no CUDA")
class TestBuiltAsByPip:
    def test_no_kernel_spills(self, built):
        _, report = built
        kernels = re.findall(r"Compiling entry function '(\S+)' for '(\S+)'", report)
        assert {sm for _, sm in kernels} == {f"sm_{cc}" for cc in architectures()}
        assert len({name for name, _ in kernels}) >= len(SOURCES)
        used = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
        assert len(used) == len(kernels)
        assert set(used) == {("0", "0", "0")}

    def test_every_kernel_that_is_declared_loads(self, built):
        library, _ = built
        assert library.stat().st_size < 40e6  # stripped
        command = [sys.executable, "-c", textwrap.dedent(LOAD), str(library)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        count, *without = result.stdout.split()
        assert int(count) >= len(SOURCES)
        assert not without
