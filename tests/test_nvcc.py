"""CUDA C++ compiled by nvcc, without a GPU: `ivfast._cuda` as `IVFAST_CUDA=1 pip install .` builds it, without spills.

Most of the time of each source goes into the same headers, so they are merged into two sources and built for one
randomly chosen architecture. With IVFAST_TARGETS=all, as in .ci/versions, each is built by itself, as pip does, for all
architectures.
"""

import os
import random
import re
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path
from unittest import mock

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
TARGETS = (80, 90, 100)  # A100, H100 and H200, B200
SOURCES = sorted((REPOSITORY / "csrc/cuda").glob("*.cu"))

ALL = os.environ.get("IVFAST_TARGETS") == "all"

# `setup.py build_ext`, with its own flags and environment variables, of one extension, whose CUDA sources may be others
BUILD = """
    import os, pathlib, runpy, setuptools

    complete = setuptools.setup
    def setup(*, ext_modules, **metadata):
        (cuda,) = (e for e in ext_modules if e.name == "ivfast._cuda")
        if fused := sorted(map(str, pathlib.Path(os.environ["FUSED"]).glob("*.cu"))):
            cuda.sources = [s for s in cuda.sources if not s.endswith(".cu")] + fused
        complete(ext_modules=[cuda], **metadata)
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
    """The one that setup.py finds."""
    nothing = {"IVFAST_CUDA": "0", "IVFAST_REQUIRE_KERNELS": "", "TORCH_CUDA_ARCH_LIST": ""}
    argv = mock.patch("sys.argv", ["setup.py", "egg_info"])
    with mock.patch.dict(os.environ, nothing), argv, mock.patch("setuptools.setup"):
        return runpy.run_path(str(REPOSITORY / "setup.py"))["TOOLKIT"]


TOOLKIT = toolkit()


def said(*arguments: str) -> str:
    return subprocess.run([TOOLKIT / "bin/nvcc", *arguments], capture_output=True, text=True, check=True).stdout


def unfit() -> str | None:
    """Why nothing is built here."""
    if TOOLKIT is None:
        return "no CUDA toolkit with nvcc, cuda_runtime.h and libcudart_static.a"
    if torch.version.cuda is None:
        return "PyTorch is a CPU build, whose headers have no CUDA"
    release = re.search(r"release (\d+)\.", said("--version")).group(1)
    if release != torch.version.cuda.split(".")[0]:
        return f"PyTorch for CUDA {torch.version.cuda} refuses the toolkit's {release}"
    return None if known() else f"this nvcc knows none of {TARGETS}"


def known() -> list[int]:
    architectures = said("--list-gpu-arch").split()
    return [cc for cc in TARGETS if f"compute_{cc}" in architectures]


UNFIT = unfit()


def architectures() -> list[int]:
    """Of the TARGETS that this nvcc knows, one, which the commit determines in CI, or all."""
    return known() if ALL else [random.Random(os.environ.get("IVFAST_INPUTS")).choice(known())]


def fuse(folder: Path) -> None:
    """Write two sources to `folder`, each with half of all."""
    middle = len(SOURCES) // 2
    for name, half in (("first", SOURCES[:middle]), ("second", SOURCES[middle:])):
        (folder / f"{name}.cu").write_text("".join(f'#include "{source}"\n' for source in half))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The library, its architectures, and what ptxas said of each kernel."""
    folder, targets = tmp_path_factory.mktemp("cuda"), architectures()
    if not ALL:
        fuse(folder)
    cores_per_worker = os.cpu_count() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    asked = {
        "FUSED": str(folder),
        "IVFAST_CUDA": "1",
        "IVFAST_REQUIRE_KERNELS": "1",
        "CUDA_HOME": str(TOOLKIT),
        "TORCH_CUDA_ARCH_LIST": ";".join(f"{cc / 10:.1f}" for cc in targets),
        "NVCC_APPEND_FLAGS": "-Xptxas -v",
        "MAX_JOBS": str(max(1, cores_per_worker)),
    }
    to = ["build_ext", "--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
    command = [sys.executable, "-c", textwrap.dedent(BUILD), *to]
    result = subprocess.run(command, cwd=REPOSITORY, env=os.environ | asked, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "lib/ivfast/_cuda.abi3.so", targets, result.stdout + result.stderr


@pytest.mark.skipif(UNFIT is not None, reason=str(UNFIT))
class TestBuiltAsByPip:
    def test_no_kernel_spills(self, built):
        _, targets, report = built
        kernels = re.findall(r"Compiling entry function '(\S+)' for '(\S+)'", report)
        assert {sm for _, sm in kernels} == {f"sm_{cc}" for cc in targets}
        assert len({name for name, _ in kernels}) >= len(SOURCES)
        used = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
        assert len(used) == len(kernels)
        assert set(used) == {("0", "0", "0")}

    def test_every_kernel_that_is_declared_loads(self, built):
        library, *_ = built
        assert library.stat().st_size < 40e6  # stripped
        command = [sys.executable, "-c", textwrap.dedent(LOAD), str(library)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        count, *without = result.stdout.split()
        assert int(count) >= len(SOURCES)
        assert not without
