"""What the GPU at hand is to a Triton kernel: whose compiler serves it, its memory, and how many programs fill it.

Triton compiles for NVIDIA ("cuda") and, where PyTorch is built for ROCm, for AMD ("hip"); tensors are of the type
`cuda` on both. They differ in precisions of products, in launch options and in the width of a warp.
"""

import functools
from typing import NamedTuple

import torch


class Card(NamedTuple):
    backend: str  # of Triton: "cuda" or "hip"
    architecture: int | str  # 90 for sm_90, or "gfx942"
    shared: int  # bytes of shared memory that a program may have
    processors: int  # multiprocessors or compute units
    warp: int = 32  # threads that run together

    def programs(self, blocks: int) -> int:
        """Enough to fill it with `blocks` programs on each multiprocessor."""
        return blocks * self.processors

    @property
    def wide(self) -> bool:
        """Whether products read operands from shared memory, and there is room for them: wgmma on Hopper, tcgen05 on
        data-centre Blackwell. Consumer Blackwell (sm_12x) has the mma of Ampere, whose operands take registers."""
        return self.backend == "cuda" and self.architecture // 10 in (9, 10) and self.shared >= 200 * 1024

    @property
    def tensor_memory(self) -> bool:
        """Whether sums of products are kept outside the registers."""
        return self.backend == "cuda" and self.architecture // 10 == 10

    def precision(self, name: str) -> str:
        """The precision of float32 products that is at least `name`, tf32 or tf32x3. AMD's matrix units take float32
        itself, and Triton has only a truncating TF32 for one of them."""
        return name if self.backend == "cuda" else "ieee"

    def options(self, options: dict) -> dict:
        """Launch options chosen for warps of 32 threads of an NVIDIA GPU, for this card: as many threads."""
        if self.backend == "cuda":
            return options
        return {k: v for k, v in options.items() if k != "maxnreg"} | {
            "num_warps": max(1, options["num_warps"] * 32 // self.warp)
        }


INTERPRETED = Card("cuda", 100, 227 * 1024, 132)  # has no warps; every shape is allowed


@functools.cache
def card(device: torch.device) -> Card:
    if device.type != "cuda":
        return INTERPRETED
    found = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        architecture, shared = found.gcnArchName.partition(":")[0], found.shared_memory_per_block
        return Card("hip", architecture, shared, found.multi_processor_count, found.warp_size)
    shared = found.shared_memory_per_block_optin
    return Card("cuda", 10 * found.major + found.minor, shared, found.multi_processor_count)


def on(x: torch.Tensor, options: dict) -> dict:
    """The options of a launch on x's card."""
    return card(x.device).options(options)
