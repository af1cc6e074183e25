"""Build csrc/: ivfast._C for the CPU, and ivfast._cuda where a GPU is in sight or IVFAST_CUDA=1 asks for it.

Neither is needed to install. What is left out, and why, is written to ivfast/_build.py, which `ivfast info` reads.

IVFAST_CUDA=0|1           never | always build the CUDA kernels; by default where a GPU is in sight
TORCH_CUDA_ARCH_LIST      the architectures, as for PyTorch's own extensions; setting it asks for the CUDA kernels
IVFAST_REQUIRE_KERNELS=1  fail instead of leaving out kernels that were asked for
MAX_JOBS                  compilers at a time; default: one per core
"""

import ctypes
import itertools
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

# pip asks for the metadata twice before it builds; without torch, whose import takes seconds, that is quick.
BUILDING = {"build", "build_ext", "bdist_wheel", "editable_wheel", "install", "develop"}
BUILDS = {"egg_info", "dist_info", "sdist"}.isdisjoint(sys.argv) or not BUILDING.isdisjoint(sys.argv)


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


def gpus() -> list[str]:
    """Compute capabilities of the GPUs in sight, `["9.0"]`, from the driver: build isolation's torch may not fit it."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        count, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        found = set()
        if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0:
            for device in range(count.value):  # attributes 75 and 76: the compute capability
                driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device)
                driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
                found.add((major.value, minor.value))
        return [f"{x}.{y}" for x, y in sorted(found)]
    except (OSError, AttributeError):
        pass
    try:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        said = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return []
    return sorted({x for x in said if x.replace(".", "", 1).isdigit()}, key=float)


def switch(name: str) -> bool | None:
    """The environment variable `name`, 0 or 1; None where it is not set."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        sys.exit(f"ivfast: {name} must be 0 or 1, got {value!r}")
    return None if value == "" else value == "1"


TOOLKIT = cuda_toolkit()
ASKED = switch("IVFAST_CUDA")
REQUIRED = bool(switch("IVFAST_REQUIRE_KERNELS"))
GIVEN = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
FOUND = [] if GIVEN or ASKED is False else gpus()
ARCHITECTURES = GIVEN or ";".join(found for found in FOUND if float(found) >= 8.0)  # the CUDA kernels need 8.0
LEFT_OUT: dict[str, str] = {}  # module: why


def without_cuda() -> str | None:
    """Why ivfast._cuda is not built."""
    if ASKED is False:
        return "IVFAST_CUDA=0"
    if not ASKED and not ARCHITECTURES and FOUND:
        return f"the CUDA kernels need compute capability 8.0, and the GPU has {', '.join(FOUND)}"
    if not ASKED and not ARCHITECTURES:
        return "no GPU was found when ivfast was installed"
    return None if TOOLKIT else "no CUDA toolkit was found (CUDA_HOME, /usr/local/cuda, nvcc)"


if TOOLKIT:
    os.environ["CUDA_HOME"] = str(TOOLKIT)
else:
    os.environ.pop("CUDA_HOME", None)
# 8.0 A100, 9.0 H100/H200, 10.0 B200; PTX for what comes after
os.environ["TORCH_CUDA_ARCH_LIST"] = ARCHITECTURES or "8.0;9.0;10.0+PTX"

# The CUDA kernels compile against PyTorch's headers. The CPU's declare what they use of PyTorch (csrc/cpu/shim.h), so
# that pip need not install PyTorch a second time, into the environment in which it builds.
WITH_CUDA = without_cuda() is None
CUDA_NEEDS = ["torch>=2.10", "numpy>=1.26"]
if WITH_CUDA and BUILDS:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CUDAExtension  # reads CUDA_HOME
else:
    BuildExtension = build_ext

# 2.10, the oldest torch the binary loads in; it also bans every header outside the stable ABI. The same for Python is
# `py_limited_api`, which defines Py_LIMITED_API.
STABLE = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
STRIP = ["-Wl,-s"] if sys.platform == "linux" else []


def sources(folder: str) -> list[str]:
    return sorted(str(path) for path in Path("csrc", folder).iterdir() if path.suffix in {".cpp", ".cu"})


class CpuBuild:
    """ivfast._C, compiled and linked by ninja, or without it by a few threads.

    -O2 and what follows is as fast as -O3, which compiles for a third longer: loops that test the same thing every time
    are split, and scalar loops get vectors.
    """

    FLAGS = (
        *("-std=c++17", "-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic", "-funswitch-loops", "-fwrapv"),
        *("-fPIC", "-fvisibility=hidden", "-g0", "-DNDEBUG", "-Wall", "-Wno-maybe-uninitialized", "-Wno-psabi"),
        *("-DPy_LIMITED_API=0x030a0000", "-DTORCH_EXTENSION_NAME=_C"),
    )

    def __init__(self, sources: list[str], folder: Path, library: Path):
        self.folder, self.library = folder.resolve(), library.resolve()
        self.compiler = shlex.split(os.environ.get("CXX") or "c++")
        given = [shlex.split(os.environ.get(name, "")) for name in ("CPPFLAGS", "CFLAGS", "CXXFLAGS")]
        include = dict.fromkeys(sysconfig.get_path(name) for name in ("include", "platinclude"))
        self.flags = [*self.FLAGS, *(f"-I{path}" for path in include), *itertools.chain(*given)]
        self.objects = {Path(source).resolve(): self.folder / Path(source).with_suffix(".o") for source in sources}

    def compilation(self, source: Path, to: Path) -> list[str]:
        return [*self.compiler, *self.flags, "-MMD", "-MF", f"{to}.d", "-c", str(source), "-o", str(to)]

    def link(self) -> list[str]:
        given = shlex.split(os.environ.get("LDFLAGS", ""))
        if sys.platform == "darwin":  # untried
            given += ["-bundle", "-undefined", "dynamic_lookup"]
        else:  # an empty library in PyTorch's place: ivfast._C says that it needs libtorch_cpu.so, which ivfast imports
            given += ["-shared", "-Wl,--no-as-needed", f"-L{self.folder}", "-ltorch_cpu", *STRIP]
        return [*self.compiler, *map(str, self.objects.values()), "-o", str(self.library), *given]

    def stand_in(self) -> list[str]:
        to = self.folder / "libtorch_cpu.so"
        return [*self.compiler, "-shared", "-xc++", "/dev/null", "-o", str(to), f"-Wl,-soname,{to.name}"]

    def run(self) -> None:
        for path in (self.library, *self.objects.values()):
            path.parent.mkdir(parents=True, exist_ok=True)
        if sys.platform != "darwin":
            subprocess.run(self.stand_in(), check=True)
        jobs = max(1, int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1))
        if ninja := shutil.which("ninja"):
            self.write_ninja()
            subprocess.run([ninja, "-C", str(self.folder), "-j", str(jobs)], check=True)
            return
        print("ivfast: without ninja, every file is compiled again", file=sys.stderr)
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(lambda pair: subprocess.run(self.compilation(*pair), check=True), self.objects.items()))
        subprocess.run(self.link(), check=True)

    def write_ninja(self) -> None:
        def command(words: list[str]) -> str:
            return shlex.join(words).replace("$", "$$")

        def path(name: Path) -> str:
            return str(name).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

        lines = []
        for at, (source, to) in enumerate(self.objects.items()):
            lines += [f"rule compile{at}", f"  command = {command(self.compilation(source, to))}"]
            lines += [f"  description = {command([source.name])}", f"  depfile = {path(to)}.d", "  deps = gcc"]
            lines += [f"build {path(to)}: compile{at} {path(source)}"]
        lines += ["rule link", f"  command = {command(self.link())}"]
        lines += [f"build {path(self.library)}: link {' '.join(map(path, self.objects.values()))}", ""]
        (self.folder / "build.ninja").write_text("\n".join(lines))


class OptionalBuild(BuildExtension):
    """Builds each extension on its own, leaves out the ones that fail, and writes down which and why."""

    def build_extensions(self):
        wanted, self.extensions, built = self.extensions, [], []
        for extension in wanted:
            name = extension.name.rpartition(".")[2]
            library = Path(self.get_ext_fullpath(extension.name))
            try:
                if name == "_C":
                    # an editable installation keeps its objects: the next one compiles what has changed
                    folder = Path("build/editable") if self.editable_mode else Path(self.build_temp)
                    CpuBuild(extension.sources, folder, library).run()
                else:
                    self.extensions = [extension]
                    super().build_extensions()
                built.append(extension)
            except (Exception, SystemExit) as error:
                LEFT_OUT[name] = f"it did not compile: {(str(error) or type(error).__name__).splitlines()[0]}"
                print(f"\nivfast: {extension.name} was left out: {error}\n", file=sys.stderr)
                library.unlink(missing_ok=True)  # one of an earlier build
        self.extensions = built
        if "_cuda" in LEFT_OUT:
            Path(self.get_ext_fullpath("ivfast._cuda")).unlink(missing_ok=True)
        asked = ASKED or (ASKED is None and ARCHITECTURES)
        if REQUIRED and (missing := sorted(name for name in LEFT_OUT if name == "_C" or asked)):
            reasons = "; ".join(f"ivfast.{name}: {LEFT_OUT[name]}" for name in missing)
            sys.exit(f"ivfast: IVFAST_REQUIRE_KERNELS=1, but {reasons}")
        self.write_record(built)

    def write_record(self, built) -> None:
        names = [extension.name.rpartition(".")[2] for extension in built]
        made = {name: os.environ["TORCH_CUDA_ARCH_LIST"] if name == "_cuda" else None for name in names}
        self.record = Path(self.get_ext_fullpath("ivfast._build")).parent / "_build.py"
        self.record.parent.mkdir(parents=True, exist_ok=True)
        self.record.write_text(
            '"""Written by setup.py: the kernels that were built, for which GPUs, and why others were not."""\n\n'
            f"BUILT = {made!r}\nLEFT_OUT = {LEFT_OUT!r}\n"
        )

    def copy_extensions_to_source(self) -> None:
        """For an editable installation: the record too; kernels of an earlier build that are left out now go."""
        super().copy_extensions_to_source()
        package = Path(self.get_finalized_command("build_py").get_package_dir("ivfast"))
        shutil.copy(self.record, package)
        for name in LEFT_OUT:
            for stale in package.glob(f"{name}.*so"):
                stale.unlink()


def extensions() -> list:
    cpu = Extension("ivfast._C", ["csrc/library.cpp", *sources("cpu")], py_limited_api=True)
    why = without_cuda() or ("torch is a CPU build" if torch.version.cuda is None else None)
    if why:
        LEFT_OUT["_cuda"] = why
        print(f"ivfast: building for the CPU only: {why}", file=sys.stderr)
        return [cpu]
    cuda = CUDAExtension(
        "ivfast._cuda",
        ["csrc/library.cpp", *sources("cuda")],
        extra_compile_args={"cxx": ["-O2", "-g0", "-DUSE_CUDA", *STABLE], "nvcc": ["-O3", "-DUSE_CUDA", *STABLE]},
        extra_link_args=STRIP,
        py_limited_api=True,
    )
    # a static runtime: one binary for every CUDA version that torch brings
    cuda.libraries = [name for name in cuda.libraries if name != "cudart"] + ["cudart_static", "dl", "rt", "pthread"]
    return [cpu, cuda]


FOLDERS = {"ivfast.kernels": "kernels", "ivfast.bench": "bench"}
packages = set(find_packages(include=["ivfast", "ivfast.*"]))
for name, folder in FOLDERS.items():
    packages |= {name, *(f"{name}.{package}" for package in find_packages(folder))}

setup(
    packages=sorted(packages),
    package_dir={"ivfast": "ivfast", **FOLDERS},
    ext_modules=extensions() if BUILDS else [],
    setup_requires=CUDA_NEEDS if WITH_CUDA else [],
    cmdclass={"build_ext": OptionalBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
