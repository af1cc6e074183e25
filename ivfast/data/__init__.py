"""Image data sets as uint8 tensors `[N, C, H, W]`, decoded once, and point sets as float tensors `[N, D]`.

Points are drawn from a fixed seed (`ivfast.data.points`). Digits come with scikit-learn; everything else is read from
the user's disk, in torchvision's layout. Sets of encoded files (CelebA, LSUN, an image folder) are decoded by parallel
workers into a memory-mapped file in `<root>/.ivfast/`, so such a set may be larger than memory.
"""

import difflib
import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _check, _defaults
from .._extra import needs
from . import decoded
from .recipe import DataNotFound, Encoded, Read
from .sources import DATASETS

__all__ = ["DATASETS", "DataNotFound", "Dataset", "load", "same_classes", "stratified", "target_of"]


class Dataset(NamedTuple):
    name: str
    train: Tensor  # uint8 [N, C, H, W], or points: float32 [N, D]
    train_labels: Tensor | None  # int64 [N], −1 if unlabelled
    test: Tensor
    test_labels: Tensor | None
    classes: tuple[str, ...]  # one name per label


@needs("ivfast.data.load")
@_defaults.initial()
def load(
    name: str,
    root: str | Path = "data",
    image_size: int | None = None,
    channels: int | None = None,
    limit: int | None = None,
    *,
    download: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> Dataset:
    """The data set `name`, as square uint8 images on the host, or as points.

    Args:
        name: one of `DATASETS`; LSUN takes its category after a colon, `lsun:church_outdoor`.
        root: the folder that holds it, in torchvision's layout (`root/MNIST/raw`, `root/cifar-10-batches-py`, ...);
            for `folder` the image folder itself; not used by digits.
        image_size: side in pixels, by antialiased bilinear resizing; None keeps the data set's own (64 for file sets).
        channels: 1 (luma) or 3 (grey repeated); None keeps the data set's own.
        limit: at most this many images of each split, drawn once with a fixed seed.
        download: fetch missing files, if torchvision can.
        workers: decoding threads; None means one per core.
        progress: show a progress bar while decoding.

    Raises:
        ValueError: an unknown name, or an invalid size, channel count or limit (points have no size and no channels).
        DataNotFound: the files are not there.

    An image file is shown as a viewer would: upright by its EXIF orientation, transparent pixels on white, greys of 16
    bits scaled to 8 and floats taken to be in [0, 1]. One that cannot be read raises ValueError with its name.

    Splits: for digits, every sixth image is a test image (1,497 and 300); MNIST, CIFAR-10, SVHN, STL-10 and CelebA have
    their own; points, 50,000 and 10,000; LSUN, `val`; a folder uses its `train` and `test` (or `val`, `validation`)
    subfolders, otherwise every tenth image in path order is a test image, or the next one whose class keeps another.
    The subfolders of a split are its classes, unless images lie loose there. CelebA is cropped to the central 140 x 140
    pixels as in S1; other files to their central square.
    """
    family, _, category = name.partition(":")
    if family not in DATASETS:
        near = difflib.get_close_matches(family, DATASETS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"name must be one of {', '.join(DATASETS)}, got {name!r}{hint}")
    check_category(name)
    recipe, root = DATASETS[family], Path(root).expanduser()
    if recipe.size is None and (image_size, channels) != (None, None):
        raise ValueError(f"image_size and channels must be None for points ({name}), got {image_size}, {channels}")
    size = recipe.size if image_size is None else image_size
    channels = recipe.channels if channels is None else channels
    if size is not None:
        _check.count("image_size", size, at_least=4)
    if channels not in (1, 3, None):
        raise ValueError(f"channels must be 1 or 3, got {channels}")
    if limit is not None:
        _check.count("limit", limit, at_least=2)

    shape, cache = (channels, size, size), None
    if recipe.stamp is not None:
        from .pixels import VERSION

        stamp = json.dumps([VERSION, name, size, channels, limit, *recipe.stamp(root, category)])
        key = hashlib.sha256(stamp.encode()).hexdigest()[:12]
        cache = root / ".ivfast" / f"{name.replace(':', '-')}-{channels}x{size}x{size}-{key}.safetensors"
        if cache.is_file():
            return _mapped(name, cache)
    train, train_labels, test, test_labels, classes = recipe.read(root, category, download)
    train, train_labels = _some(train, train_labels, limit)
    test, test_labels = _some(test, test_labels, limit)
    if recipe.size is None:
        return Dataset(name, train, train_labels, test, test_labels, tuple(classes))
    if cache is None:
        return Dataset(name, _fit(train, shape), train_labels, _fit(test, shape), test_labels, tuple(classes))
    return _decoded(name, Read(train, train_labels, test, test_labels, classes), shape, cache, workers, progress)


def check_category(name: str) -> None:
    """Raises ValueError for a category of a data set that has none."""
    family, colon, _ = name.partition(":")
    if colon and family != "lsun":
        raise ValueError(f"only lsun has categories: {family} must be without one, got {name!r}")


def _decoded(
    name: str, read: Read, shape: tuple[int, int, int], cache: Path, workers: int | None, progress: bool
) -> Dataset:
    """The data set in the new file `cache`, or in memory if that cannot be written."""
    images = {"train": read.train, "test": read.test}
    labels = {"train_labels": read.train_labels, "test_labels": read.test_labels}
    labels = {key: value for key, value in labels.items() if value is not None}
    like = {key: (torch.uint8, (len(files.keys), *shape)) for key, files in images.items()}
    like |= {key: (value.dtype, value.shape) for key, value in labels.items()}

    def fill(out):
        for key, value in labels.items():
            out[key].copy_(value)
        for key, files in images.items():
            _decode(files, out[key], workers or os.cpu_count() or 1, f"{name} {key}" if progress else None)

    try:
        with decoded.create(cache, like, {"classes": json.dumps(tuple(read.classes))}) as out:
            fill(out)
    except OSError as error:
        warnings.warn(f"{cache} could not be written, so the next run decodes the images again: {error}", stacklevel=3)
        out = {key: torch.empty(*size, dtype=dtype) for key, (dtype, size) in like.items()}
        fill(out)
        return _dataset(name, out, read.classes)
    return _mapped(name, cache)


def _mapped(name: str, cache: Path) -> Dataset:
    tensors, metadata = decoded.read(cache)
    return _dataset(name, tensors, json.loads(metadata["classes"]))


def _dataset(name: str, tensors: dict[str, Tensor], classes: Iterable[str]) -> Dataset:
    train, test = tensors["train"], tensors["test"]
    return Dataset(name, train, tensors.get("train_labels"), test, tensors.get("test_labels"), tuple(classes))


@_defaults.initial()
def stratified(labels: Tensor, share: float) -> Tensor:
    """Row indices of a share of the images, int64, ascending: the same share of each class, at least one image.

    The draw is fixed: the same rows every time, and the rows of a smaller share are among those of a larger one.

    Args:
        labels: int `[N]`.
        share: in (0, 1].

    Source: S3 Table 3 and section G.2 give the shares, 1 % and 10 %, but not the draw.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, got {share}")
    labels = labels.cpu()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    of_class = (order[labels[order] == label] for label in labels.unique())
    return torch.cat([rows[: max(1, round(share * len(rows)))] for rows in of_class]).sort().values


def target_of(dataset: Dataset, target: str, root: str | Path = "data", *, download: bool = False) -> Dataset:
    """The target domain of adversarial domain adaptation, with the size and channels of the images of `dataset`.

    Args:
        target: "negative", the negatives of `dataset`'s own images, or the name of a data set with the same classes.
        root, download: as for `load`.

    Raises:
        ValueError: no data set of images, or one with other classes.
    """
    if target == "negative":
        return dataset._replace(name=f"negative {dataset.name}", train=255 - dataset.train, test=255 - dataset.test)
    images = [name for name, source in DATASETS.items() if source.size is not None]
    if (family := target.partition(":")[0]) not in images:
        near = difflib.get_close_matches(family, images, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"target must be negative or a data set of images, got {target!r}{hint}")
    _, channels, size, _ = dataset.train.shape
    other = load(target, root, size, channels, download=download)
    same_classes(f"the target {target}", other.classes, dataset.name, dataset.classes)
    return other


def same_classes(what: str, got: Sequence[str], whose: str, wanted: Sequence[str]) -> None:
    """Raises ValueError unless both number the same classes in the same way."""
    if tuple(got) == tuple(wanted):
        return
    first = next((i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), min(len(got), len(wanted)))
    said = [f"{len(names)} classes, from number {first} on {_named(names[first:])}" for names in (wanted, got)]
    raise ValueError(f"{what} must have the classes of {whose}: {said[0]}; got {said[1]}")


def _named(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "none"


def _some(images, labels, limit):
    n = len(images.keys) if isinstance(images, Encoded) else len(images)
    if limit is None or n <= limit:
        return images, labels
    rows = torch.randperm(n, generator=torch.Generator().manual_seed(0))[:limit].sort().values
    labels = None if labels is None else labels[rows]
    if isinstance(images, Encoded):
        return images._replace(keys=[images.keys[i] for i in rows.tolist()]), labels
    return images[rows], labels


def _fit(images: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """uint8 `[N, *shape]`."""
    channels, *size = shape

    def fit(chunk):
        if chunk.shape[1] != channels:
            chunk = chunk.expand(-1, 3, -1, -1) if channels == 3 else _luma(chunk)
        if list(chunk.shape[-2:]) == size:
            return chunk
        from torchvision.transforms.v2 import functional as transforms  # takes seconds to import

        return transforms.resize(chunk, size, antialias=True)

    return torch.cat([fit(chunk) for chunk in images.split(4096)]).contiguous()


def _luma(images: Tensor) -> Tensor:
    """ITU-R BT.601 luma, like Pillow's conversion to grey: `[n, 3, H, W]` to `[n, 1, H, W]`."""
    red, green, blue = images.float().split(1, 1)
    return (0.299 * red + 0.587 * green + 0.114 * blue).round().to(torch.uint8)


def _decode(images: Encoded, out: Tensor, workers: int, title: str | None) -> None:
    """Fill `out`, uint8 `[N, C, S, S]`."""
    from . import pixels

    channels, size = out.shape[1:3]

    def decode(row):
        key = images.keys[row]
        try:
            with images.open(key) as file:
                found = pixels.square(file, channels, size, images.crop)
        except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, DecompressionBombError, ...
            why = str(error).partition("\n")[0] or type(error).__name__
            raise ValueError(f"{key} is not a readable image: {why}") from error
        out[row] = torch.from_numpy(found).view(size, size, channels).permute(2, 0, 1)

    def chunk(rows: Iterable[int]) -> int:
        return sum(1 for row in rows if decode(row) is None)

    from rich.console import Console
    from rich.progress import Progress

    rows = range(len(out))
    with (
        Progress(console=Console(stderr=True), disable=title is None, transient=True) as bar,
        ThreadPoolExecutor(workers) as pool,  # Pillow releases the GIL when it decodes and resizes
    ):
        task = bar.add_task(f"decoding {title}", total=len(rows))
        try:
            for done in pool.map(chunk, [rows[i : i + 64] for i in range(0, len(rows), 64)]):
                bar.advance(task, done)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
