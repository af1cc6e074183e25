"""Where each data set is on disk and how it is read: `DATASETS`, the table behind `ivfast.data.load`."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from . import points

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
STACKED = (60_000, 10_000)  # train and test images of a stacked set
DRAWN = (50_000, 10_000)  # train and test points of a distribution


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


def _digits(root: Path, category: str, download: bool) -> Read:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8)[:, None]  # 0..16 -> 0..255
    labels = torch.from_numpy(digits.target).long()
    test = torch.arange(len(images)) % 6 == 0
    return Read(images[~test], labels[~test], images[test], labels[test], [str(i) for i in range(10)])


def _torchvision(make: Callable, what: str, folder: Path, needs: str, download: bool) -> list:
    """The train and test split that `make()` returns; torchvision's errors become ours."""
    try:
        return make()
    except (RuntimeError, OSError, ImportError) as error:
        if download:
            raise DataNotFound(f"{what} could not be downloaded to {folder.absolute()}: {error}") from error
        if isinstance(error, ImportError):
            raise
        raise DataNotFound(
            f"{what} is not in {folder.absolute()}: expected {needs}, complete and undamaged. "
            "Add --download (download=True) to fetch it, or give the folder that holds it with --root."
        ) from error


def _mnist(kind: str) -> Callable:
    def read(root, category, download):
        from torchvision import datasets

        make = getattr(datasets, kind)
        train, test = _torchvision(
            lambda: [make(root, train=train, download=download) for train in (True, False)],
            kind,
            root / kind / "raw",
            "{train,t10k}-images-idx3-ubyte and {train,t10k}-labels-idx1-ubyte",
            download,
        )
        names = [name.split(" - ")[0] for name in train.classes]
        return Read(train.data[:, None], train.targets.long(), test.data[:, None], test.targets.long(), names)

    return read


def _cifar10(root: Path, category: str, download: bool) -> Read:
    from torchvision.datasets import CIFAR10

    train, test = _torchvision(
        lambda: [CIFAR10(root, train=train, download=download) for train in (True, False)],
        "CIFAR-10",
        root / CIFAR10.base_folder,
        "data_batch_1..5, test_batch and batches.meta",
        download,
    )
    images = [torch.from_numpy(split.data).permute(0, 3, 1, 2) for split in (train, test)]
    return Read(images[0], torch.tensor(train.targets), images[1], torch.tensor(test.targets), train.classes)


def _svhn(root: Path, category: str, download: bool) -> Read:
    from torchvision.datasets import SVHN

    train, test = _torchvision(
        lambda: [SVHN(root, split, download=download) for split in ("train", "test")],
        "SVHN",
        root,
        "train_32x32.mat and test_32x32.mat",
        download,
    )
    images = [torch.from_numpy(split.data) for split in (train, test)]
    labels = [torch.from_numpy(split.labels).long() for split in (train, test)]
    return Read(images[0], labels[0], images[1], labels[1], [str(i) for i in range(10)])


def _stl10(train_split: str) -> Callable:
    def read(root, category, download):
        from torchvision.datasets import STL10

        train, test = _torchvision(
            lambda: [STL10(root, split, download=download) for split in (train_split, "test")],
            "STL-10",
            root / STL10.base_folder,
            "{train,test}_{X,y}.bin and unlabeled_X.bin",
            download,
        )
        images = [torch.from_numpy(split.data) for split in (train, test)]
        labels = [torch.from_numpy(split.labels).long() for split in (train, test)]
        return Read(images[0], labels[0], images[1], labels[1], getattr(train, "classes", ()))

    return read


def _celeba(root: Path, category: str, download: bool) -> Read:
    from PIL import Image
    from torchvision.datasets import CelebA

    folder = root / CelebA.base_folder
    splits = _torchvision(
        lambda: [CelebA(root, split, download=download) for split in ("train", "test")],
        "CelebA",
        folder,
        "img_align_celeba/ and the authors' " + ", ".join(f for *_, f in CelebA.file_list if f.endswith(".txt")),
        download,
    )
    train, test = (
        Encoded([folder / "img_align_celeba" / name for name in split.filename], Image.open, 140) for split in splits
    )
    return Read(train, None, test, None, ())


def _lsun(root: Path, category: str, download: bool) -> Read:
    """Read lmdb directly: torchvision's class writes a pickle of the keys to the current folder."""
    try:
        import lmdb
    except ModuleNotFoundError as error:
        raise DataNotFound("lsun needs the package lmdb: pip install lmdb") from error
    from io import BytesIO

    from PIL import Image

    def split(folder):
        if not (folder / "data.mdb").is_file():
            raise DataNotFound(
                f"LSUN is not in {root.absolute()}: expected {folder.name}/data.mdb. torchvision cannot download it; "
                "fetch a category with github.com/fyu/lsun and select it as lsun:church_outdoor."
            )
        environment = lmdb.open(str(folder), readonly=True, lock=False, readahead=False, meminit=False)
        with environment.begin() as transaction:
            keys = list(transaction.cursor().iternext(values=False))

        def image(key):
            with environment.begin() as transaction:
                return Image.open(BytesIO(transaction.get(key)))

        return Encoded(keys, image)

    train, test = _lsun_folders(root, category)
    return Read(split(train), None, split(test), None, ())


def _lsun_folders(root: Path, category: str) -> tuple[Path, Path]:
    category = category or "church_outdoor"
    return root / f"{category}_train_lmdb", root / f"{category}_val_lmdb"


def _folder(root: Path, category: str, download: bool) -> Read:
    from PIL import Image

    train_folder, test_folder = _folder_splits(root)
    train = _image_files(train_folder)
    test = _image_files(test_folder) if test_folder else train[::10]
    if not test_folder:
        train = [path for i, path in enumerate(train) if i % 10]
    if not train or not test:
        raise DataNotFound(
            f"an image folder must hold at least 2 images, found {len(train) + len(test)} in {train_folder.absolute()} "
            f"({', '.join(SUFFIXES)}). Give the folder that holds them with --root."
        )

    def class_of(path):
        folder = test_folder if test_folder and path.is_relative_to(test_folder) else train_folder
        return path.relative_to(folder).parts[0]

    if any(path.parent in (train_folder, test_folder) for path in train + test):  # not sorted into class folders
        return Read(Encoded(train, Image.open), None, Encoded(test, Image.open), None, ())
    classes = sorted({class_of(path) for path in train})
    unknown = sorted({class_of(path) for path in test} - set(classes))
    if unknown:
        raise ValueError(f"{test_folder} has classes that {train_folder} does not have: {', '.join(unknown)}")
    labels = (torch.tensor([classes.index(class_of(path)) for path in split]) for split in (train, test))
    return Read(Encoded(train, Image.open), next(labels), Encoded(test, Image.open), next(labels), classes)


def _folder_splits(root: Path) -> tuple[Path, Path | None]:
    test = next((root / name for name in ("test", "val", "valid") if (root / name).is_dir()), None)
    return (root / "train", test) if test and (root / "train").is_dir() else (root, None)


def _image_files(folder: Path) -> list[Path]:
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]  # .ivfast/ is our own cache
        found += [Path(parent, name) for name in names if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
    return sorted(found)


def _stacked(base: Callable) -> Callable:
    """Three images of `base` as the three channels of one, which gives 1,000 modes (S2); label 100 a + 10 b + c."""

    def read(root, category, download):
        source = base(root, category, download)

        def stack(images, labels, n, seed):
            rows = torch.randint(len(images), (n, 3), generator=torch.Generator().manual_seed(seed))
            return images[rows, 0], labels[rows] @ torch.tensor([100, 10, 1])

        train, test = (
            stack(images, labels, n, seed)
            for seed, (images, labels, n) in enumerate(
                [
                    (source.train, source.train_labels, STACKED[0]),
                    (source.test, source.test_labels, STACKED[1]),
                ]
            )
        )
        return Read(*train, *test, [f"{i:03d}" for i in range(1000)])

    return read


def _points(name: str) -> Callable:
    def read(root, category, download):
        train, test = (points.load(name, n, seed) for seed, n in enumerate(DRAWN))
        return Read(train, None, test, None, ())

    return read


def _stamps(paths: Callable[[Path, str], Sequence[Path]]) -> Callable[[Path, str], list]:
    def stamp(root, category):
        found = [(str(path), path.stat()) for path in paths(root, category) if path.exists()]
        return [(path, status.st_size, status.st_mtime_ns) for path, status in found]

    return stamp


DATASETS = {
    "digits": Source(_digits, 8, 1, "scikit-learn's handwritten digits, 8x8, embedded: nothing to download"),
    "mnist": Source(_mnist("MNIST"), 28, 1, "MNIST"),
    "fashion-mnist": Source(_mnist("FashionMNIST"), 28, 1, "Fashion-MNIST"),
    "cifar10": Source(_cifar10, 32, 3, "CIFAR-10"),
    "svhn": Source(_svhn, 32, 3, "Street View House Numbers, cropped digits"),
    "stl10": Source(_stl10("train"), 96, 3, "STL-10, the 5,000 labelled training images"),
    "stl10-all": Source(_stl10("train+unlabeled"), 96, 3, "STL-10 with its 100,000 unlabelled images"),
    "celeba": Source(
        _celeba,
        64,
        3,
        "CelebA, central 140x140 pixels (S1)",
        _stamps(lambda root, _: [root / "celeba/list_eval_partition.txt", root / "celeba/img_align_celeba"]),
    ),
    "lsun": Source(
        _lsun,
        64,
        3,
        "LSUN, one category: lsun:church_outdoor, lsun:bedroom, ...",
        _stamps(lambda root, category: [folder / "data.mdb" for folder in _lsun_folders(root, category)]),
    ),
    "folder": Source(
        _folder, 64, 3, "your own images: every image file below --root", _stamps(lambda root, _: _image_files(root))
    ),
    "stacked-digits": Source(_stacked(_digits), 8, 3, "three digits as colour channels, 1,000 modes (S2)"),
    "stacked-mnist": Source(
        _stacked(_mnist("MNIST")), 28, 3, "three MNIST digits as colour channels, 1,000 modes (S2)"
    ),
    **{name: Source(_points(name), None, None, set_.about) for name, set_ in points.POINTS.items()},
}
