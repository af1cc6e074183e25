"""Batches: the same bits from the device and from the host, whatever had been prefetched when the run stopped."""

import dataclasses
import gc
import math
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers import settings_with

import ivfast
from ivfast.models import build
from ivfast.train import Settings, checkpoint
from ivfast.train.batches import Batches, Order, as_images, fits
from ivfast.train.loop import NonFiniteLoss, fit
from ivfast.train.prefetch import AHEAD, Prefetch

N, B, PER_EPOCH = 60, 8, 7  # four images per epoch are dropped
CPU = torch.device("cpu")


@pytest.fixture
def images():
    return torch.randint(256, (N, 1, 8, 8), dtype=torch.uint8)


def prefetching():
    return [thread for thread in threading.enumerate() if thread.name == "ivfast-prefetch"]


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    gc.collect()
    assert not prefetching()


def assert_same(one, other):
    for x, y in zip(one, other, strict=True):
        assert torch.equal(x, y)


def test_an_epoch_has_no_repeats_and_what_is_missing_is_said():
    images = torch.arange(N, dtype=torch.uint8).view(N, 1, 1, 1).expand(N, 1, 8, 8)
    batches = Batches(images, B, seed=1, labels=torch.arange(N))
    for _ in range(2):
        labels = torch.cat([batches.next()[1] for _ in range(PER_EPOCH)])
        assert len(labels.unique()) == B * PER_EPOCH
    x, y = batches.next()
    assert torch.equal(x[:, 0, 0, 0], y / 127.5 - 1)
    with pytest.raises(ValueError, match="batch_size must be at most the number of images, 60, got 61"):
        Batches(images, 61, seed=1)
    with pytest.raises(ValueError, match="labels must match images: 60, got 59"):
        Batches(images, B, seed=1, labels=torch.arange(59))
    with pytest.raises(ValueError, match=r"flip needs images \[N, C, H, W\], got shape \(60, 2\)"):
        Batches(torch.zeros(N, 2), B, seed=1, flip=True)


def test_bytes_become_floats_from_minus_one_to_one():
    levels = torch.arange(256, dtype=torch.uint8)
    x = as_images(levels)
    assert x.dtype == torch.float32
    assert (x[0], x[255]) == (-1, 1)
    exact = torch.linspace(-1, 1, 256, dtype=torch.float64)
    assert (x - exact).abs().max() <= 2**-23  # two roundings of numbers up to 2 and 1
    points = torch.randn(5, 2)
    assert as_images(points) is points


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("kind", ["bytes", "floats", "mapped file"])
def test_prefetched_batches_have_the_bits_of_resident_ones(kind, flip, images, tmp_path):
    if kind == "floats":
        images = torch.randn(N, 3, 4, 4)
    if kind == "mapped file":
        (tmp_path / "images").write_bytes(images.numpy().tobytes())
        images = torch.from_file(str(tmp_path / "images"), size=images.numel(), dtype=torch.uint8).view_as(images)
    labels = torch.randint(10, (N,))
    resident = Batches(images, B, 3, labels, flip=flip)
    streamed = Batches(images, B, 3, labels, flip=flip, stream_to=CPU)
    kept = []
    for _ in range(3 * PER_EPOCH + 2):
        one, other = resident.next(), streamed.next()
        assert_same(one, other)
        kept.append((other[0], other[0].clone()))
    assert all(torch.equal(batch, then) for batch, then in kept)  # no batch is overwritten by a later one
    streamed.close()


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("taken", [0, 3, PER_EPOCH, PER_EPOCH + 5])
def test_state_is_of_what_was_taken_not_of_what_was_prefetched(taken, flip, images):
    def batches(stream_to):
        return Batches(images, B, 3, flip=flip, stream_to=stream_to)

    straight = batches(None)
    expected = [straight.next() for _ in range(taken + 12)][taken:]
    for first, second in ((CPU, None), (None, CPU), (CPU, CPU)):
        stopped, resumed = batches(first), batches(second)
        for _ in range(taken):
            stopped.next()
        resumed.next()  # a thread that is prefetching other batches
        resumed.load(stopped.state())
        for batch in expected:
            assert_same(resumed.next(), batch)
        stopped.close()
        resumed.close()


def test_flip_mirrors_half_of_the_images_anew_in_each_epoch():
    n, epochs = 400, 4
    images = torch.zeros(n, 1, 2, 3, dtype=torch.uint8)
    images[..., 0], images[..., 2] = 200, torch.randint(100, (n, 1, 2))
    batches = Batches(images, 50, 7, torch.arange(n), flip=True)
    originals, mirrored = as_images(images), torch.zeros(epochs, n, dtype=torch.bool)
    for epoch in range(epochs):
        for _ in range(8):
            x, rows = batches.next()
            mirrored[epoch, rows] = flipped = (x[:, 0, 0, 2] > 0.5).clone()
            assert torch.equal(x, torch.where(flipped[:, None, None, None], originals[rows].flip(-1), originals[rows]))
    # counts of n fair coins; a false alarm at six standard deviations occurs once in 5e8 runs
    assert ((mirrored.sum(1) - n / 2).abs() < 6 * math.sqrt(n / 4)).all()
    assert ((mirrored[:-1] == mirrored[1:]).sum(1) - n / 2).abs().max() < 6 * math.sqrt(n / 4)


def test_without_flip_the_order_is_the_permutation_of_its_seed(images):
    order = Order(N, B, 11)
    generator = torch.Generator().manual_seed(11)
    for _ in range(2):
        expected = torch.randperm(N, generator=generator)[: B * PER_EPOCH]
        assert torch.equal(torch.cat([order.next() for _ in range(PER_EPOCH)]), expected)


def test_the_thread_works_ahead_but_not_further():
    images, calls = torch.arange(10.0), []
    prefetch = Prefetch(images, lambda: calls.append(0) or torch.tensor([len(calls) % 10]), pin=False)
    for taken in range(1, 6):
        assert prefetch.next() == taken
        deadline = time.monotonic() + 20
        while len(calls) < taken + AHEAD + 1:  # those that wait, and one in the thread
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(0.01)
        assert len(calls) == taken + AHEAD + 1
    prefetch.close()
    assert not prefetching()
    prefetch.close()


def test_an_error_of_the_thread_reaches_the_loop_after_the_batches_before_it():
    rows = iter([torch.tensor([1]), torch.tensor([2]), torch.tensor([99])])
    prefetch = Prefetch(torch.arange(10.0), lambda: next(rows), pin=False)
    assert [float(prefetch.next()) for _ in range(2)] == [1, 2]
    for _ in range(3):  # also when called again
        with pytest.raises((IndexError, RuntimeError), match="out of range"):
            prefetch.next()
    prefetch.close()


def test_the_thread_ends_with_the_last_reference():
    prefetch = Prefetch(torch.arange(10.0), lambda: torch.tensor([1]), pin=False)
    prefetch.next()
    assert prefetching()
    del prefetch
    gc.collect()
    assert not prefetching()


def test_a_program_ends_though_its_thread_was_not_closed():
    code = (
        "import torch; from ivfast.train.prefetch import Prefetch\n"
        "prefetch = Prefetch(torch.arange(10.0), lambda: torch.tensor([1]), pin=False)\n"
        "print(prefetch.next().item())"
    )
    root = Path(ivfast.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1.0\n", "")


def small(**changes) -> Settings:
    values = {"system": "ivaae-rad", "batch_size": B, "latent_dim": 8, "width": 16, "discriminator_width": 16}
    values |= {"steps": 17, "log_every": 6, "tensorboard": False, "flip": True, "seed": int(torch.randint(1000, ()))}
    return settings_with(values, changes)


def train(settings, images, out, **keywords):
    return fit(build(settings, (1, 8, 8)), images, settings, out, progress=False, **keywords)


def test_a_run_that_streams_has_the_bits_of_one_that_does_not_and_either_resumes_the_other(images, tmp_path):
    resident, streams = small(), {"data_memory": 0.0}
    settings = dataclasses.replace(resident, **streams)
    train(resident, images, tmp_path / "resident")
    train(settings, images, tmp_path / "streams")
    train(dataclasses.replace(settings, steps=10), images, tmp_path / "changes")
    assert not prefetching()
    train(resident, images, tmp_path / "changes", resume=True)
    train(dataclasses.replace(resident, steps=10), images, tmp_path / "back")
    train(settings, images, tmp_path / "back", resume=True)
    saved = [checkpoint.read(tmp_path / out / checkpoint.LAST) for out in ("resident", "streams", "changes", "back")]
    for other in saved[1:]:
        assert other.tensors.keys() == saved[0].tensors.keys()
        assert_same(other.tensors.values(), saved[0].tensors.values())
    with pytest.raises(ValueError, match=r"settings\.flip must match"):
        train(dataclasses.replace(settings, flip=False, steps=30), images, tmp_path / "back", resume=True)


def test_a_run_that_fails_or_is_stopped_leaves_no_thread(images, tmp_path):
    settings = small(data_memory=0.0)
    with pytest.raises(NonFiniteLoss):
        train(dataclasses.replace(settings, lam=1e38, learning_rates={"default": 1e30}), images, tmp_path / "diverges")
    assert not prefetching()

    def stop(system):
        assert prefetching()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(settings, images, tmp_path / "stopped", evaluate=stop)
    assert not prefetching()


def test_what_fits(images):
    size = images.nbytes / 2**30
    assert fits(images, CPU, size)
    assert not fits(images, CPU, 0.99 * size)
    assert fits(images, CPU, None)
    enormous = torch.empty(1, dtype=torch.uint8).expand(2**50)  # a petabyte, backed by one byte
    assert not fits(enormous, CPU, None)
