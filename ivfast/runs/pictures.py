"""PNG pictures of a run: samples, reconstructions, interpolations, the codes' covariance, curves from the log.

Images are uint8 `[n, C, H, W]` on the CPU. matplotlib is imported only when a figure is drawn, and needs no display.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

WIDTH = 1024  # pixels that a grid fills, enlarging its images by a whole factor
GAP, GAP_COLOUR = 4, 96  # between the images of a grid
GRID = {"color": "0.88", "linewidth": 0.8}


def tile(images: Tensor, columns: int | None = None, width: int = WIDTH) -> Tensor:
    """One uint8 picture `[3, H', W']` of all images in rows of `columns` (default: as square as n allows).

    Small images are enlarged smoothly to fill `width`, because smooth shades are easier to read than blocks. The factor
    is odd, so that the centre of each enlarged pixel is the original pixel.
    """
    from torchvision.utils import make_grid

    columns = columns or math.ceil(math.sqrt(len(images)))
    factor = (max(1, (width - GAP) // columns // (images.shape[-1] + math.ceil(GAP / 8))) - 1) | 1
    enlarged = F.interpolate(images.float(), scale_factor=factor, mode="bicubic").round().clamp(0, 255).byte()
    return make_grid(enlarged, columns, GAP, pad_value=GAP_COLOUR)


def samples(images: Tensor, path: Path, columns: int | None = None) -> Path:
    """Grid of samples; for points `[n, D]`, a scatter plot of the first two coordinates."""
    if images.dim() == 2:
        return _scatter(images, path)
    from PIL import Image

    # noise, such as the first samples, takes seconds to compress well
    Image.fromarray(tile(images, columns).permute(1, 2, 0).contiguous().numpy()).save(path, compress_level=1)
    return path


def _scatter(points: Tensor, path: Path) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 5.6), dpi=110, layout="constrained")
    axes = figure.add_subplot(aspect="equal")
    axes.scatter(points[:, 0], points[:, 1], s=4, linewidths=0, alpha=0.5)
    axes.grid(**GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"{len(points):,} samples", fontsize=12)
    figure.savefig(path)
    return path


def single(images: Tensor, folder: Path) -> Path:
    """One PNG file per image, at its original size: `folder/000000.png` and so on."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0).contiguous()
        Image.fromarray(pixels.numpy()).save(folder / f"{i:06d}.png")
    return folder


def reconstructions(originals: Tensor, reconstructed: Tensor, path: Path, columns: int = 12) -> Path:
    """Rows of originals, each with its reconstructions below."""
    n = len(originals) // columns * columns or len(originals)
    columns = min(columns, n)
    rows = []
    for x, y in zip(originals[:n].split(columns), reconstructed[:n].split(columns), strict=True):
        rows += [("x", tile(x, columns)), ("G(E(x))", tile(y, columns))]
    return _strips(rows, path, "Images x and their reconstructions G(E(x))", pairs=True)


def interpolations(images: Tensor, path: Path) -> Path:
    """`[rows, columns, C, H, W]`: decoded points on straight lines between the codes of two images."""
    columns = images.shape[1]
    rows = [("", tile(row, columns)) for row in images]
    title = "Decoded interpolations between the codes of two test images"
    return _strips(rows, path, title, ends=("E(first)", "E(second)"))


def _strips(rows, path, title, *, pairs=False, ends=None):
    """Stack strips `[3, h, w]`, each with its label; pairs are closer together."""
    from matplotlib.figure import Figure

    strip = rows[0][1]
    height, width = strip.shape[1:]
    gap, count = round(0.35 * height) if pairs else 0, len(rows)
    canvas = torch.full(
        (3, count * height + (count // 2 - 1 if pairs else 0) * gap, width), 255, dtype=torch.uint8, device="cpu"
    )
    ticks = []
    for i, (_, picture) in enumerate(rows):
        top = i * height + (i // 2) * gap
        canvas[:, top : top + height] = picture
        ticks.append(top + height / 2)
    inches = 10.0
    label = 0.9 if any(name for name, _ in rows) else 0.15
    drawn = inches - label - 0.15
    tall = drawn * canvas.shape[1] / width
    top, bottom = 0.5, 0.35 if ends else 0.12
    figure = Figure(figsize=(inches, tall + top + bottom), dpi=110)
    total = tall + top + bottom
    axes = figure.add_axes((label / inches, bottom / total, drawn / inches, tall / total))
    axes.imshow(canvas.permute(1, 2, 0).numpy(), interpolation="antialiased", aspect="auto")
    axes.set_yticks(ticks, [name for name, _ in rows], fontsize=10)
    axes.set_xticks([])
    if ends:
        axes.text(0, -0.012, ends[0], transform=axes.transAxes, ha="left", va="top", fontsize=10)
        axes.text(1, -0.012, ends[1], transform=axes.transAxes, ha="right", va="top", fontsize=10)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    figure.text(0.5, 1 - 0.25 / total, title, ha="center", va="center", fontsize=12)
    figure.savefig(path)
    return path


def covariance(z: Tensor, path: Path, title: str = "") -> Path:
    """Heat map of |Σ_z| for the codes `[n, d]` (S1, Fig. 6): black is 0, white is 1 or more; the prior has I."""
    from matplotlib.figure import Figure

    sigma = torch.cov(z.double().T).reshape(z.shape[1], z.shape[1])
    d = len(sigma)
    off = (sigma - sigma.diagonal().diag()).abs()
    figure = Figure(figsize=(6.4, 5.8), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(sigma.abs().numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(image, ax=axes, shrink=0.85, extend="max", label="|Σ|")
    step = max(1, d // 8)
    axes.set_xticks(range(0, d, step))
    axes.set_yticks(range(0, d, step))
    variance = sigma.diagonal()
    axes.set_xlabel(
        f"variance {variance.min():.2f} to {variance.max():.2f} (prior: 1);   "
        f"largest off-diagonal |Σ| {off.max() if d > 1 else 0:.2f} (prior: 0)"
    )
    axes.set_title("Covariance of the codes" + (f": {title}" if title else ""), fontsize=12)
    figure.savefig(path)
    return path


def curves(series: Mapping[str, Sequence[tuple[float, float]]], path: Path, title: str) -> Path:
    """One panel per name in `series`, each a list of `(step, value)`; the axis is logarithmic if positive values span a
    wide range."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, NullFormatter

    columns = min(3, max(1, len(series)))
    rows = math.ceil(len(series) / columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * rows + 0.4), dpi=110, layout="constrained")
    for i, (name, points) in enumerate(series.items()):
        axes = figure.add_subplot(rows, columns, i + 1)
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, color="C0", linewidth=1.3, marker="o" if len(points) < 30 else None, markersize=3)
        if 0 < 20 * min(values) < max(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}" if max(values) < 10 * min(values) else NullFormatter())
        axes.set_title(name, fontsize=11, loc="left")
        axes.set_xlabel("step", fontsize=9)
        axes.tick_params(which="both", labelsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_title(f"{values[-1]:.4g}", loc="right", fontsize=9, color="0.35")
        axes.grid(**GRID)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=12)
    figure.savefig(path)
    return path
