"""Files that are there as a whole or not at all."""

import contextlib
import os
from pathlib import Path


def replace(path: Path, data: bytes) -> None:
    """Write `path` so that it holds either what it held before or all of `data`, whatever happens meanwhile.

    A process that is killed may leave `.<name>.part`, which the next call takes for its own.

    Raises:
        OSError: the file cannot be written; `path` is as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()  # gone already where the rename succeeded


def _sync_folder(folder: Path) -> None:
    """The rename itself reaches the disk, on file systems that can say so; either file is a whole one anyway."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
