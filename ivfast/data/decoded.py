"""Decoded data sets on disk: memory-mapped safetensors files, so that a set may be larger than memory."""

import contextlib
import glob
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from .._extra import needs

try:
    import fcntl
except ModuleNotFoundError:  # Windows, which does not let go of a file that is open
    fcntl = None

with needs("ivfast.data"):
    from safetensors import SafetensorError, safe_open

_NAMES = {torch.uint8: "U8", torch.int64: "I64"}


@contextlib.contextmanager
def create(
    path: Path, like: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str]
) -> Iterator[dict[str, Tensor]]:
    """Yield tensors of these dtypes and shapes to fill; on exit they become the file `path`, after an error no file
    remains.

    Raises:
        OSError: the file cannot be created, or the disk has no room for it.
    """
    header, size = {"__metadata__": dict(metadata)}, 0
    for name, (dtype, shape) in sorted(like.items(), key=lambda item: -item[1][0].itemsize):  # aligned, without gaps
        bytes_ = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [size, size + bytes_]}
        size += bytes_
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    partial = path.with_suffix(f".{os.getpid()}.part")
    with open(partial, "xb") as file:
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                _lock(file)
            file.write(len(text).to_bytes(8, "little") + text)
            file.flush()
            _reserve(file.fileno(), begin + size)
            whole = torch.from_file(str(partial), shared=True, size=begin + size, dtype=torch.uint8)
            parts = {name: whole[slice(*(begin + i for i in header[name]["data_offsets"]))] for name in like}
            yield {name: parts[name].view(dtype).view(*shape) for name, (dtype, shape) in like.items()}
            os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def _sweep(path: Path) -> None:
    """Remove temporary files of `path` left by killed processes; running processes hold a lock on theirs."""
    for partial in path.parent.glob(f"{glob.escape(path.stem)}.*.part"):
        with contextlib.suppress(OSError):
            if fcntl is None:
                partial.unlink()
                continue
            with open(partial, "rb+") as file:
                _lock(file)
                partial.unlink()


def _lock(file: IO[bytes]) -> None:
    """Raises OSError where another process has the lock."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _reserve(file: int, size: int) -> None:
    """Reserve disk space: writing a mapped page without room on the disk would kill the process, so fail earlier."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        os.ftruncate(file, size)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, memory-mapped, and metadata; ValueError for a damaged file."""
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118  not a dict
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and start again") from error
