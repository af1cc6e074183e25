"""Build csrc/: ivfast._C for the CPU where there is a C++ compiler, ivfast._cuda where there is a CUDA toolkit.

Neither is needed to install: what cannot be built is left out, and says so here and in `python -m ivfast`.
"""

import os
import shutil
import sys
from pathlib import Path

import torch
from setuptools import setup


def cuda_toolkit() -> Path | None:
    """A toolkit that can compile and link; `which nvcc` may be a wrapper outside it. Build machines have no GPU."""
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates += [Path(nvcc).resolve().parents[1]] if nvcc else []
    for home in (Path(c) for c in candidates if c):
        library = any(any(home.glob(f"{folder}/libcudart_static*")) for folder in ("lib64", "lib", "lib/x64"))
        if (home / "bin/nvcc").is_file() and (home / "include/cuda_runtime.h").is_file() and library:
            return home
    return None


TOOLKIT = cuda_toolkit()
if TOOLKIT:
    os.environ["CUDA_HOME"] = str(TOOLKIT)
else:
    os.environ.pop("CUDA_HOME", None)
# 8.0 A100, 9.0 H100/H200, 10.0 B200; PTX for what comes after
os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX")

from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # noqa: E402  reads CUDA_HOME

# 2.10, the oldest torch the binary loads in; it also bans every header outside the stable ABI. The same for Python is
# `py_limited_api`, which defines Py_LIMITED_API.
STABLE = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]


def sources(folder: str) -> list[str]:
    return sorted(str(path) for path in Path("csrc", folder).iterdir() if path.suffix in {".cpp", ".cu"})


class OptionalBuild(BuildExtension):
    """Builds each extension on its own and leaves out the ones that fail."""

    def build_extensions(self):
        wanted, self.extensions, built = self.extensions, [], []
        for extension in wanted:
            self.extensions = [extension]
            try:
                super().build_extensions()
                built.append(extension)
            except (Exception, SystemExit) as error:
                print(f"\nivfast: {extension.name} was left out: {error}\n", file=sys.stderr)
                Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)  # one of an earlier build
        self.extensions = built


def extensions() -> list:
    cpu = CppExtension(
        "ivfast._C",
        ["csrc/library.cpp", *sources("cpu")],
        extra_compile_args={"cxx": ["-O3", *STABLE]},
        py_limited_api=True,
    )
    if not TOOLKIT or torch.version.cuda is None:
        why = "torch is a CPU build" if TOOLKIT else "no CUDA toolkit was found (CUDA_HOME, /usr/local/cuda, nvcc)"
        print(f"ivfast: building for the CPU only: {why}", file=sys.stderr)
        return [cpu]
    cuda = CUDAExtension(
        "ivfast._cuda",
        ["csrc/library.cpp", *sources("cuda")],
        extra_compile_args={"cxx": ["-O3", "-DUSE_CUDA", *STABLE], "nvcc": ["-O3", "-DUSE_CUDA", *STABLE]},
        py_limited_api=True,
    )
    # a static runtime: one binary for every CUDA version that torch brings
    cuda.libraries = [name for name in cuda.libraries if name != "cudart"] + ["cudart_static", "dl", "rt", "pthread"]
    return [cpu, cuda]


setup(
    packages=[
        "ivfast",
        *(
            f"ivfast.{part}"
            for part in (
                *("ops", "distributed", "data", "nets", "metrics", "models", "train", "runs", "papers", "cli"),
                *("kernels", "bench", "bench.harness", "bench.studies"),
            )
        ),
    ],
    package_dir={"ivfast": "ivfast", "ivfast.kernels": "kernels", "ivfast.bench": "bench"},
    ext_modules=extensions(),
    cmdclass={"build_ext": OptionalBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
