"""What a GPU must have for a kernel: the shared memory of a block, and an image for its architecture."""

import functools
import importlib
import re

import torch

OLDEST = (8, 0)  # of CUDA C++, for its warp reductions, and of Triton


@functools.cache
def shared_memory(index: int | None) -> int:
    """The most bytes of shared memory that a block may have on a GPU."""
    return torch.cuda.get_device_properties(index).shared_memory_per_block_optin


def unserved(implementation: str, index: int | None) -> str | None:
    """Why `triton` or `cuda` does not serve a GPU, by default the current one; None if it does, or none is in sight."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_capability(index)
    has = f"{torch.cuda.get_device_name(index)} has {found[0]}.{found[1]}"
    if implementation == "triton":
        return None if found >= OLDEST else f"Triton serves GPUs of compute capability 8.0 and above, and {has}"
    built = _built()
    if built is None or any(_runs(word, found) for word in re.split(r"[;\s]+", built)):
        return None
    return f"ivfast._cuda was built for compute capability {built}, and {has}"


def _built() -> str | None:
    """The architectures that ivfast._cuda was built for, as in TORCH_CUDA_ARCH_LIST."""
    try:
        return importlib.import_module("ivfast._build").BUILT.get("_cuda")
    except ModuleNotFoundError:  # not installed by setup.py
        return None


def _runs(word: str, found: tuple[int, int]) -> bool:
    """Whether code for an architecture, "9.0", "9.0a", "10.0f" or "10.0+PTX", runs on a GPU. True for other words."""
    parts = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", word)
    if parts is None:
        return True
    major, minor, suffix, ptx = int(parts[1]), int(parts[2]), parts[3], parts[4]
    if suffix == "a":
        return found == (major, minor)
    return (found[0] == major and found[1] >= minor) or bool(ptx and not suffix and found >= (major, minor))
