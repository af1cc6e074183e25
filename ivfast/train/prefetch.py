"""The next batches of images that stay on the host, gathered by a thread while the device computes."""

import queue
import threading
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

AHEAD = 2  # finished batches that wait; one hides a gather behind a step, two also a slow read


class Prefetch:
    """Batches `images[rows()]`, one per call of `rows`, in that order.

    `images` may be memory-mapped: the thread, not the step, waits for the disk. `close()` ends the thread, as do the
    last reference to this object and the end of the program. What the thread raises, `next` raises.
    """

    def __init__(self, images: Tensor, rows: Callable[[], Tensor], *, pin: bool):
        self.queue, stop = queue.Queue(AHEAD), threading.Event()
        arguments = images, rows, pin, self.queue, stop
        thread = threading.Thread(target=_gather, args=arguments, name="ivfast-prefetch", daemon=True)
        self.close = weakref.finalize(self, _end, thread, self.queue, stop)
        thread.start()

    def next(self) -> Tensor:
        """`[B, ...]` on the host, page-locked where `pin`."""
        batch = self.queue.get()
        if isinstance(batch, BaseException):
            self.queue.put(batch)  # for a further call, since the thread is gone
            raise batch
        return batch


def _gather(images: Tensor, rows: Callable[[], Tensor], pin: bool, out: queue.Queue, stop: threading.Event) -> None:
    # no reference to the Prefetch here, or it would live as long as its thread
    try:
        while not stop.is_set():
            take = rows()
            # page-locked blocks come from PyTorch's cache, which gives none out again before its copy is done
            batch = torch.empty(len(take), *images.shape[1:], dtype=images.dtype, device="cpu", pin_memory=pin)
            out.put(torch.index_select(images, 0, take, out=batch))
    except BaseException as error:
        out.put(error)


def _end(thread: threading.Thread, out: queue.Queue, stop: threading.Event) -> None:
    stop.set()
    while not out.empty():  # room for the put in which the thread may wait, its last one
        out.get()
    if thread is not threading.current_thread():  # the garbage collector may run there
        thread.join()
