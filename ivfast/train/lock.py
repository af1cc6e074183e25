"""One process at a time in the folder of a run: an advisory lock that ends with its process and names it."""

import contextlib
import errno
import os
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, which has msvcrt
    fcntl = None

NAME = ".lock"
_BUSY = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
_WITHOUT = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)
_BYTE = 1 << 30  # Windows locks bytes and lets nobody read them: one behind the text


class RunInUse(RuntimeError):
    """Another process trains in the folder. Attributes: out, holder (the other process, as a phrase)."""

    def __init__(self, out: Path, holder: str):
        self.out, self.holder = out, holder
        super().__init__(f"{out} is in use by {holder}: wait for it, stop it, or choose another folder")


@contextlib.contextmanager
def held(out: Path) -> Iterator[None]:
    """Nobody else holds the folder `out` inside; it is made where it does not exist.

    Raises:
        RunInUse: somebody does.
    """
    out.mkdir(parents=True, exist_ok=True)
    handle = os.open(out / NAME, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            _lock(handle)
        except OSError as error:
            if error.errno in _BUSY:
                raise RunInUse(out, _holder(handle)) from None
            if error.errno not in _WITHOUT:
                raise
            warnings.warn(
                f"the file system of {out} has no locks ({error}): nothing keeps another process out of this folder",
                stacklevel=2,
            )
        os.ftruncate(handle, 0)
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()} since {now}".encode())
        yield
    finally:
        _unlock(handle)
        os.close(handle)


def _holder(handle: int) -> str:
    os.lseek(handle, 0, os.SEEK_SET)
    text = os.read(handle, 300).decode(errors="replace")
    return text or "another process"  # which has only just begun


def _lock(handle: int) -> None:
    if fcntl is not None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        import msvcrt

        os.lseek(handle, _BYTE, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        os.lseek(handle, 0, os.SEEK_SET)


def _unlock(handle: int) -> None:
    """At once, where a child of this process has inherited the handle; otherwise closing it would do."""
    with contextlib.suppress(OSError):  # that was not locked
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_UN)
        else:
            import msvcrt

            os.lseek(handle, _BYTE, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_UNLCK, 1)
