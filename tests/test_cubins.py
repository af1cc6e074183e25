"""Every Triton kernel compiled ahead of time for other GPUs: no spills, and tensor cores for products.

Each kernel's first variant is compiled for every architecture, and the others for one that is drawn, so that each
commit has other pairs. IVFAST_TARGETS=all compiles every variant for every architecture, as .ci/versions does.
"""

import json
import os
import random
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from cubin_variants import TARGETS, Variant, variants

REPOSITORY = Path(__file__).resolve().parents[1]
TRITON = tuple(int(part) for part in version("triton").split(".")[:2])
REGISTERS = 160 if TRITON >= (3, 8) else 176  # at most, per thread: 128 with Triton 3.9, 170 with 3.6

# Bytes of a thread's stack. The ptxas of Triton 3.8 puts up to four registers there, reloaded once in a tile of pairs at
# the most: 4 loads among the 2,300 instructions of selection._count_kernel's loop at D = 512 on sm_80, 2 among the 1,430
# of svgd_bridge's step on sm_90, and 1 in as_distance._pack_kernel's loop on sm_90.
SPILLED = 16 if TRITON >= (3, 8) else 48  # of Triton 3.7, twelve registers of an mmd kernel with all 255 on sm_90
SHARES = 2  # processes
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes available to a program


def compile_variant(variant: Variant, capability: int) -> dict[str, int]:
    """A cubin's registers, bytes of stack and local memory (both used for spills) and of shared memory, and, where
    products are expected, the number of matrix-product instructions."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = variant.kernel.split(".")
    kernel = getattr(importlib.import_module(f"ivfast.kernels.{module}"), name)
    signature, constants, attributes = {}, {}, {}
    for i, (argument, text) in enumerate(zip(kernel.arg_names, variant.types.split(), strict=True)):
        if text in ("None", "ieee", "tf32", "tf32x3") or text.isdigit():
            value = None if text == "None" else int(text) if text.isdigit() else text
            signature[argument], constants[argument] = "constexpr", value
        else:
            signature[argument], _, divisor = text.partition(":")
            if divisor:
                attributes[i,] = [["tt.divisibility", int(divisor)]]
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=variant.options)
    return resources(compiled.asm["cubin"], variant.products) | {"SHARED": compiled.metadata.shared}


def resources(cubin: bytes, products: bool) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, *code = (  # disassembling takes as long as compiling
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", *["-sass"] * products)
        )
    (line,) = re.findall(r"REG:.*", usage)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", line)}
    for text in code:
        found["MMA"] = len(re.findall(r"\b(?:HMMA|DMMA|HGMMA|UTC[A-Z]*MMA)\b", text))
    return found


def chosen(share: int, seed: int) -> list[tuple[Variant, int]]:
    """The variants of a share of the kernels, and the architectures that each is compiled for."""
    draw, found, seen = random.Random(seed), [], set()
    for variant in variants():
        whole = variant.kernel not in seen or os.environ.get("IVFAST_TARGETS") == "all" or not variant.targets
        seen.add(variant.kernel)
        found.append((variant, variant.targets if whole else (draw.choice(variant.targets),)))
    return [(variant, cc) for variant, targets in found[share::SHARES] for cc in targets]


def compile_share(share: int, seed: int) -> list[dict]:
    return [
        {"variant": f"{v.kernel}({v.types})", "sm": cc, "products": v.products, **compile_variant(v, cc)}
        | {"limit": v.options.get("maxnreg", REGISTERS)}
        for v, cc in chosen(share, seed)
    ]


def without_tensor_cores(row: dict) -> bool:
    """Triton 3.6 and 3.7 multiply float64 on sm_100 without them."""
    return TRITON < (3, 8) and row["sm"] == 100 and row["variant"].startswith(("fld.", "inverse_root."))


@pytest.mark.parametrize("share", range(SHARES))
def test_every_triton_kernel_compiles_ahead_of_time_without_spills(share):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, str(share), str(torch.initial_seed())]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=REPOSITORY)
    assert process.returncode == 0
    rows = json.loads(process.stdout.splitlines()[-1])
    assert {row["sm"] for row in rows} == set(TARGETS)
    wrong = [r for r in rows if r["STACK"] > SPILLED or r["LOCAL"] or r["SHARED"] > SHARED[r["sm"]]]
    wrong += [r for r in rows if not r["products"] and r["REG"] > r["limit"]]
    wrong += [r for r in rows if r["products"] and r["MMA"] == 0 and not without_tensor_cores(r)]
    assert not wrong, "\n".join(map(str, wrong))


if __name__ == "__main__":
    print(json.dumps(compile_share(*map(int, sys.argv[1:]))))
