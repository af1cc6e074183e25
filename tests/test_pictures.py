"""Pictures and files show exactly the given pixels."""

import numpy as np
import pytest
import torch
from PIL import Image

from ivfast.runs import pictures


def read(path):
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.mark.parametrize(("n", "columns", "side"), [(7, None, 8), (64, 8, 5), (3, 3, 64), (1, None, 600)])
def test_grid_holds_every_image_enlarged_by_a_whole_factor(tmp_path, n, columns, side):
    images = torch.randint(0, 256, (n, 1, side, side), dtype=torch.uint8)
    path = pictures.samples(images, tmp_path / "grid.png", columns)
    grid = read(path)[..., 0]
    columns = columns or int(np.ceil(np.sqrt(n)))
    factor = max(1, (grid.shape[1] - pictures.GAP) // columns // side)
    cell = factor * side + pictures.GAP
    assert grid.shape == (-(-n // columns) * cell + pictures.GAP, columns * cell + pictures.GAP) or n == 1
    assert pictures.WIDTH / 2 < grid.shape[1] <= pictures.WIDTH
    offset = pictures.GAP if n > 1 else 0  # torchvision's grid of one image has no border
    for i, image in enumerate(images[:, 0].numpy()):
        top, left = (offset + (i // columns) * cell, offset + (i % columns) * cell)
        shown = grid[top : top + factor * side, left : left + factor * side]
        np.testing.assert_array_equal(shown[factor // 2 :: factor, factor // 2 :: factor], image)


@pytest.mark.parametrize("channels", [1, 3])
def test_single_files_are_the_images(tmp_path, channels):
    images = torch.randint(0, 256, (3, channels, 8, 8), dtype=torch.uint8)
    folder = pictures.single(images, tmp_path / "out")
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["000000.png", "000001.png", "000002.png"]
    for image, name in zip(images, names, strict=True):
        np.testing.assert_array_equal(read(folder / name), image.expand(3, -1, -1).permute(1, 2, 0).numpy())


def test_covariance_map_is_bright_on_the_diagonal_alone(tmp_path):
    # codes that are exactly white: Σ = I
    z = torch.linalg.qr(torch.randn(500, 8, dtype=torch.float64) - 0).Q
    z = torch.linalg.qr(z - z.mean(0)).Q * 499**0.5
    white = read(pictures.covariance(z, tmp_path / "white.png", "test"))
    equal = read(pictures.covariance(z[:, :1].expand(-1, 8), tmp_path / "equal.png", "test"))
    inside = (slice(100, 500), slice(100, 500))
    assert (equal[inside] > 250).mean() > 0.95
    assert 0.05 < (white[inside] > 250).mean() < 0.25


def test_strips_and_curves_are_drawn_without_warnings(tmp_path):
    x = torch.randint(0, 256, (13, 3, 8, 8), dtype=torch.uint8)
    tall = read(pictures.reconstructions(x, x // 2, tmp_path / "r.png", columns=4))
    flat = read(pictures.reconstructions(x[:4], x[:4] // 2, tmp_path / "f.png", columns=4))
    assert tall.shape[0] > 2.2 * flat.shape[0]
    assert tall.std() > 20
    lines = read(pictures.interpolations(x[:12].unflatten(0, (2, 6)), tmp_path / "i.png"))
    assert lines.std() > 20
    series = {"falls": [(i, 10.0 ** -(i / 10)) for i in range(40)], "one point": [(5, -3.0)], "flat": [(1, 2), (2, 2)]}
    assert read(pictures.curves(series, tmp_path / "c.png", "title")).std() > 5
