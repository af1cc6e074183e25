"""How well images are reconstructed from their codes."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _check
from .systems import BATCH, evaluating, to_float


class Reconstruction(NamedTuple):
    mse: float  # per pixel and channel, images in [0, 1]
    psnr: float  # dB, mean over images
    ssim: float  # mean over images


def reconstruction(system, images: Tensor) -> Reconstruction:
    """Mean squared error, PSNR and SSIM of G(E x) against x, on images in [0, 1]."""
    errors, similarities = [], []
    with evaluating(system) as device:
        for x in images.split(BATCH):
            x = to_float(x.to(device))
            back = system.decode(system.encode(x)).float().clamp(-1, 1)
            errors.append((back - x).div(2).square().flatten(1).mean(1).cpu())  # [batch]
            similarities.append(structural_similarity((back + 1) / 2, (x + 1) / 2).cpu())
    mse = torch.cat(errors).double()
    psnr = float(-10 * mse.clamp_min(1e-10).log10().mean())
    return Reconstruction(float(mse.mean()), psnr, float(torch.cat(similarities).double().mean()))


def structural_similarity(x: Tensor, y: Tensor) -> Tensor:
    """SSIM of each pair of images in [0, 1], float `[n, C, H, W]` -> `[n]`; 1 for equal images.

    Uses a Gaussian window of 11 pixels and standard deviation 1.5 around every pixel, with the image reflected at its
    edges as in torchmetrics; K₁ = .01, K₂ = .03. A side below 6 pixels does not have 5 pixels to reflect, so the window
    is smaller.

    Source: Wang et al. 2004, Eq. 13.
    """
    _check.same("y", y, "x", x)
    n, (height, width) = len(x), x.shape[2:]
    reach = min(5, height - 1, width - 1)
    rows, columns = (_window(side, reach, x) for side in (height, width))
    x, y = x.flatten(0, 1), y.flatten(0, 1)
    planes = torch.cat([x, y, x * x, y * y, x * y])
    means = ((planes @ columns).mT @ rows).reshape(5, n, -1)
    mu_x, mu_y, xx, yy, xy = means.unbind()
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mu_x * mu_y + c1) / (mu_x**2 + mu_y**2 + c1)
    structure = (2 * (xy - mu_x * mu_y) + c2) / (xx - mu_x**2 + yy - mu_y**2 + c2)
    return (luminance * structure).mean(1)


def _window(side: int, reach: int, like: Tensor) -> Tensor:
    """The Gaussian window along a side with reflected edges, as a matrix `[side, side]` that multiplies rows from the
    left."""
    taps = torch.arange(-reach, reach + 1, dtype=like.dtype, device=like.device)
    taps = torch.exp(-taps.square() / (2 * 1.5**2))
    eye = torch.eye(side, dtype=like.dtype, device=like.device)
    return F.pad(eye, (reach, reach), mode="reflect").unfold(1, 2 * reach + 1, 1) @ (taps / taps.sum())
