"""The part of PyTorch's stable C interface that csrc/cpu/shim.h declares, against the installed PyTorch's own headers."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

SHIM = (Path(__file__).resolve().parents[1] / "csrc/cpu/shim.h").read_text()
INCLUDE = Path(torch.__file__).parent / "include"
FUNCTIONS = sorted(set(re.findall(r"^(?:int32_t|AOTITorchError) (\w+)\(", SHIM, re.MULTILINE)))
COMPILER = shutil.which("g++")


def said(tmp_path, shim: str) -> str:
    """What the compiler says of uses of PyTorch's declarations, then of `shim` beside them."""
    uses = "".join(f"const auto use_{name} = &{name};\n" for name in FUNCTIONS)
    source = tmp_path / "both.cpp"
    source.write_text(f"#include <torch/csrc/stable/c/shim.h>\n{uses}{shim}")
    command = [COMPILER, "-std=c++17", "-fsyntax-only", "-w", f"-isystem{INCLUDE}"]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-x", "c++", str(source)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stderr


@pytest.mark.skipif(COMPILER is None, reason="no g++")
class TestDeclarations:
    def test_they_are_those_of_pytorch(self, tmp_path):
        assert len(FUNCTIONS) > 20
        assert said(tmp_path, SHIM) == ""

    @pytest.mark.parametrize(
        ("ours", "wrong"),
        [
            ("int64_t* numel", "int32_t* numel"),
            (
                "uint64_t version);\n\nAOTITorchError torch_parallel",
                "uint32_t version);\n\nAOTITorchError torch_parallel",
            ),
            ("using StableIValue = uint64_t", "using StableIValue = uint32_t"),
            ("using AOTITorchError = int32_t", "using AOTITorchError = int64_t"),
        ],
        ids=["a-pointer", "a-number", "the-stack", "the-error"],
    )
    def test_others_are_refused(self, tmp_path, ours, wrong):
        assert SHIM.count(ours) == 1
        assert "conflicting declaration" in said(tmp_path, SHIM.replace(ours, wrong))
