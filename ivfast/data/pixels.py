"""What a viewer shows of an image file, as 8-bit pixels, whatever its depth, transparency and orientation."""

import contextlib

import numpy as np
from PIL import Image, ImageOps

VERSION = 2  # changes with the pixels that are made of a file, so that older decoded sets are not taken for new ones
BACKGROUND = (255, 255, 255, 255)  # behind transparent pixels: white, as on a page
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF


def square(file: Image.Image, channels: int, size: int, crop: int | None = None) -> np.ndarray:
    """The central square of an opened image, turned upright: uint8 `[size, size]` or `[size, size, 3]`.

    Transparent pixels are shown on white. Greys of 9 to 16 bits are scaled to 8, floats are taken to be in [0, 1].

    Args:
        channels: 1 (luma) or 3.
        crop: side of the square, if the image is that large; None means the largest one.

    Raises:
        ValueError: greys whose range is not known: 32-bit integers, or floats outside [0, 1].
        Exception: whatever Pillow raises for a damaged file.
    """
    file.load()
    with contextlib.suppress(Exception):  # damaged EXIF, with which viewers show an image as it is stored
        ImageOps.exif_transpose(file, in_place=True)
    image = _opaque(file).convert("L" if channels == 1 else "RGB")
    side = min(*image.size, crop or max(image.size))
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return np.array(image.resize((size, size), Image.Resampling.BILINEAR, box))


def _opaque(image: Image.Image) -> Image.Image:
    """8 bits per channel, on the background."""
    if image.mode == "I" or image.mode == "F" or image.mode.startswith("I;16"):
        return _eight_bits(image)
    palette = image.palette.mode if image.mode == "P" and image.palette else ""
    if image.mode not in ("LA", "La", "PA", "RGBA", "RGBa") and "transparency" not in image.info and "A" not in palette:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Greys of more than 8 bits as 8; Pillow's own conversion clips them at 255."""
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    if image.mode == "F":
        if not (values.min() >= 0 and values.max() <= 1):  # also for NaN
            raise ValueError(f"floats must be in [0, 1], got {values.min():g} to {values.max():g}")
        most = 1.0
    elif image.mode == "I" and image.format not in ("PNG", "PPM"):  # those hold 16 bits
        raise ValueError("32-bit or signed integers have no known range; save the image with 8 or 16 bits")
    else:
        bits = tags.get(BITS_PER_SAMPLE, (16,))
        most = float(2 ** (bits if isinstance(bits, int) else bits[0]) - 1)
    grey = np.rint(values.astype(np.float64) * (255 / most)).clip(0, 255).astype(np.uint8)
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        grey = 255 - grey
    if "transparency" in image.info:  # one grey of a PNG
        grey[values == image.info["transparency"]] = BACKGROUND[0]
    return Image.fromarray(grey)
