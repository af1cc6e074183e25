"""Every Triton kernel compiled ahead of time for other GPUs: within their shared memory, and for NVIDIA's without spills
and with tensor cores for products.

Each kernel's first variant is compiled for every architecture of NVIDIA's, the others for one of those that is drawn,
and the smallest for one of AMD's, so that each commit has other pairs. IVFAST_TARGETS=all compiles every variant for
every architecture of NVIDIA's and the smallest ones for every one of AMD's, as .ci/versions does.
"""

import json
import math
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
from cubin_variants import AMD, CARDS, TARGETS, Variant, variants

REPOSITORY = Path(__file__).resolve().parents[1]
TRITON = tuple(int(part) for part in version("triton").split(".")[:2])
REGISTERS = 160 if TRITON >= (3, 8) else 176  # at most, per thread: 128 with Triton 3.9, 170 with 3.6

# Bytes of a thread's stack. The ptxas of Triton 3.8 puts up to four registers there, reloaded once in a tile of pairs at
# the most: 4 loads among the 2,300 instructions of selection._count_kernel's loop at D = 512 on sm_80, 2 among the 1,430
# of svgd_bridge's step on sm_90, and 1 in as_distance._pack_kernel's loop on sm_90.
SPILLED = 16 if TRITON >= (3, 8) else 48  # of Triton 3.7, twelve registers of an mmd kernel with all 255 on sm_90
# On sm_120 the ptxas of Triton 3.9 takes up to 162 registers for the same kernels, and puts up to ten there: of mmd's
# gradient in 512 dimensions, with all 255, and eight of multi_js, which may have 128.
SPILLED_120, REGISTERS_120 = max(SPILLED, 40), 168
SHARES = 2  # processes
# bytes available to a program; the code for sm_80 has to fit where sm_86 runs it
SHARED = {target: card.shared for target, card in CARDS.items()} | {80: CARDS[86].shared}


def compiled(variant: Variant, target: int | str):
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    card = CARDS[target]
    module, name = variant.kernel.split(".")
    kernel = getattr(importlib.import_module(f"ivfast.kernels.{module}"), name)
    signature, constants, attributes = {}, {}, {}
    for i, (argument, text) in enumerate(zip(kernel.arg_names, variant.types.split(), strict=True)):
        if text in ("None", "ieee", "tf32", "tf32x3") or text.isdigit():
            value = None if text == "None" else int(text) if text.isdigit() else card.precision(text)
            signature[argument], constants[argument] = "constexpr", value
        else:
            signature[argument], _, divisor = text.partition(":")
            if divisor:
                attributes[i,] = [["tt.divisibility", int(divisor)]]
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, GPUTarget(card.backend, target, card.warp), card.options(variant.options))


def compile_variant(variant: Variant, target: int | str) -> dict[str, int]:
    """Bytes of shared memory and, of a cubin, registers, bytes of stack and local memory (both used for spills), and,
    where products are expected, the number of matrix-product instructions."""
    found = compiled(variant, target)
    return {"SHARED": found.metadata.shared} | resources(found.asm.get("cubin"), variant.products)


def resources(cubin: bytes | None, products: bool) -> dict[str, int]:
    import triton

    if cubin is None:
        return {}

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


def chosen(share: int, seed: int) -> list[tuple[Variant, int | str]]:
    """The variants of a share of the kernels, and the architectures that each is compiled for."""
    draw, found, seen, smallest = random.Random(seed), [], set(), {}
    every = os.environ.get("IVFAST_TARGETS") == "all"
    for variant in variants():
        whole = variant.kernel not in seen or every or not variant.targets
        seen.add(variant.kernel)
        found.append((variant, variant.targets if whole else (draw.choice(variant.targets),)))
        if 80 in variant.targets:  # its tiles, like AMD's, are not `wide`
            size = sum(int(text) for text in variant.types.split() if text.isdigit())
            smallest[variant.kernel] = min((size, variant), smallest.get(variant.kernel, (math.inf,)))
    assert smallest.keys() == seen
    found += [(variant, AMD if every else (draw.choice(AMD),)) for _, variant in smallest.values()]
    return [(variant, target) for variant, targets in found[share::SHARES] for target in targets]


def compile_share(share: int, seed: int) -> list[dict]:
    return [
        {"variant": f"{v.kernel}({v.types})", "target": target, "products": v.products, **compile_variant(v, target)}
        | {"limit": v.options.get("maxnreg", max(REGISTERS, REGISTERS_120 * (target == 120)))}
        for v, target in chosen(share, seed)
    ]


def without_tensor_cores(row: dict) -> bool:
    """Float64 is multiplied without them on sm_120, and by Triton 3.6 and 3.7 on sm_100."""
    targets = (100, 120) if TRITON < (3, 8) else (120,)
    return row["target"] in targets and row["variant"].startswith(("fld.", "inverse_root."))


@pytest.mark.parametrize("share", range(SHARES))
def test_every_triton_kernel_compiles_ahead_of_time_without_spills(share):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, str(share), str(torch.initial_seed())]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=REPOSITORY)
    assert process.returncode == 0
    rows = json.loads(process.stdout.splitlines()[-1])
    assert {row["target"] for row in rows} > set(TARGETS)
    wrong = [r for r in rows if r["SHARED"] > SHARED[r["target"]]]
    cubins = [r for r in rows if r["target"] in TARGETS]
    wrong += [r for r in cubins if r["STACK"] > (SPILLED_120 if r["target"] == 120 else SPILLED) or r["LOCAL"]]
    wrong += [r for r in cubins if not r["products"] and r["REG"] > r["limit"]]
    wrong += [r for r in cubins if r["products"] and r["MMA"] == 0 and not without_tensor_cores(r)]
    assert not wrong, "\n".join(map(str, wrong))


if __name__ == "__main__":
    print(json.dumps(compile_share(*map(int, sys.argv[1:]))))
