"""Every loader on small files in the data set's own format, against the pixels that were written."""

import csv
import fcntl
import hashlib
import os
import pickle
import resource
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from ivfast.data import DataNotFound, decoded, load, points, sources


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def random_images(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def random_labels(n, classes=10):
    return torch.randint(0, classes, (n,))


def assert_equal(dataset, train, train_labels, test, test_labels):
    for actual, expected in (
        (dataset.train, train),
        (dataset.train_labels, train_labels),
        (dataset.test, test),
        (dataset.test_labels, test_labels),
    ):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_digits_are_scikit_learns_with_each_sixth_in_the_test_set():
    digits = load_digits()
    expected = torch.from_numpy(np.rint(digits.images * 255 / 16).astype(np.uint8))[:, None]
    labels = torch.from_numpy(digits.target).long()
    test = torch.arange(1797) % 6 == 0
    dataset = load("digits")
    assert_equal(dataset, expected[~test], labels[~test], expected[test], labels[test])
    assert (len(dataset.train), len(dataset.test)) == (1497, 300)
    assert dataset.classes == tuple("0123456789")


def test_resizing_keeps_the_mean_and_grey_becomes_three_equal_channels():
    small, large = load("digits"), load("digits", image_size=32, channels=3)
    assert large.train.shape == (1497, 3, 32, 32)
    assert torch.equal(large.train[:, 0], large.train[:, 2])
    blocks = torch.nn.functional.avg_pool2d(large.train[:, :1].float(), 4)
    assert (blocks - small.train).abs().mean() < 25
    assert (blocks.mean() - small.train.float().mean()).abs() < 2


def test_limit_draws_the_same_images_of_every_class_each_time():
    full, some = load("digits"), load("digits", limit=200)
    assert (len(some.train), len(some.test)) == (200, 200)
    assert torch.equal(some.train, load("digits", limit=200).train)
    assert set(some.train_labels.tolist()) == set(range(10))
    rows = {
        image.numpy().tobytes() + bytes([label]) for image, label in zip(full.train, full.train_labels, strict=True)
    }
    drawn = [
        image.numpy().tobytes() + bytes([label]) for image, label in zip(some.train, some.train_labels, strict=True)
    ]
    assert set(drawn) <= rows


def test_stacked_digits_hold_three_digits_and_their_number():
    digits, stacked = load("digits"), load("stacked-digits", limit=300)
    assert stacked.train.shape == (300, 3, 8, 8)
    assert len(stacked.classes) == 1000
    labels = {
        image.numpy().tobytes(): label for image, label in zip(digits.train, digits.train_labels.tolist(), strict=True)
    }
    for image, number in zip(stacked.train, stacked.train_labels.tolist(), strict=True):
        a, b, c = (labels[channel.numpy().tobytes()] for channel in image)
        assert number == 100 * a + 10 * b + c


def write_idx(path, array):
    magic = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}i", *array.shape)
    path.write_bytes(magic + array.numpy().tobytes())


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_mnist(tmp_path, name, folder):
    raw = tmp_path / folder / "raw"
    raw.mkdir(parents=True)
    x, y, u, v = random_images(7, 28, 28), random_labels(7), random_images(5, 28, 28), random_labels(5)
    for stem, images, labels in (("train", x, y), ("t10k", u, v)):
        write_idx(raw / f"{stem}-images-idx3-ubyte", images)
        write_idx(raw / f"{stem}-labels-idx1-ubyte", labels.to(torch.uint8))
    dataset = load(name, tmp_path)
    assert_equal(dataset, x[:, None], y, u[:, None], v)
    assert len(dataset.classes) == 10
    assert load(name, tmp_path, image_size=64).train.shape == (7, 1, 64, 64)


def write_cifar10(root, monkeypatch):
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    batches = {f"data_batch_{i}": (random_images(4, 3, 32, 32), random_labels(4)) for i in range(1, 6)}
    batches["test_batch"] = (random_images(6, 3, 32, 32), random_labels(6))
    for name, (images, labels) in batches.items():
        entry = {"data": images.flatten(1).numpy(), "labels": labels.tolist()}
        (folder / name).write_bytes(pickle.dumps(entry))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {i}" for i in range(10)]}))
    # torchvision checks MD5 sums: use those of the files above
    from torchvision.datasets import CIFAR10

    sums = [[name, md5(folder / name)] for name in batches]
    monkeypatch.setattr(CIFAR10, "train_list", sums[:5])
    monkeypatch.setattr(CIFAR10, "test_list", sums[5:])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5(folder / "batches.meta")})
    return list(batches.values())


def test_cifar10(tmp_path, monkeypatch):
    *train, test = write_cifar10(tmp_path, monkeypatch)
    dataset = load("cifar10", tmp_path)
    assert_equal(dataset, torch.cat([x for x, _ in train]), torch.cat([y for _, y in train]), *test)
    grey = load("cifar10", tmp_path, channels=1).train
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    assert ((dataset.train * weights).sum(1, keepdim=True) - grey).abs().max() <= 0.501


def test_a_damaged_file_is_refused_with_its_folder_and_the_flag(tmp_path, monkeypatch):
    write_cifar10(tmp_path, monkeypatch)
    with open(tmp_path / "cifar-10-batches-py" / "data_batch_3", "ab") as file:
        file.write(b"x")
    with pytest.raises(DataNotFound, match=r"cifar-10-batches-py.*undamaged.*--download"):
        load("cifar10", tmp_path)


def test_svhn(tmp_path, monkeypatch):
    from scipy.io import savemat
    from torchvision.datasets import SVHN

    written, sums = {}, {}
    for split, n in (("train", 7), ("test", 5)):
        images, labels = random_images(n, 3, 32, 32), random_labels(n)
        labels[0] = 0  # 10 in the file
        path = tmp_path / f"{split}_32x32.mat"
        stored = labels.clone()
        stored[labels == 0] = 10
        savemat(path, {"X": images.permute(2, 3, 1, 0).numpy(), "y": stored[:, None].numpy().astype(np.uint8)})
        written[split], sums[split] = (images, labels), ["", path.name, md5(path)]
    monkeypatch.setattr(SVHN, "split_list", sums)
    assert_equal(load("svhn", tmp_path), *written["train"], *written["test"])


def test_stl10_and_its_unlabelled_images(tmp_path, monkeypatch):
    from torchvision.datasets import STL10

    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    images = {split: random_images(n, 3, 96, 96) for split, n in (("train", 4), ("test", 3), ("unlabeled", 5))}
    labels = {"train": random_labels(4), "test": random_labels(3)}
    for split, x in images.items():
        (folder / f"{split}_X.bin").write_bytes(x.transpose(2, 3).contiguous().numpy().tobytes())  # columns first
    for split, y in labels.items():
        (folder / f"{split}_y.bin").write_bytes((y + 1).to(torch.uint8).numpy().tobytes())  # from 1
    (folder / "class_names.txt").write_text("\n".join(f"class {i}" for i in range(10)))
    for attribute in ("train_list", "test_list"):
        files = [[name, md5(folder / name)] for name, _ in getattr(STL10, attribute)]
        monkeypatch.setattr(STL10, attribute, files)
    dataset = load("stl10", tmp_path)
    assert_equal(dataset, images["train"], labels["train"], images["test"], labels["test"])
    assert dataset.classes[3] == "class 3"
    everything = load("stl10-all", tmp_path)
    assert torch.equal(everything.train, torch.cat([images["train"], images["unlabeled"]]))
    assert everything.train_labels.tolist() == [*labels["train"].tolist(), *[-1] * 5]


def write_celeba(root, monkeypatch, n=9):
    """Aligned pictures 178 x 218 whose red channel counts columns and green channel counts rows."""
    from torchvision.datasets import CelebA

    folder = root / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    names = [f"{i:06d}.jpg" for i in range(1, n + 1)]
    for i, name in enumerate(names):
        pixels = np.zeros((218, 178, 3), np.uint8)
        pixels[..., 0], pixels[..., 1], pixels[..., 2] = np.arange(178), np.arange(218)[:, None], 20 * i
        Image.fromarray(pixels).save(folder / "img_align_celeba" / name, quality=95)

    def table(file, width, header=None):
        with open(folder / file, "w", newline="") as handle:
            rows = csv.writer(handle, delimiter=" ")
            if header:
                rows.writerows([[n], header])
            rows.writerows([name, *[1] * width] for name in names)

    table("list_attr_celeba.txt", 40, [f"a{i}" for i in range(40)])
    table("identity_CelebA.txt", 1)
    table("list_bbox_celeba.txt", 4, ["image_id", *"xywh"])
    table("list_landmarks_align_celeba.txt", 10, [f"l{i}" for i in range(10)])
    splits = [0] * (n - 3) + [1, 2, 2]
    rows = "".join(f"{name} {s}\n" for name, s in zip(names, splits, strict=True))
    (folder / "list_eval_partition.txt").write_text(rows)
    files = [(i, md5(folder / f) if f.endswith(".txt") else m, f) for i, m, f in CelebA.file_list]
    monkeypatch.setattr(CelebA, "file_list", files)
    return folder


def test_celeba_is_cropped_to_its_central_140_pixels_and_cached(tmp_path, monkeypatch):
    folder = write_celeba(tmp_path, monkeypatch)
    dataset = load("celeba", tmp_path, image_size=140)
    assert dataset.train.shape == (6, 3, 140, 140)
    assert dataset.test.shape == (2, 3, 140, 140)
    assert (dataset.train[0, 0].float().mean(0) - torch.arange(19, 159)).abs().max() < 4
    assert (dataset.train[0, 1].float().mean(1) - torch.arange(39, 179)).abs().max() < 4
    assert dataset.train[:, 2].float().mean((1, 2)).sub(20 * torch.arange(6)).abs().max() < 4
    assert load("celeba", tmp_path).train.shape == (6, 3, 64, 64)

    for path in (folder / "img_align_celeba").iterdir():
        stamp = (folder / "img_align_celeba").stat()
        path.write_bytes(b"")  # from here on only the cache has the data
        os.utime(folder / "img_align_celeba", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    again = load("celeba", tmp_path, image_size=140)
    assert torch.equal(again.train, dataset.train)
    assert torch.equal(again.test, dataset.test)
    assert again.train_labels is None
    with pytest.raises(ValueError, match=r"jpg is not a readable image"):
        load("celeba", tmp_path, image_size=32)


def test_lsun(tmp_path):
    lmdb = pytest.importorskip("lmdb", reason="LSUN needs the package lmdb")
    images = random_images(8, 3, 40, 40)
    for split, part in (("train", images[:6]), ("val", images[6:])):
        environment = lmdb.open(str(tmp_path / f"tower_{split}_lmdb"), map_size=1 << 24)
        with environment.begin(write=True) as transaction:
            for i, image in enumerate(part):
                path = tmp_path / "one.webp"
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(path, lossless=True)
                transaction.put(f"{i:040d}".encode(), path.read_bytes())
        environment.close()
    dataset = load("lsun:tower", tmp_path, image_size=40)
    assert torch.equal(dataset.train, images[:6])
    assert torch.equal(dataset.test, images[6:])
    with pytest.raises(DataNotFound, match=r"bedroom_train_lmdb"):
        load("lsun:bedroom", tmp_path)


def write_images(folder, images, suffix=".png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:03d}{suffix}")


def test_folder_of_classes_with_train_and_test(tmp_path):
    cats, dogs, other = random_images(5, 3, 20, 20), random_images(4, 3, 20, 20), random_images(3, 3, 20, 20)
    write_images(tmp_path / "train" / "cat", cats)
    write_images(tmp_path / "train" / "dog", dogs, ".bmp")
    write_images(tmp_path / "test" / "dog", other)
    dataset = load("folder", tmp_path, image_size=20)
    labels = torch.tensor([0] * 5 + [1] * 4)
    assert_equal(dataset, torch.cat([cats, dogs]), labels, other, torch.tensor([1, 1, 1]))
    assert dataset.classes == ("cat", "dog")


def test_flat_folder_holds_out_each_tenth_and_notices_a_change(tmp_path):
    images = random_images(25, 3, 16, 16)
    write_images(tmp_path, images)
    held_out = torch.arange(25) % 10 == 0
    assert_equal(load("folder", tmp_path, image_size=16), images[~held_out], None, images[held_out], None)
    caches = set((tmp_path / ".ivfast").iterdir())
    assert len(caches) == 1
    write_images(tmp_path / "more", random_images(1, 3, 16, 16))
    assert len(load("folder", tmp_path, image_size=16).train) == 23
    assert len(set((tmp_path / ".ivfast").iterdir()) - caches) == 1


def test_folder_crops_the_central_square_and_converts(tmp_path):
    wide = torch.zeros(3, 10, 30, dtype=torch.uint8)
    wide[:, :, 10:20] = 200
    write_images(tmp_path, [wide, wide])
    Image.fromarray(np.full((12, 12), 200, np.uint8)).convert("P").save(tmp_path / "palette.png")
    dataset = load("folder", tmp_path, image_size=10, channels=1)
    assert dataset.train.shape == (2, 1, 10, 10)
    assert (dataset.train.float() - 200).abs().max() <= 1


@pytest.mark.parametrize("problem", ["no folder", "disk full"])
def test_folder_that_cannot_be_written_still_loads(problem, tmp_path):
    images = random_images(60, 3, 32, 32)
    for folder, part in (("a", images[:40]), ("b", images[40:])):
        write_images(tmp_path / folder, part)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if problem == "no folder":
        (tmp_path / ".ivfast").write_text("in the way")
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (images.nbytes // 2, hard))
    try:
        with pytest.warns(UserWarning, match=r"could not be written"):
            dataset = load("folder", tmp_path, image_size=32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    held_out, labels = torch.arange(60) % 10 == 0, (torch.arange(60) >= 40).long()
    assert_equal(dataset, images[~held_out], labels[~held_out], images[held_out], labels[held_out])
    assert problem == "no folder" or not list((tmp_path / ".ivfast").iterdir())


def test_decoded_images_are_mapped_from_a_safetensors_file(tmp_path):
    images = random_images(11, 3, 7, 7)  # 147 bytes each, so nothing is aligned by chance
    write_images(tmp_path / "only", images)
    first = load("folder", tmp_path, image_size=7)
    (cache,) = (tmp_path / ".ivfast").iterdir()
    stored = load_file(cache)
    for key in ("train", "train_labels", "test", "test_labels"):
        assert torch.equal(getattr(first, key), stored[key])
    mapped = Path("/proc/self/maps")
    assert not mapped.exists() or str(cache) in mapped.read_text()
    before = cache.read_bytes()
    first.train.fill_(0)  # the caller's copy, not the file
    assert cache.read_bytes() == before


def test_what_a_killed_decoder_left_is_removed_but_not_the_file_of_a_living_one(tmp_path):
    path, like = tmp_path / "set-1x2x2-abc.safetensors", {"train": (torch.uint8, (3, 1, 2, 2))}
    killed, living, of_another_set = tmp_path / f"{path.stem}.1.part", f"{path.stem}.2.part", "set-1x3x3-abc.1.part"
    killed.write_bytes(bytes(100))
    (tmp_path / of_another_set).write_bytes(bytes(100))
    with open(tmp_path / living, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with decoded.create(path, like, {}) as out:
            own = f"{path.stem}.{os.getpid()}.part"
            assert {file.name for file in tmp_path.iterdir()} == {living, own, of_another_set}
            out["train"].fill_(7)
            decoded._sweep(path)  # as another process would that starts now
        assert {file.name for file in tmp_path.iterdir()} == {living, path.name, of_another_set}
    assert (decoded.read(path)[0]["train"] == 7).all()


def test_what_is_not_an_image_leaves_no_file_behind(tmp_path):
    write_images(tmp_path, random_images(5, 3, 8, 8))
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"bad\.png is not a readable image"):
        load("folder", tmp_path, image_size=8)
    assert not list((tmp_path / ".ivfast").iterdir())


def test_damaged_cache_names_itself(tmp_path):
    write_images(tmp_path, random_images(3, 3, 8, 8))
    load("folder", tmp_path, image_size=8)
    (cache,) = (tmp_path / ".ivfast").iterdir()
    cache.write_bytes(cache.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"safetensors is damaged.*delete it"):
        load("folder", tmp_path, image_size=8)


@pytest.mark.parametrize("name", [n for n in sources.DATASETS if n not in ("digits", "stacked-digits", *points.POINTS)])
def test_missing_data_says_where_it_looked_and_what_to_do(tmp_path, name):
    if name == "lsun":
        pytest.importorskip("lmdb", reason="without lmdb the error is about lmdb")
    with pytest.raises(DataNotFound) as caught:
        load(name, tmp_path)
    assert str(tmp_path) in str(caught.value)
    remedy = {"lsun": "github.com/fyu/lsun", "folder": "--root"}.get(name, "--download")
    assert remedy in str(caught.value)


def test_lsun_without_lmdb_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(DataNotFound, match=r"pip install lmdb"):
        load("lsun", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "mnits"}, "did you mean 'mnist'"),
        ({"name": "digits", "image_size": 2}, "image_size must be an integer >= 4, got 2"),
        ({"name": "digits", "channels": 2}, "channels must be 1 or 3, got 2"),
        ({"name": "digits", "limit": 1}, "limit must be an integer >= 2, got 1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        load(**arguments)
