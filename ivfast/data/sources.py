"""Where each data set is on disk and how it is read: `DATASETS`, the table behind `ivfast.data.load`."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from . import folder, points
from .recipe import DataNotFound, Encoded, Read, Source

STACKED = (60_000, 10_000)  # train and test images of a stacked set
DRAWN = (50_000, 10_000)  # train and test points of a distribution


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
        labelled=False,
    ),
    "lsun": Source(
        _lsun,
        64,
        3,
        "LSUN, one category: lsun:church_outdoor, lsun:bedroom, ...",
        _stamps(lambda root, category: [folder / "data.mdb" for folder in _lsun_folders(root, category)]),
        labelled=False,
    ),
    "folder": Source(folder.read, 64, 3, "your own images: every image file below --root", folder.stamp),
    "stacked-digits": Source(_stacked(_digits), 8, 3, "three digits as colour channels, 1,000 modes (S2)"),
    "stacked-mnist": Source(
        _stacked(_mnist("MNIST")), 28, 3, "three MNIST digits as colour channels, 1,000 modes (S2)"
    ),
    **{name: Source(_points(name), None, None, set_.about, labelled=False) for name, set_ in points.POINTS.items()},
}
