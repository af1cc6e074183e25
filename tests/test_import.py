"""Importing and installing, each in a fresh process: missing parts are left out and reported, never hidden."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd="/",
        check=False,
    )


def passes(code, **environment):
    result = python(code, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def without(*modules):
    """Code that makes importing `modules` fail as if they were not installed."""
    return f"""
import importlib.util, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in {modules!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in {modules!r} else real(name, package)
"""


def test_import_is_light():
    """Importing the ops loads neither Triton kernels nor the libraries for training, metrics or the command line."""
    heavy = "torchvision", "sklearn", "matplotlib", "tensorboard", "typer", "rich"
    heavy += "torchmetrics", "torch_fidelity", "pytorch_fid", "scipy"
    code = f"import sys, ivfast; print([m for m in {(*heavy, 'ivfast.kernels.multi_js')!r} if m in sys.modules])"
    assert passes(code).strip() == "[]"


def test_works_without_triton():
    code = without("triton") + (
        "import torch, ivfast\n"
        "x = torch.randn(9, 3)\n"
        "ivfast.svgd_direction(x), ivfast.multi_js_loss(x)\n"
        "try:\n"
        "    with ivfast.use('triton'): ivfast.multi_js_loss(x)\n"
        "except RuntimeError as error: print(error)\n"
    )
    assert "the package triton is not installed" in passes(code)


def test_works_without_the_extension():
    code = without("ivfast._C", "ivfast._cuda") + (
        "import torch, ivfast\n"
        "x = torch.randn(9, 3)\n"
        "y = ivfast.svgd_direction(x)\n"
        "with ivfast.use('reference'): assert torch.equal(y, ivfast.svgd_direction(x))\n"
        "try:\n"
        "    with ivfast.use('cpu'): ivfast.svgd_direction(x)\n"
        "except RuntimeError as error: print(error)\n"
    )
    assert "the extension ivfast._C is not there (No module named 'ivfast._C')" in passes(code)


def test_a_switch_chooses_the_instruction_set():
    pytest.importorskip("ivfast._C")
    code = "import ivfast; from ivfast._registry import instruction_set; print(instruction_set())"
    assert passes(code, IVFAST_ISA="generic").strip() == "generic"
    most = passes(code, IVFAST_ISA="").strip()
    assert passes(code, IVFAST_ISA=most).strip() == most
    result = python(code, IVFAST_ISA="mmx")
    assert "IVFAST_ISA: the instruction set must be one of generic, avx2, avx512, got 'mmx'" in result.stderr
    if most != "avx512":
        assert f"this CPU does not have avx512: {most} is the most" in python(code, IVFAST_ISA="avx512").stderr


def test_the_report_says_what_is_missing_and_why():
    report = passes("import runpy; runpy.run_module('ivfast', run_name='__main__')", COLUMNS="200")
    assert "svgd_direction" in report
    assert "reference" in report
    hidden = without("ivfast._C", "ivfast._cuda") + "import runpy; runpy.run_module('ivfast', run_name='__main__')"
    assert "No module named 'ivfast._C'" in passes(hidden, COLUMNS="200")


def test_submodules_come_when_asked_for():
    heavy = "torchvision", "sklearn", "safetensors", "rich", "ivfast.data", "ivfast.models", "ivfast.train"
    code = (
        "import sys, ivfast\n"
        f"print([m for m in {heavy!r} if m in sys.modules])\n"
        "assert {'data', 'metrics', 'models', 'train', 'svgd'} <= set(dir(ivfast))\n"
        "ivfast.data.load, ivfast.models.build, ivfast.metrics.codes, ivfast.train.Settings\n"
        "assert not hasattr(ivfast, 'dataset')\n"
    )
    assert passes(code) == "[]\n"


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_the_command_without_the_extra_says_so_in_one_line(package):
    for entry in (
        "from ivfast.__main__ import main; main()",
        "import runpy; runpy.run_module('ivfast', run_name='__main__')",
    ):
        result = python(without(package) + f"sys.argv = ['ivfast', 'train']; {entry}")
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr == f'error: ivfast needs {package}: pip install "ivfast[train]"\n'


def test_every_public_name_is_exported_and_documented():
    code = "import ivfast; print([n for n in ivfast.__all__ if not (getattr(ivfast, n).__doc__ or '').strip()])"
    assert passes(code).strip() == "[]"


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        pytest.param(
            {"CUDA_HOME": "/nowhere"},
            None,
            marks=pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler"),
        ),
        ({"CXX": "/nowhere/c++", "CC": "/nowhere/cc"}, "ivfast._C was left out"),
    ],
    ids=["broken-cuda-home", "no-compiler"],
)
def test_builds_what_can_be_built(tmp_path, environment, said):
    """With a broken CUDA_HOME or without a compiler, parts are left out and reported; the build itself succeeds."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "kernels", "bench", "ivfast"):
        (tmp_path / name).symlink_to(ROOT / name)
    # one operator of each kind: the installed package shows that all compile
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file() and (path.suffix == ".h" or path.name in ("library.cpp", "importance.cpp", "gaussian.cu")):
            link = tmp_path / path.relative_to(ROOT)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    stale = tmp_path / "out/ivfast/_C.abi3.so"
    stale.parent.mkdir(parents=True)
    stale.touch()
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", "out", "--build-temp", "temporary"],
        cwd=tmp_path,
        env={**os.environ, "TORCH_CUDA_ARCH_LIST": "9.0", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    if said:
        assert said in result.stderr
        assert not list((tmp_path / "out").rglob("*.so"))
    else:
        assert stale.stat().st_size > 0
