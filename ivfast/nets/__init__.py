"""The papers' networks, from their tables. Images are float `[B, C, H, W]` in [-1, 1], codes float `[B, d]`.

S1 Tables 3 and 4 and S2 Table 4, for any number of channels and any size from 8. We read S1's Table 4 with stride 2 in
the first three transposed convolutions, a stride-1 output with the image's channels, and FC(d), because the printed
shapes do not fit together. S3 only says that its networks are DCGAN's (Radford et al. 2016, Figure 1). Perceptrons also
take points `[B, D]`, with an `image_shape` of (D,) and unbounded values.
"""

import itertools
import math
from collections import OrderedDict
from collections.abc import Callable

from torch import nn

from ..nn import Linear

SMALLEST_IMAGE = 8


def mlp(inputs: int, outputs: int, width: int, depth: int) -> nn.Sequential:
    """`depth` hidden layers of `width` with ReLU, then a linear layer: `[B, inputs]` -> `[B, outputs]`."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [Linear(inputs, width), nn.ReLU(inplace=True)]
        inputs = width
    return nn.Sequential(*layers, Linear(inputs, outputs))


def mlp_encoder(image_shape: tuple[int, ...], latent_dim: int, width: int = 1024, depth: int = 2) -> nn.Module:
    """S1 Table 3, E."""
    check_shape(image_shape)
    return nn.Sequential(nn.Flatten(), *mlp(math.prod(image_shape), latent_dim, width, depth))


def mlp_decoder(image_shape: tuple[int, ...], latent_dim: int, width: int = 1024, depth: int = 2) -> nn.Module:
    """S1 Table 3, G."""
    check_shape(image_shape)
    layers = mlp(latent_dim, math.prod(image_shape), width, depth)
    if len(image_shape) == 1:
        return layers
    return nn.Sequential(*layers, nn.Tanh(), nn.Unflatten(1, image_shape))


def conv_encoder(image_shape: tuple[int, int, int], latent_dim: int, width: int = 128) -> nn.Module:
    """S1 Table 4, E: 5×5 convolutions of stride 2 down to a side of at most 4, doubling `width` channels."""
    check_image_shape(image_shape)
    channels, *side = image_shape
    layers = OrderedDict()
    out = width
    while max(side) > 4:
        i = len(layers)
        layers[f"down{i}"] = nn.Sequential(
            nn.Conv2d(channels, out, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(out), nn.ReLU()
        )
        side = [(s + 1) // 2 for s in side]
        channels, out = out, min(2 * out, 8 * width)
    layers["flat"] = nn.Flatten()
    layers["code"] = nn.Linear(channels * math.prod(side), latent_dim)
    return nn.Sequential(layers)


def conv_decoder(image_shape: tuple[int, int, int], latent_dim: int, width: int = 128) -> nn.Module:
    """S1 Table 4, G: a linear layer to a side of at most 8, 5×5 transposed convolutions of stride 2, a 4×4 output."""
    check_image_shape(image_shape)
    channels, *side = image_shape
    sides = [side]
    while max(sides[-1]) > 8:
        sides.append([(s + 1) // 2 for s in sides[-1]])
    sides.reverse()
    wide = min(width * 2 ** (len(sides) - 1), 8 * width)
    layers = OrderedDict()
    layers["code"] = nn.Linear(latent_dim, wide * math.prod(sides[0]))
    layers["square"] = nn.Unflatten(1, (wide, *sides[0]))
    for i, (small, large) in enumerate(itertools.pairwise(sides)):
        out = max(wide // 2, width)
        extra = tuple(b - (2 * a - 1) for a, b in zip(small, large, strict=True))
        layers[f"up{i}"] = nn.Sequential(
            nn.ConvTranspose2d(wide, out, 5, stride=2, padding=2, output_padding=extra, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
        )
        wide = out
    # at stride 1 a transposed convolution is a convolution with a flipped kernel; this padding keeps the size
    layers["pad"] = nn.ZeroPad2d((1, 2, 1, 2))
    layers["image"] = nn.Conv2d(wide, channels, 4)
    layers["range"] = nn.Tanh()
    return nn.Sequential(layers)


def mlp_features(image_shape: tuple[int, ...], width: int, depth: int, packing: int = 1) -> nn.Module:
    """The hidden layers of a perceptron discriminator for `packing` concatenated images: `[B, width]`."""
    check_shape(image_shape)
    layers: list[nn.Module] = [nn.Flatten()]
    inputs = packing * math.prod(image_shape)
    for _ in range(depth):
        layers += [Linear(inputs, width), nn.LeakyReLU(0.2, inplace=True)]
        inputs = width
    return nn.Sequential(*layers)


def dcgan_features(
    image_shape: tuple[int, int, int], width: int = 64, packing: int = 1, *, batch_norm: bool = True
) -> nn.Module:
    """S2 Table 4, D before FC(O1): 4×4 convolutions of stride 2 down to a side of at most 4, doubling `width`."""
    layers = _halving(image_shape, width, packing * image_shape[0], lambda first: batch_norm)
    return nn.Sequential(*layers, nn.Flatten())


def dcgan_encoder(image_shape: tuple[int, int, int], latent_dim: int, width: int = 64) -> nn.Module:
    """S2 Table 4, E: like D without the first batch norm, then a convolution over the whole image and batch norm."""
    layers = _halving(image_shape, width, image_shape[0], lambda first: not first)
    sides, channels = _halves(image_shape), _widths(image_shape, width)
    last = nn.Conv2d(channels[-1], latent_dim, sides[-1], bias=False)
    return nn.Sequential(*layers, last, nn.Flatten(), nn.BatchNorm1d(latent_dim))


def dcgan_generator(image_shape: tuple[int, int, int], latent_dim: int, width: int = 64) -> nn.Module:
    """S2 Table 4, G: a transposed convolution from one pixel to a side of at most 4, then others of stride 2."""
    sides, channels = _halves(image_shape), _widths(image_shape, width)
    layers = [nn.Unflatten(1, (latent_dim, 1, 1)), nn.ConvTranspose2d(latent_dim, channels[-1], sides[-1], bias=False)]
    for i in reversed(range(len(channels))):
        layers += [nn.BatchNorm2d(channels[i]), nn.ReLU()]
        out = channels[i - 1] if i else image_shape[0]
        extra = tuple(large - 2 * small for large, small in zip(sides[i], sides[i + 1], strict=True))
        layers += [nn.ConvTranspose2d(channels[i], out, 4, 2, 1, output_padding=extra, bias=i == 0)]
    return nn.Sequential(*layers, nn.Tanh())


def _halves(image_shape: tuple[int, int, int]) -> list[tuple[int, int]]:
    """(H, W), halved until neither exceeds 4."""
    check_image_shape(image_shape)
    sides = [tuple(image_shape[1:])]
    while max(sides[-1]) > 4:
        sides.append(tuple(side // 2 for side in sides[-1]))
    return sides


def _widths(image_shape: tuple[int, int, int], width: int) -> list[int]:
    """Channels after each halving: 64, 128, 256, 512, 512, ..."""
    return [width * min(2**i, 8) for i in range(len(_halves(image_shape)) - 1)]


def _halving(image_shape, width: int, channels: int, norm: Callable[[bool], bool]) -> list[nn.Module]:
    layers = []
    for i, out in enumerate(_widths(image_shape, width)):
        normed = norm(i == 0)
        layers.append(nn.Conv2d(channels, out, 4, stride=2, padding=1, bias=not normed))
        layers += [nn.BatchNorm2d(out)] if normed else []
        layers.append(nn.LeakyReLU(0.2))
        channels = out
    return layers


def check_shape(image_shape: tuple[int, ...]) -> None:
    """Raise ValueError for anything except the shape of an image or the shape (D,) of a point."""
    if len(image_shape) != 1 or image_shape[0] < 1:
        check_image_shape(image_shape)


def radford_discriminator(image_shape: tuple[int, int, int], outputs: int = 1, width: int = 64) -> nn.Module:
    """5×5 convolutions of stride 2 down to a side of at most 4, LeakyReLU(.2), batch norm in all but the first."""
    check_image_shape(image_shape)
    channels, *side = image_shape
    layers = OrderedDict()
    out = width
    while max(side) > 4:
        i = len(layers)
        norm = [nn.BatchNorm2d(out)] if i else []
        layers[f"down{i}"] = nn.Sequential(
            nn.Conv2d(channels, out, 5, stride=2, padding=2, bias=not i), *norm, nn.LeakyReLU(0.2)
        )
        side = [(s + 1) // 2 for s in side]
        channels, out = out, min(2 * out, 8 * width)
    layers["flat"] = nn.Flatten()
    layers["outputs"] = nn.Linear(channels * math.prod(side), outputs)
    return _dcgan_weights(nn.Sequential(layers))


def radford_generator(inputs: int, image_shape: tuple[int, int, int], width: int = 128) -> nn.Module:
    """A linear layer to a side of at most 4, then 5×5 transposed convolutions of stride 2, with batch norm and ReLU.

    It has no last activation: tanh gives a GAN's images, sigmoid a VAE's Bernoulli means.
    """
    check_image_shape(image_shape)
    channels, *side = image_shape
    sides = [side]
    while max(sides[-1]) > 4:
        sides.append([(s + 1) // 2 for s in sides[-1]])
    sides.reverse()
    wide = min(width * 2 ** (len(sides) - 2), 8 * width)
    layers = OrderedDict()
    layers["code"] = nn.Linear(inputs, wide * math.prod(sides[0]), bias=False)
    layers["square"] = nn.Unflatten(1, (wide, *sides[0]))
    for i, (small, large) in enumerate(itertools.pairwise(sides)):
        last = large is sides[-1]
        out = channels if last else max(wide // 2, width)
        extra = tuple(b - (2 * a - 1) for a, b in zip(small, large, strict=True))
        layers[f"up{i}"] = nn.Sequential(
            nn.BatchNorm2d(wide),
            nn.ReLU(),
            nn.ConvTranspose2d(wide, out, 5, stride=2, padding=2, output_padding=extra, bias=last),
        )
        wide = out
    return _dcgan_weights(nn.Sequential(layers))


def _dcgan_weights(network: nn.Module) -> nn.Module:
    """DCGAN's initial weights, N(0, .02²)."""
    for p in network.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.02)
    return network


def check_image_shape(image_shape: tuple[int, int, int]) -> None:
    if len(image_shape) != 3 or image_shape[0] < 1 or min(image_shape[1:]) < SMALLEST_IMAGE:
        raise ValueError(
            f"image_shape must be (C, H, W) with C >= 1 and H, W >= {SMALLEST_IMAGE}, got {tuple(image_shape)}"
        )
