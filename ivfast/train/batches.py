"""Batches of a data set that lives on the device: a permutation per epoch, the last partial batch dropped."""

import torch
from torch import Tensor


def as_images(x: Tensor) -> Tensor:
    """uint8 0..255 -> float in [-1, 1]; floating tensors pass through (points of a 2-D data set)."""
    return x.float().div_(127.5).sub_(1) if x.dtype == torch.uint8 else x


class Batches:
    """Endless batches of `images [N, ...]`, and of `labels [N]` where given, in an order that `seed` alone decides.

    Raises:
        ValueError: fewer images than one batch, or labels of another number.
    """

    def __init__(self, images: Tensor, batch_size: int, seed: int, labels: Tensor | None = None):
        if len(images) < batch_size:
            raise ValueError(
                f"batch_size must be at most the number of images, {len(images)}, got {batch_size}: "
                "the last partial batch of an epoch is dropped, so none would be left"
            )
        if labels is not None and len(labels) != len(images):
            raise ValueError(f"labels must match images: {len(images)}, got {len(labels)}")
        self.images, self.labels, self.batch_size = images, labels, batch_size
        self.per_epoch = len(images) // batch_size
        self.position = self.per_epoch  # batches taken of this epoch
        self.generator = torch.Generator().manual_seed(seed)  # on the CPU: one order on every device
        self.order = torch.empty(0, dtype=torch.int64)
        self.rows = torch.zeros(batch_size, dtype=torch.int64, device=images.device)  # of the batch; stays in place

    def next(self) -> tuple[Tensor, ...]:
        """Turn to the next batch: `(x,)` or `(x, labels)`, x float `[B, ...]`."""
        self.turn()
        return self.gather()

    def turn(self) -> None:
        """Choose the rows of the next batch."""
        if self.position == self.per_epoch:
            self.order = torch.randperm(len(self.images), generator=self.generator).to(self.images.device)
            self.position = 0
        start = self.position * self.batch_size
        self.rows.copy_(self.order[start : start + self.batch_size])
        self.position += 1

    def gather(self) -> tuple[Tensor, ...]:
        """The batch of the chosen rows."""
        x = as_images(self.images.index_select(0, self.rows))
        return (x,) if self.labels is None else (x, self.labels.index_select(0, self.rows))

    def state(self) -> dict[str, Tensor]:
        return {
            "generator": self.generator.get_state(),
            "order": self.order,
            "position": torch.tensor(self.position),
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Raises ValueError where the state is of a data set of another size."""
        order = state["order"]
        if len(order) not in (0, len(self.images)):
            raise ValueError(f"its data order is of {len(order)} images, not {len(self.images)}")
        self.generator.set_state(state["generator"].cpu())
        self.order = order.to(self.images.device)
        self.position = int(state["position"])
