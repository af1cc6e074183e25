"""rounded_dots.py multiplies as Triton compiles products, and every interpreted product passes through it."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
rounded_dots = pytest.importorskip("rounded_dots", exc_type=ImportError)

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted")


@triton.jit
def _dot_kernel(p_a, p_b, p_c, PRECISION: tl.constexpr, M: tl.constexpr):
    i, j = tl.arange(0, M)[:, None], tl.arange(0, 32)
    a, b = tl.load(p_a + i * 32 + j[None, :]), tl.load(p_b + j[:, None] * 32 + j[None, :])
    c = tl.dot(a, b, tl.load(p_c + i * 32 + j[None, :]), input_precision=PRECISION)
    tl.store(p_c + i * 32 + j[None, :], c)


def dot(a, b, c, precision):
    c = c.clone()
    _dot_kernel[1,](a, b, c, precision, len(a))
    return c


@interpreted
class TestProducts:
    @pytest.mark.parametrize("precision", ["ieee", "tf32", "tf32x3", "bf16x3"])
    def test_how_many_bits_are_read(self, precision):
        a, b, c = (torch.randn(16, 32), torch.randn(32, 32), torch.randn(16, 32))
        with rounded_dots.rounded() as counts:
            found = dot(a, b, c, precision)
        assert counts[precision] == 1
        error = (found.double() - (c.double() + a.double() @ b.double())).abs().max()
        size = a.norm(dim=1).max() * b.norm(dim=0).max()
        low, high = {"ieee": (0, -20), "tf32x3": (0, -19), "bf16x3": (-23, -15), "tf32": (-15, -9)}[precision]
        assert (2.0**low if low else 0) * size < error < 2.0**high * size

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_half_precision_is_exact(self, dtype):
        a, b = torch.randint(-8, 9, (16, 32)).to(dtype), torch.randint(-8, 9, (32, 32)).to(dtype) / 8
        with rounded_dots.rounded() as counts:
            found = dot(a, b, torch.zeros(16, 32), "tf32")
        assert torch.equal(found.double(), a.double() @ b.double())
        assert sum(counts.values()) == 1

    def test_operands_of_tf32_are_cut(self):
        one = torch.eye(32)
        x = torch.full((32, 32), 1 + 2**-10 - 2**-23)
        with rounded_dots.rounded() as counts:
            assert torch.equal(dot(one, x, 0 * one, "tf32"), torch.ones(32, 32))
            assert torch.equal(dot(one, x, 0 * one, "tf32x3"), x)
        assert counts == {"tf32": 1, "cut": 1, "tf32x3": 1}
        assert torch.equal(dot(one, x, 0 * one, "tf32"), x)  # what the interpreter does otherwise

    def test_infinity_and_nan(self):
        a, b = torch.eye(32), torch.ones(32, 32)
        a[0, 0], a[1, 1], b[2, 2] = torch.inf, torch.nan, torch.inf
        with rounded_dots.rounded():
            found = dot(a, b, 0 * a, "tf32x3")
        assert found[0].isposinf().any()
        assert found[1].isnan().all()
        assert found[3:, 3:].isfinite().all()


def test_ties_and_the_accumulator():
    x = np.float32([1 + 2**-11, -1 - 2**-11, 1 + 3 * 2**-11, np.inf, 1 + 2**-11 - 2**-23])
    assert rounded_dots.nearest_tf32(x).tolist() == [1 + 2**-10, -1 - 2**-10, 1 + 2**-9, np.inf, 1]
    assert rounded_dots.nearest_bf16(np.float32([1 + 2**-8, 1 + 3 * 2**-8])).tolist() == [1, 1 + 2**-6]
    assert rounded_dots.cut_to_float32(np.float64([1 + 2**-23 - 2**-40, -1 + 2**-40])).tolist() == [1, -1 + 2**-24]
    # two steps, of 8 · 2^-27 each: beside 1 both are cut off
    small, ones = np.full((1, 16), 2**-27, np.float32), np.ones((16, 1), np.float32)
    assert rounded_dots.accumulate(small, ones, np.ones((1, 1), np.float32)) == 1
    assert rounded_dots.accumulate(small, ones, np.zeros((1, 1), np.float32)) == 2**-23


def compiled(precision: str, capability: int) -> str:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {"p_a": "*fp32", "p_b": "*fp32", "p_c": "*fp32", "PRECISION": "constexpr", "M": "constexpr"}
    source = ASTSource(_dot_kernel, signature=types, constexprs={"PRECISION": precision, "M": 128})
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4}).asm["ttgir"]


def test_triton_compiles_products_as_they_are_modelled():
    """TF32 operands are not converted; in 3xTF32 the larger parts are, the smaller ones not, and c is added last."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    process = subprocess.run([sys.executable, __file__], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.returncode == 0
    codes = json.loads(process.stdout.splitlines()[-1])
    for capability in ("80", "90", "100"):
        one, three = codes[f"tf32 {capability}"], codes[f"tf32x3 {capability}"]
        products = r"(?:tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma) "
        assert len(re.findall(products, one)) == 1
        assert "cvt.rna" not in one
        assert len(re.findall(products, three)) == 3
        assert len(re.findall(r"arith\.subf", three)) == 2
        assert len(re.findall(r"arith\.cmpf uno", three)) == 1
        last = three.rindex("arith.addf")
        assert all(match.start() < last for match in re.finditer(products, three))
        smalls = re.findall(r"(%\w+) = arith\.subf", three)
        assert not any(re.search(rf"cvt\.rna[^\n]*\}} {small}\b", three) for small in smalls)


if __name__ == "__main__":
    print(json.dumps({f"{p} {cc}": compiled(p, cc) for p in ("tf32", "tf32x3") for cc in (80, 90, 100)}))
