"""Layouts of image folders: the right classes and splits, or an error that says what is wrong."""

import os

import pytest
import torch
from PIL import Image
from processes import passes

from ivfast.data import DataNotFound, load


@pytest.fixture
def fill():
    """Images of all one grey, a different one each, so that an image tells which file it was."""
    greys = iter(range(1, 250))

    def fill(folder, n=10):
        folder.mkdir(parents=True, exist_ok=True)
        found = [next(greys) for _ in range(n)]
        for i, grey in enumerate(found):
            Image.new("L", (4, 4), grey).save(folder / f"{i:02}.png")
        return found

    return fill


def of(root):
    return load("folder", root, 4, progress=False)


def greys(images):
    return images[:, 0, 0, 0].tolist()


def test_train_without_test_holds_out_each_tenth(tmp_path, fill):
    a, b = (fill(tmp_path / "train" / name) for name in "ab")
    dataset = of(tmp_path)
    assert dataset.classes == ("a", "b")
    assert greys(dataset.test) == [a[0], b[0]]
    assert greys(dataset.train) == a[1:] + b[1:]
    assert dataset.train_labels.tolist() == [0] * 9 + [1] * 9


@pytest.mark.parametrize(("train", "test"), [("train", "validation"), ("Train", "Test"), ("training", "VAL")])
def test_names_of_splits(tmp_path, fill, train, test):
    wanted = {split: [*fill(tmp_path / split / "a", 3), *fill(tmp_path / split / "b", 3)] for split in (train, test)}
    dataset = of(tmp_path)
    assert dataset.classes == ("a", "b")
    assert greys(dataset.train) == wanted[train]
    assert greys(dataset.test) == wanted[test]
    assert dataset.test_labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_an_empty_test_folder(tmp_path, fill):
    fill(tmp_path / "train" / "a")
    assert len(of(tmp_path).test) == 1  # decoded now, and yet noticed
    (tmp_path / "test").mkdir()
    with pytest.raises(DataNotFound, match=r"test holds no images; fill it, or remove it to test on every tenth image"):
        of(tmp_path)
    val = fill(tmp_path / "val" / "a", 2)
    assert greys(of(tmp_path).test) == val
    (tmp_path / "other" / "train").mkdir(parents=True)
    fill(tmp_path / "other" / "test", 2)
    with pytest.raises(DataNotFound, match=r"train holds no images \(\.png, "):
        of(tmp_path / "other")


def test_a_class_of_one_image_is_trained_on(tmp_path, fill):
    a, b = fill(tmp_path / "a", 1), fill(tmp_path / "b", 12)
    dataset = of(tmp_path)
    assert dataset.classes == ("a", "b")
    assert greys(dataset.test) == [b[0], b[9]]  # instead of a's; the eleventh
    assert greys(dataset.train) == a + b[1:9] + b[10:]
    for name in "cd":
        fill(tmp_path / "single" / name, 1)
    with pytest.raises(DataNotFound, match="holds no class with two images, one to train and one to test"):
        of(tmp_path / "single")


def test_links_are_followed(tmp_path, fill):
    a, b = fill(tmp_path / "elsewhere" / "x"), fill(tmp_path / "data" / "b")
    os.symlink(tmp_path / "elsewhere" / "x", tmp_path / "data" / "a")
    os.symlink(tmp_path / "data", tmp_path / "data" / "b" / "loop")
    os.symlink(tmp_path / "elsewhere" / "x" / "03.png", tmp_path / "data" / "b" / "99.png")
    dataset = of(tmp_path / "data")
    assert dataset.classes == ("a", "b")
    assert sorted(greys(dataset.train) + greys(dataset.test)) == sorted([*a, *b, a[3]])


def test_a_loose_image_beside_class_folders_is_named(tmp_path, fill):
    for name in "ab":
        fill(tmp_path / name, 3)
    Image.new("L", (4, 4)).save(tmp_path / "preview.png")
    with pytest.raises(ValueError, match=r"preview\.png lies beside the folders a, b: move it"):
        of(tmp_path)


def test_splits_that_are_sorted_differently_are_refused(tmp_path, fill):
    for name in "ab":
        fill(tmp_path / "train" / name, 3)
    fill(tmp_path / "test", 3)
    with pytest.raises(ValueError, match=r"test must be sorted into class folders like .*train, got loose images"):
        of(tmp_path)


def test_folders_that_might_be_splits_are_refused(tmp_path, fill):
    for split in ("train", "holdout"):
        fill(tmp_path / "one" / split / "a", 2)
    for split in ("test", "val"):
        fill(tmp_path / "two" / split, 2)
    for split in ("train", "Train", "test"):
        fill(tmp_path / "three" / split, 2)
    for name, said in (
        ("one", "beside it is holdout: call the folder of the test images test or val"),
        ("two", "holds test and val, but no folder train"),
        ("three", "holds two folders for one split: Train and train"),
    ):
        with pytest.raises(ValueError, match=said):
            of(tmp_path / name)


def test_train_may_be_the_name_of_a_class(tmp_path, fill):
    for name in ("boat", "train"):
        fill(tmp_path / name)
    assert of(tmp_path).classes == ("boat", "train")


def test_what_is_left_out_is_counted(tmp_path, fill):
    for split in ("train", "test", "val"):
        fill(tmp_path / split, 3)
    for name in ("train/1.gif", "train/2.GIF", "notes.txt", "README", ".hidden"):
        (tmp_path / name).write_bytes(b"")
    said = (
        r"left out 2 files \(\.gif\), 1 files \(no suffix\), 1 files \(\.txt\), 3 images in .*val; images end in \.png"
    )
    for _ in range(2):  # also where it is decoded already
        with pytest.warns(UserWarning, match=said):
            dataset = of(tmp_path)
    assert (len(dataset.train), len(dataset.test)) == (3, 3)


def test_where_there_is_no_fcntl(tmp_path, fill):
    wanted = fill(tmp_path, 4)
    (tmp_path / ".ivfast").mkdir()
    code = (
        "import sys; sys.modules['fcntl'] = None\n"
        "from ivfast.data import decoded, load\n"
        "import ivfast.runs, ivfast.train.loop, ivfast.cli\n"
        f"for _ in range(2): print(load('folder', {str(tmp_path)!r}, 4, progress=False).train[:, 0, 0, 0].tolist())\n"
    )
    assert passes(code).splitlines() == [str(wanted[1:])] * 2
    (cache,) = (tmp_path / ".ivfast").iterdir()
    assert cache.suffix == ".safetensors"
    assert torch.equal(of(tmp_path).train[:, 0, 0, 0], torch.tensor(wanted[1:], dtype=torch.uint8))
