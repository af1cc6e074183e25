"""Batches of a data set, on the device: gathered, mirrored and normalised there, or prefetched from the host."""

import math
import os

import torch
from torch import Tensor

from .prefetch import Prefetch


def as_images(x: Tensor) -> Tensor:
    """uint8 0..255 -> float in [-1, 1]; floating tensors pass through (points of a 2-D data set)."""
    return x.float().div_(127.5).sub_(1) if x.dtype == torch.uint8 else x


def fits(images: Tensor, device: torch.device, budget: float | None) -> bool:
    """Whether images of the host may live on `device`, in `budget` GiB.

    None is half of what is free on a GPU, and half of the machine's memory on a CPU, where images may be a mapped file.
    """
    if budget is not None:
        return images.nbytes <= budget * 2**30
    if device.type == "cuda":
        return images.nbytes <= torch.cuda.mem_get_info(device)[0] / 2
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else math.inf
    return images.nbytes <= memory / 2


class Order:
    """The rows of each batch: a permutation of n images per epoch, the last partial batch dropped.

    With `flip`, each image of an epoch is mirrored with probability ½: row n + i is image i mirrored.
    """

    def __init__(self, n: int, batch_size: int, seed: int, device: torch.device | str = "cpu", *, flip: bool = False):
        self.n, self.batch_size, self.device, self.flip = n, batch_size, device, flip
        self.per_epoch = n // batch_size
        self.position = self.per_epoch  # batches taken of this epoch
        self.generator = torch.Generator().manual_seed(seed)  # on the CPU: one order on every device
        self.rows = torch.empty(0, dtype=torch.int64)

    def next(self) -> Tensor:
        """`[B]` on `device`."""
        if self.position == self.per_epoch:
            rows = torch.randperm(self.n, generator=self.generator)
            if self.flip:
                rows += self.n * torch.randint(2, (self.n,), generator=self.generator)
            self.rows, self.position = rows.to(self.device), 0
        start = self.position * self.batch_size
        self.position += 1
        return self.rows[start : start + self.batch_size]

    def ahead(self) -> "Order":
        """A copy on the CPU, which gives the rows that this one will give."""
        other = Order(self.n, self.batch_size, 0, flip=self.flip)
        other.load(self.state())
        return other

    def state(self) -> dict[str, Tensor]:
        return {
            "generator": self.generator.get_state(),
            "order": self.rows,
            "position": torch.tensor(self.position),
        }

    def check(self, state: dict[str, Tensor], step: int) -> None:
        """Raises ValueError for a state, of the right shapes and dtypes, that is not one after `step` batches."""
        check_generator("batches/generator", state["generator"])
        rows, position = state["order"], int(state["position"])
        last = (2 if self.flip else 1) * self.n - 1
        lowest, highest = int(rows.min()), int(rows.max())
        if not 0 <= lowest <= highest <= last:
            raise ValueError(f"the tensor batches/order must be of rows 0..{last}, it is of {lowest}..{highest}")
        if not bool((torch.bincount(rows % self.n, minlength=self.n) == 1).all()):
            raise ValueError(f"the tensor batches/order must have each of {self.n} images once, it repeats some")
        expected = (step - 1) % self.per_epoch + 1
        if position != expected:
            raise ValueError(f"the tensor batches/position must be {expected} after step {step}, it is {position}")

    def load(self, state: dict[str, Tensor]) -> None:
        self.generator.set_state(state["generator"].cpu())
        self.rows, self.position = state["order"].to(self.device), int(state["position"])


def check_generator(name: str, state: Tensor) -> None:
    """Raises ValueError for bytes that are not the state of a generator."""
    try:
        torch.Generator().set_state(state)
    except RuntimeError as error:
        raise ValueError(f"the tensor {name} is not the state of a generator ({error})") from error


class Batches:
    """Endless batches of `images [N, ...]`, and of `labels [N]` where given, in an order that `seed` alone decides.

    Args:
        flip: mirror images `[N, C, H, W]` from left to right, each with probability ½ in each epoch.
        stream_to: leave the images on the host and bring the batches, the same ones, to this device, prefetched by a
            thread until `close`; None gathers them where the images are.

    Raises:
        ValueError: fewer images than one batch, labels of another number, or points to mirror.
    """

    def __init__(
        self,
        images: Tensor,
        batch_size: int,
        seed: int,
        labels: Tensor | None = None,
        *,
        flip: bool = False,
        stream_to: torch.device | None = None,
    ):
        if len(images) < batch_size:
            raise ValueError(
                f"batch_size must be at most the number of images, {len(images)}, got {batch_size}: "
                "the last partial batch of an epoch is dropped, so none would be left"
            )
        if labels is not None and len(labels) != len(images):
            raise ValueError(f"labels must match images: {len(images)}, got {len(labels)}")
        if flip and images.dim() != 4:
            raise ValueError(f"flip needs images [N, C, H, W], got shape {tuple(images.shape)}")
        self.stream_to, self.prefetch = stream_to, None
        device = images.device if stream_to is None else stream_to
        self.images, self.labels = images, None if labels is None else labels.to(device)
        self.order = Order(len(images), batch_size, seed, device, flip=flip)
        self.per_epoch = self.order.per_epoch
        # the batch's rows, and its images where they are streamed; they stay in place
        self.rows = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.streamed = None if stream_to is None else images.new_empty(batch_size, *images.shape[1:], device=device)

    def next(self) -> tuple[Tensor, ...]:
        """Turn to the next batch: `(x,)` or `(x, labels)`, x float `[B, ...]`."""
        self.turn()
        return self.gather()

    def turn(self) -> None:
        """Choose the rows of the next batch, and bring its images where they are streamed."""
        if self.stream_to is not None and self.prefetch is None:
            n, ahead = self.order.n, self.order.ahead()
            pin = self.stream_to.type == "cuda"
            self.prefetch = Prefetch(self.images, lambda: ahead.next() % n, pin=pin)
        self.rows.copy_(self.order.next())
        if self.prefetch is not None:
            self.streamed.copy_(self.prefetch.next(), non_blocking=True)

    def gather(self) -> tuple[Tensor, ...]:
        """The batch of the chosen rows."""
        n, flip = self.order.n, self.order.flip
        rows = self.rows % n if flip else self.rows
        x = self.images.index_select(0, rows) if self.streamed is None else self.streamed.clone()
        if flip:
            x = torch.where((self.rows >= n)[:, None, None, None], x.flip(-1), x)
        x = as_images(x)
        return (x,) if self.labels is None else (x, self.labels.index_select(0, rows))

    def state(self) -> dict[str, Tensor]:
        """What has been taken, not what has been prefetched."""
        return self.order.state()

    def load(self, state: dict[str, Tensor]) -> None:
        self.close()
        self.order.load(state)

    def close(self) -> None:
        """End the thread that prefetches; the next batch would start it anew."""
        if self.prefetch is not None:
            self.prefetch.close()
            self.prefetch = None
