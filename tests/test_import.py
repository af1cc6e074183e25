"""Importing and installing, each in a fresh process: missing parts are left out and reported, never hidden."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import CORE, passes, python, without

ROOT = Path(__file__).parent.parent


def test_import_is_light():
    """Importing the ops loads neither Triton kernels nor the libraries for training, metrics or the command line."""
    heavy = "torchvision", "sklearn", "matplotlib", "tensorboard", "typer", "rich"
    heavy += "torchmetrics", "torch_fidelity", "pytorch_fid", "scipy"
    code = f"import sys, ivfast; print([m for m in {(*heavy, 'ivfast.kernels.multi_js')!r} if m in sys.modules])"
    command = [sys.executable, "-W", "error", "-c", code]  # a fresh process, which has not imported torch
    result = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


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
    assert "the extension ivfast._C is not available (No module named 'ivfast._C')" in passes(code)


def test_a_switch_chooses_the_instruction_set():
    pytest.importorskip("ivfast._C")
    code = "import ivfast; from ivfast._registry import instruction_set; print(instruction_set())"
    assert passes(code, IVFAST_ISA="generic").strip() == "generic"
    most = passes(code, IVFAST_ISA="").strip()
    assert passes(code, IVFAST_ISA=most).strip() == most
    result = python(code, IVFAST_ISA="mmx")
    assert "IVFAST_ISA: the instruction set must be one of generic, avx2, avx512, got 'mmx'" in result.stderr
    if most != "avx512":
        assert f"this CPU does not have avx512; the most it has is {most}" in python(code, IVFAST_ISA="avx512").stderr


def test_the_report_says_what_is_missing_and_why():
    report = passes("import runpy; runpy.run_module('ivfast', run_name='__main__')", COLUMNS="200")
    assert "svgd_direction" in report
    assert "reference" in report
    hidden = without("ivfast._C", "ivfast._cuda") + "import runpy; runpy.run_module('ivfast', run_name='__main__')"
    assert "No module named 'ivfast._C'" in passes(hidden, COLUMNS="200")


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


def command(code):
    """A command in a process without the packages of the extras: its exit code and what it says."""
    result = python(CORE + code)
    return result.returncode, result.stdout, result.stderr


def test_the_core_computes():
    """Ops, modules, optimizers, statistics and the collectives need nothing of an extra."""
    code = CORE + (
        "import torch, ivfast\n"
        "x = torch.randn(9, 3, requires_grad=True)\n"
        "(ivfast.svgd_direction(x).sum() + ivfast.mmd(x, x + 1) + ivfast.fld(x)).backward()\n"
        "assert x.grad.isfinite().all()\n"
        "ivfast.svgd(torch.randn(9, 3), 2, score=lambda x: -x)\n"
        "ivfast.GaussianStatistics(3).update(x.detach().double())\n"
        "ivfast.nn, ivfast.optim, ivfast.distributed, ivfast.patch\n"
    )
    passes(code)


@pytest.mark.parametrize("module", ["ivfast", "ivfast.bench.studies.scale", "ivfast.bench.studies.fused_adam"])
@pytest.mark.parametrize("arguments", [[], ["train"], ["info"]], ids=["alone", "train", "info"])
def test_a_command_without_its_packages_is_one_line_and_exit_code_2(module, arguments):
    code = f"import runpy, sys; sys.argv = ['x', *{arguments!r}]; runpy.run_module({module!r}, run_name='__main__')"
    status, out, err = command(code)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    assert err.rstrip().endswith('pip install "ivfast[train]"')


@pytest.mark.parametrize("missing", [["torchvision"], ["sklearn"], ["safetensors"], ["matplotlib"]], ids="".join)
def test_a_command_that_lacks_one_package_names_it(missing, tmp_path):
    """typer and rich are there, something else is not: nothing begins."""
    arguments = ["ivfast", "train", "--steps", "1", "--out", str(tmp_path / "run")]
    code = without(*missing) + f"import sys; sys.argv = {arguments!r}; from ivfast.__main__ import main; main()"
    result = python(code, COLUMNS="200")
    assert result.returncode == 2, result.stderr
    assert re.fullmatch(r'error: ivfast[ .]\w+ needs [\w-]+: pip install "ivfast\[train\]"\n', result.stderr), (
        result.stderr
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import ivfast.data", 'ivfast.data needs safetensors: pip install "ivfast[train]"'),
        ("import ivfast; ivfast.data", 'ivfast.data needs safetensors: pip install "ivfast[train]"'),
        ("import ivfast.train.loop", 'ivfast.train needs safetensors: pip install "ivfast[train]"'),
        ("import ivfast.metrics", 'ivfast.data needs safetensors: pip install "ivfast[train]"'),
        (
            "import ivfast; ivfast.patch.pytorch_fid()",
            'ivfast.patch.pytorch_fid() needs pytorch-fid: pip install "ivfast[train]"',
        ),
    ],
)
def test_a_module_without_its_packages_names_the_extra(code, said):
    assert refused(CORE, code) == said


def refused(missing, code):
    """What the ImportError says that `code` raises."""
    tried = "\n".join(f"    {line}" for line in code.split("; "))
    return passes(missing + f"try:\n{tried}\nexcept ImportError as error: print(error)\n").strip()


@pytest.mark.parametrize(
    ("missing", "code", "said"),
    [
        (
            "torchmetrics",
            "from ivfast.metrics import FrechetInceptionDistance",
            'ivfast.metrics.FrechetInceptionDistance needs torchmetrics: pip install "ivfast[metrics]"',
        ),
        (
            "sklearn",
            "import torch, ivfast; ivfast.metrics.kl_to_prior(torch.randn(9, 2))",
            'ivfast.metrics.kl_to_prior needs scikit-learn: pip install "ivfast[train]"',
        ),
        (
            "sklearn",
            "import ivfast; ivfast.data.load('digits')",
            'ivfast.data.load needs scikit-learn: pip install "ivfast[train]"',
        ),
    ],
)
def test_a_function_without_its_package_names_the_extra(missing, code, said):
    assert refused(without(missing), code) == said


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


@pytest.fixture
def repository(tmp_path):
    """A copy with one operator of each kind: the installed package is the proof that all compile."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "kernels", "ivfast", "bench"):
        (tmp_path / name).symlink_to(ROOT / name)
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file() and (path.suffix == ".h" or path.name in ("library.cpp", "importance.cpp", "gaussian.cu")):
            link = tmp_path / path.relative_to(ROOT)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    return tmp_path


def build(folder, **environment):
    for name in ("IVFAST_CUDA", "IVFAST_REQUIRE_KERNELS", "TORCH_CUDA_ARCH_LIST"):
        environment.setdefault(name, "")
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", "out", "--build-temp", "temporary"],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def record(folder):
    return runpy.run_path(folder / "out/ivfast/_build.py")


NO_COMPILER = {"CXX": "/nowhere/c++", "CC": "/nowhere/cc"}


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        pytest.param(
            {"CUDA_HOME": "/nowhere", "TORCH_CUDA_ARCH_LIST": "9.0"},
            None,
            marks=pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler"),
        ),
        ({**NO_COMPILER, "TORCH_CUDA_ARCH_LIST": "9.0"}, "ivfast._C was left out"),
    ],
    ids=["broken-cuda-home", "no-compiler"],
)
def test_builds_what_can_be_built(repository, environment, said):
    """A broken CUDA_HOME or no compiler leaves parts out and says so; the build itself succeeds."""
    stale = repository / "out/ivfast/_C.abi3.so"
    stale.parent.mkdir(parents=True)
    stale.touch()
    result = build(repository, **environment)
    assert result.returncode == 0, result.stderr
    if said:
        assert said in result.stderr
        assert not list((repository / "out").rglob("*.so"))
        assert "did not compile" in record(repository)["LEFT_OUT"]["_C"]
    else:
        assert stale.stat().st_size > 0
        assert "_C" in record(repository)["BUILT"]


# without a compiler, what is tried fails at once and what is not tried is known by its reason
@pytest.mark.parametrize(
    ("environment", "reason"),
    [({"IVFAST_CUDA": "0", "TORCH_CUDA_ARCH_LIST": "9.0"}, "IVFAST_CUDA=0"), ({}, "no GPU was found")],
    ids=["told-not-to", "no-gpu"],
)
def test_cuda_is_left_alone_unless_there_is_a_gpu_or_it_is_asked_for(repository, environment, reason):
    if not environment and torch.cuda.is_available():
        pytest.skip("a GPU is in sight")
    result = build(repository, **NO_COMPILER, **environment)
    assert result.returncode == 0, result.stderr
    assert reason in record(repository)["LEFT_OUT"]["_cuda"]
    assert "csrc/cuda" not in result.stdout


def test_kernels_that_are_required_and_fail_stop_the_build(repository):
    result = build(repository, **NO_COMPILER, IVFAST_REQUIRE_KERNELS="1")
    assert result.returncode != 0
    assert "IVFAST_REQUIRE_KERNELS=1, but ivfast._C: it did not compile" in result.stderr
    assert "_cuda" not in result.stderr.splitlines()[-1]  # nobody asked for it


def test_a_switch_that_is_neither_0_nor_1_is_refused(repository):
    result = build(repository, IVFAST_CUDA="yes")
    assert result.returncode != 0
    assert "IVFAST_CUDA must be 0 or 1, got 'yes'" in result.stderr


def test_the_report_names_what_was_left_out_and_how_to_build_it(tmp_path):
    record = tmp_path / "_build.py"
    record.write_text("BUILT = {}\nLEFT_OUT = {'_cuda': 'no GPU was found when ivfast was installed'}\n")
    code = without("ivfast._cuda") + (
        "import runpy, sys, types\n"
        "import ivfast\n"
        f"sys.modules['ivfast._build'] = types.SimpleNamespace(**runpy.run_path({str(record)!r}))\n"
        "runpy.run_module('ivfast', run_name='__main__')\n"
    )
    report = " ".join(passes(code, COLUMNS="200").split())
    assert (
        "not built: no GPU was found when ivfast was installed; to build with a CUDA toolkit: IVFAST_CUDA=1 pip"
        in report
    )
