"""PyTorch's defaults of dtype and device, and its autocast, which a caller may have changed."""

import contextlib
import threading
from collections.abc import Iterator

import torch

from ._torch import autocasting, without_autocast

DTYPE = torch.float32  # of networks and noise; tests of equations set float64
CPU = torch.device("cpu")
_lock = threading.Lock()
_inside, _callers = 0, DTYPE  # how many are inside, and the dtype to be restored after the last


@contextlib.contextmanager
def initial() -> Iterator[None]:
    """The defaults are float32 and the CPU inside, as without `torch.set_default_dtype` and `set_default_device`, and
    no autocast of the caller reaches there. Also a decorator.

    The default dtype is one of the process, so other threads see it too.
    """
    global _inside, _callers
    with _lock:
        if not _inside:
            _callers = torch.get_default_dtype()
            torch.set_default_dtype(DTYPE)
        _inside += 1
    try:
        with contextlib.ExitStack() as modes:
            if torch.get_default_device() != CPU:  # a device that is set costs each call of PyTorch a microsecond
                modes.enter_context(CPU)
            if autocasting():
                modes.enter_context(without_autocast())
            yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                torch.set_default_dtype(_callers)
