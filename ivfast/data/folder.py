"""An image folder: which of its files are images, and to which split and class they belong."""

import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from .recipe import DataNotFound, Encoded, Read

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
TRAIN = ("train", "training")
TEST = ("test", "testing", "val", "valid", "validation")  # the first that is there


def read(root: Path, category: str, download: bool) -> Read:
    """Raises DataNotFound where images are missing, ValueError for a layout that can be read in two ways."""
    from PIL import Image

    if not root.is_dir():
        raise DataNotFound(_too_few(root, 0))
    train_folder, test_folder = splits(root)
    train, test = _images(train_folder), _images(test_folder) if test_folder else []
    names = _classes(train_folder, train)
    if test_folder is None:
        held_out = _held_out(names or [""] * len(train))
        test, test_names = [train[i] for i in held_out], names and [names[i] for i in held_out]
        kept = sorted(set(range(len(train))).difference(held_out))
        train, names = [train[i] for i in kept], names and [names[i] for i in kept]
    elif not test:
        raise DataNotFound(
            f"{test_folder} holds no images; fill it, or remove it to test on every tenth image of {train_folder}"
        )
    else:
        test_names = names and _classes(test_folder, test)
    if not train and test_folder:
        raise DataNotFound(f"{train_folder} holds no images ({', '.join(SUFFIXES)})")
    if not train or not test:
        raise DataNotFound(_too_few(train_folder, len(train) + len(test)))
    if names is None:
        return Read(Encoded(train, Image.open), None, Encoded(test, Image.open), None, ())
    if test_names is None:
        raise ValueError(f"{test_folder} must be sorted into class folders like {train_folder}, got loose images")
    classes = sorted(set(names))
    unknown = sorted(set(test_names).difference(classes))
    if unknown:
        raise ValueError(f"{test_folder} has classes that {train_folder} does not have: {', '.join(unknown)}")
    number = {name: i for i, name in enumerate(classes)}
    labels = [torch.tensor([number[name] for name in given]) for given in (names, test_names)]
    return Read(Encoded(train, Image.open), labels[0], Encoded(test, Image.open), labels[1], classes)


def stamp(root: Path, category: str) -> list:
    """What changes when the images do. Warns of what is left out."""
    if not root.is_dir():
        return []
    files = sorted(_files(root))
    images = [path for path in files if _is_image(path)]
    others = Counter(path.suffix.lower() or "no suffix" for path in files if not _is_image(path))
    left_out = [f"{n:,} files ({suffix})" for suffix, n in others.most_common()]
    train_folder, test_folder = splits(root)
    used = [folder for folder in (train_folder, test_folder) if folder is not None]
    unused = [path for path in images if not any(path.is_relative_to(folder) for folder in used)]
    places = Counter(path.relative_to(root).parts[0] if path.parent != root else "." for path in unused)
    left_out += [f"{n:,} images in {root / place}" for place, n in places.items()]
    if left_out:
        warnings.warn(f"{root}: left out {', '.join(left_out)}; images end in {', '.join(SUFFIXES)}", stacklevel=4)
    status = [(path, path.stat()) for path in images if path.exists()]
    split = [str(train_folder), str(test_folder)]  # an empty folder changes them too
    return [split, *((str(path), found.st_size, found.st_mtime_ns) for path, found in status)]


def splits(root: Path) -> tuple[Path, Path | None]:
    """The folders of the training and of the test images; None where training images are to be held out."""
    folders = sorted(Path(entry.path) for entry in _entries(root) if entry.is_dir())
    trains, tests = ([f for name in names for f in folders if f.name.lower() == name] for names in (TRAIN, TEST))
    for one, other in zip([*trains, *tests], [*trains, *tests][1:], strict=False):
        if one.name.lower() == other.name.lower() or (one in trains and other in trains):
            raise ValueError(f"{root} holds two folders for one split: {one.name} and {other.name}")
    others = [folder.name for folder in folders if folder not in trains + tests]
    if not trains:
        if len(tests) > 1 and not others:
            raise ValueError(f"{root} holds {' and '.join(f.name for f in tests)}, but no folder train")
        return root, None
    (train,) = trains
    if tests:
        return train, next((folder for folder in tests if _images(folder)), tests[0])
    if others and any(entry.is_dir() for entry in _entries(train)):
        raise ValueError(
            f"{train} is sorted into class folders, and beside it is {', '.join(others)}: call the folder of the test "
            "images test or val, or take the others away"
        )
    return (root, None) if others else (train, None)  # train may be the name of a class


def _too_few(folder: Path, n: int) -> str:
    if n > 1:
        return f"{folder} holds no class with two images, one to train and one to test"
    return (
        f"an image folder must hold at least 2 images, found {n} in {folder.absolute()} ({', '.join(SUFFIXES)}). "
        "Give the folder that holds them with --root."
    )


def _classes(folder: Path, images: Sequence[Path]) -> list[str] | None:
    """The class of each image: the name of the subfolder that it is in. None for images that are not sorted."""
    loose = next((path for path in images if path.parent == folder), None)
    names = [path.relative_to(folder).parts[0] for path in images if path.parent != folder]
    if loose is None:
        return names
    classes = sorted(set(names))
    if len(classes) > 1:
        raise ValueError(
            f"{loose} lies beside the folders {', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''}: move it "
            "into one of them, which are classes, or move all images into one folder to do without classes"
        )
    return None


def _held_out(names: Sequence[str]) -> list[int]:
    """Every tenth image in path order, or the next one whose class keeps another."""
    left, rows = Counter(names), []
    for start in range(0, len(names), 10):
        row = next((i for i in range(start, min(start + 10, len(names))) if left[names[i]] > 1), None)
        if row is not None:
            left[names[row]] -= 1
            rows.append(row)
    return rows


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in _files(folder) if _is_image(path))


def _is_image(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES)


def _files(folder: Path, above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Every file below, also through links, but for a link to a folder that it is in."""
    here = os.path.realpath(folder)
    if here in above:
        return
    for entry in _entries(folder):
        if entry.is_dir():
            yield from _files(Path(entry.path), above | {here})
        else:
            yield Path(entry.path)


def _entries(folder: Path) -> list[os.DirEntry]:
    """Without hidden ones, such as our own cache."""
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.name.startswith(".")]
