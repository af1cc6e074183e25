"""Image files of every depth, transparency and orientation: what is read is what a viewer shows."""

import struct
import zlib

import numpy as np
import pytest
import torch
from helpers import command
from PIL import Image

from ivfast.data import load

RAMP = np.arange(16)[None].repeat(16, 0)  # 16 greys from left to right
GREYS = np.rint(RAMP * 17.0)


def read(folder, save, channels=3, size=16):
    """The image that `save(path without a suffix)` writes, `[C, S, S]`."""
    for i in range(2):
        save(folder / str(i))
    return load("folder", folder, size, channels, progress=False).train[0].numpy()


def saver(image, suffix, **options):
    return lambda path: image.save(path.with_suffix(suffix), **options)


def pgm(most, values):
    def save(path):
        path.with_suffix(".pgm").write_bytes(b"P5 16 16 %d\n" % most + values.astype(">u2").tobytes())

    return save


def tiff(values, bits, photometric, form=1):
    """A little-endian grey TIFF, one strip."""
    data = values.tobytes()
    entries = [(256, 4, 16), (257, 4, 16), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 8),
               (277, 3, 1), (278, 4, 16), (279, 4, len(data)), (339, 3, form)]  # fmt: skip
    table = struct.pack("<H", len(entries)) + b"".join(
        struct.pack("<HHIHH" if k == 3 else "<HHII", t, k, 1, v, *([0] * (k == 3))) for t, k, v in entries
    )
    content = b"II*\0" + struct.pack("<I", 8 + len(data)) + data + table + bytes(4)
    return lambda path: path.with_suffix(".tif").write_bytes(content)


SIXTEEN = (RAMP * 4369).astype(np.uint16)  # 17 · 257
DEEP = {
    "16-bit PNG": saver(Image.fromarray(SIXTEEN), ".png"),
    "16-bit TIFF": saver(Image.fromarray(SIXTEEN), ".tif"),
    "16-bit TIFF, white is zero": tiff(65535 - SIXTEEN, 16, 0),
    "16-bit PGM": pgm(65535, SIXTEEN),
    "10-bit PGM": pgm(1023, np.rint(RAMP * 1023 / 15)),
    "float TIFF": saver(Image.fromarray((RAMP / 15).astype(np.float32)), ".tif"),
    "8-bit PNG": saver(Image.fromarray(GREYS.astype(np.uint8)), ".png"),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", DEEP)
def test_greys_of_every_depth(tmp_path, kind, channels):
    got = read(tmp_path, DEEP[kind], channels)
    assert np.abs(got - GREYS).max() <= (0.5 if kind == "10-bit PGM" else 0)  # 1023/15 is no integer


@pytest.mark.parametrize(
    ("save", "said"),
    [
        (saver(Image.fromarray((RAMP * 17).astype(np.float32)), ".tif"), r"floats must be in \[0, 1\], got 0 to 255"),
        (saver(Image.fromarray(np.where(RAMP, 0.5, np.nan).astype(np.float32)), ".tif"), r"floats must be in \[0, 1\]"),
        (saver(Image.fromarray((RAMP << 26).astype(np.int32)), ".tif"), "integers have no known range"),
        (tiff((RAMP * 1000).astype(np.int16), 16, 1, form=2), "integers have no known range"),
    ],
)
def test_greys_of_no_known_range_are_refused(tmp_path, save, said):
    with pytest.raises(ValueError, match=rf"[01]\.tif is not a readable image: .*{said}"):
        read(tmp_path, save)


def hidden_colours():
    """A red square on transparent noise."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    pixels[..., 3] = 0
    pixels[4:12, 4:12] = 255, 0, 0, 255
    return pixels


def test_transparent_pixels_are_white(tmp_path):
    expected = np.full((3, 16, 16), 255)
    expected[1:, 4:12, 4:12] = 0
    for suffix, options in ((".png", {}), (".webp", {"lossless": True, "exact": True}), (".tif", {})):
        folder = tmp_path / suffix[1:]
        folder.mkdir()
        np.testing.assert_array_equal(
            read(folder, saver(Image.fromarray(hidden_colours()), suffix, **options)), expected
        )


def test_half_transparent_pixels_are_mixed_with_white_before_resizing(tmp_path):
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[..., 3] = 51  # a fifth of black
    assert np.abs(read(tmp_path, saver(Image.fromarray(pixels), ".png"), 1, 8) - 204.0).max() <= 1


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "LA", "I;16"])
def test_a_transparent_colour_is_white(tmp_path, mode):
    values = np.where(RAMP < 8, 9, 100).astype(np.uint8)
    image, options = Image.fromarray(values), {"transparency": 9}
    if mode == "P":
        image = Image.fromarray(values, "L").convert("P")
        image.putpalette([i for i in range(256) for _ in range(3)])
    elif mode == "RGB":
        image, options = image.convert("RGB"), {"transparency": (9, 9, 9)}
    elif mode == "LA":
        image, options = Image.merge("LA", [image, Image.fromarray(np.where(RAMP < 8, 0, 255).astype(np.uint8))]), {}
    elif mode == "I;16":
        image, options = Image.fromarray(values.astype(np.uint16) * 257), {"transparency": 9 * 257}
    got = read(tmp_path, saver(image, ".png", **options), 1)
    np.testing.assert_array_equal(got[0], np.where(RAMP < 8, 255, 100))


TURNS = [None, Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
         Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_90, Image.Transpose.TRANSVERSE,
         Image.Transpose.ROTATE_270]  # fmt: skip


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg"])
def test_images_are_turned_upright(tmp_path, suffix):
    """Each is stored turned or mirrored, with the orientation that undoes it, and is wide: the crop comes after."""
    shown = np.zeros((16, 24, 3), np.uint8)
    shown[:8, 4:12], shown[8:, 4:12] = 250, 120  # no symmetry
    for orientation, turn in enumerate(TURNS, 1):
        image, exif = Image.fromarray(shown), Image.Exif()
        exif[0x0112] = orientation
        stored = image if turn is None else image.transpose(turn)
        folder = tmp_path / str(orientation)
        folder.mkdir()
        got = read(folder, saver(stored, suffix, exif=exif, **({"quality": 95} if suffix == ".jpg" else {})))
        np.testing.assert_allclose(got.transpose(1, 2, 0), shown[:, 4:20], atol=12 if suffix == ".jpg" else 0)


def test_damaged_exif_leaves_an_image_as_it_is_stored(tmp_path):
    image = Image.fromarray(GREYS.astype(np.uint8))
    for exif in (b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff"):
        np.testing.assert_allclose(read(tmp_path, saver(image, ".jpg", exif=exif, quality=98), 1)[0], GREYS, atol=3)


def test_sixteen_bits_are_turned_upright_too(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    got = read(tmp_path, saver(Image.fromarray(SIXTEEN), ".png", exif=exif), 1)
    np.testing.assert_array_equal(got[0], GREYS[:, ::-1])


def chunk(tag, body):
    return struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body))


def damaged(kind):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    return {
        "empty": b"",
        "text": b"not a picture\nat all",
        "bomb": bomb,
        "long text": bomb[:8]
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 0, 0, 0, 0))
        + chunk(b"zTXt", b"k\0\0" + zlib.compress(b"a" * (3 << 20))),
        "cut short": bomb[:20],
        "no pixels": bomb[:8] + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 0, 0, 0, 0)) + chunk(b"IEND", b""),
    }[kind]


@pytest.mark.parametrize("kind", ["empty", "text", "bomb", "long text", "cut short", "no pixels"])
def test_what_pillow_refuses_is_named_in_one_line(tmp_path, kind):
    for i in range(5):
        Image.fromarray(np.full((8, 8), 40 * i, np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "odd.png").write_bytes(damaged(kind))
    with pytest.raises(ValueError, match=r"odd\.png is not a readable image: .") as caught:
        load("folder", tmp_path, 8, progress=False)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / ".ivfast").iterdir())
    if kind == "bomb":
        options = ("--image-size", 8, "--steps", 1, "--batch-size", 2, "--device", "cpu", "--out", tmp_path / ".run")
        text = command("train", "wae-mmd", "--data", "folder", "--root", tmp_path, *options, code=2)
        assert "odd.png is not a readable image" in text


def test_sets_decoded_by_an_older_version_are_decoded_again(tmp_path, monkeypatch):
    from ivfast.data import pixels

    for i in range(2):
        Image.fromarray(np.full((8, 8), 40 * i, np.uint8)).save(tmp_path / f"{i}.png")
    first = load("folder", tmp_path, 8, progress=False)
    monkeypatch.setattr(pixels, "VERSION", pixels.VERSION + 1)
    assert torch.equal(load("folder", tmp_path, 8, progress=False).train, first.train)
    assert len(list((tmp_path / ".ivfast").iterdir())) == 2
