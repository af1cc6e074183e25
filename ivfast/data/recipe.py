"""How a data set is read, and what reading it returns."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor


class DataNotFound(FileNotFoundError):
    """A data set was not found; the message says where it was expected and how to get it."""


class Encoded(NamedTuple):
    """Images still in their file format."""

    keys: Sequence  # one per image
    open: Callable  # key -> PIL image
    crop: int | None = None  # side of the central square; None means the largest one


class Read(NamedTuple):
    train: Tensor | Encoded  # uint8 [N, C, H, W], or points: float32 [N, D]
    train_labels: Tensor | None  # int64 [N]
    test: Tensor | Encoded
    test_labels: Tensor | None
    classes: Sequence[str]


class Source(NamedTuple):
    read: Callable[[Path, str, bool], Read]  # root, category, download
    size: int | None  # None for points
    channels: int | None
    about: str
    stamp: Callable[[Path, str], list] | None = None  # changes when the files do; None: too quick to cache
    labelled: bool = True  # an image folder may be
