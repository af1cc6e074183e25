"""S4's networks: encoders that take noise together with the image, and discriminators of pairs (x, z).

Points and small images use perceptrons (section 4, "Synthetic example"). Larger images use DCGAN's convolutions in five
layers (section 4, "MNIST"): noise enters every hidden layer by a projection, and E and T have batch norm but G does
not. Faces (section 4, "celebA") replace every hidden layer of E and G with three residual units, and T is one network
on the image with the code added to each hidden layer.
"""

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import _dcgan_weights, check_image_shape, mlp

HALVINGS = 4  # five layers, including the linear one
UNITS = 3  # residual units per hidden layer


class NoisyPerceptron(nn.Module):
    """E(x, ε) on the concatenated image and noise."""

    def __init__(self, image_shape: tuple[int, ...], noise_dim: int, latent_dim: int, width: int, depth: int):
        super().__init__()
        self.layers = mlp(math.prod(image_shape) + noise_dim, latent_dim, width, depth)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        return self.layers(torch.cat([x.flatten(1), noise], 1))


class NoisyConvolutions(nn.Module):
    """E(x, ε) with 5×5 convolutions of stride 2, doubling `width`: h ← ReLU(norm(conv h) + P ε), with P per layer.

    The projection is added after batch norm, which would otherwise remove its batch mean: a discriminator must see
    where the codes lie. `slope` is that of a leaky ReLU.
    """

    def __init__(
        self, image_shape: tuple[int, int, int], noise_dim: int, latent_dim: int, width: int, slope: float = 0.0
    ):
        super().__init__()
        self.slope = slope
        sides, channels = _halves(image_shape), _channels(image_shape, width)
        pairs = list(itertools.pairwise((image_shape[0], *channels)))
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 5, stride=2, padding=2, bias=False) for a, b in pairs)
        self.projections = nn.ModuleList(nn.Linear(noise_dim, b, bias=False) for _, b in pairs)
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for _, b in pairs)
        self.code = nn.Linear(channels[-1] * math.prod(sides[-1]), latent_dim)
        _dcgan_weights(self.convolutions)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        for convolution, projection, norm in zip(self.convolutions, self.projections, self.norms, strict=True):
            x = F.leaky_relu(norm(convolution(x)) + projection(noise)[:, :, None, None], self.slope)
        return self.code(x.flatten(1))


class ResidualUnit(nn.Module):
    """ReLU(shortcut x + norm(conv ReLU(norm(conv x) + shift))) with 3×3 convolutions (He et al. 2015, Fig. 2).

    The shortcut is a 1×1 convolution if the size changes. Without `norm` the unit is initialised to its shortcut.
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1, norm: bool = True):
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=not norm)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=not norm)
        self.norms = nn.ModuleList(nn.BatchNorm2d(outputs) if norm else nn.Identity() for _ in range(2))
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        for convolution in (self.first, self.second):
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        if not norm:
            nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        h = (self.norms[0](self.first(x)) + shift).relu()
        return (self.shortcut(x) + self.norms[1](self.second(h))).relu()


class NoisyResidualUnits(nn.Module):
    """E(x, ε) with three residual units for each layer of `NoisyConvolutions`; P ε enters the first of them."""

    def __init__(self, image_shape: tuple[int, int, int], noise_dim: int, latent_dim: int, width: int):
        super().__init__()
        sides, channels = _halves(image_shape), _channels(image_shape, width)
        pairs = list(itertools.pairwise((image_shape[0], *channels)))
        self.halving = nn.ModuleList(ResidualUnit(a, b, stride=2) for a, b in pairs)
        self.following = nn.ModuleList(nn.Sequential(*(ResidualUnit(b, b) for _ in range(UNITS - 1))) for _, b in pairs)
        self.projections = nn.ModuleList(nn.Linear(noise_dim, b, bias=False) for _, b in pairs)
        self.code = nn.Linear(channels[-1] * math.prod(sides[-1]), latent_dim)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        for halving, following, projection in zip(self.halving, self.following, self.projections, strict=True):
            x = following(halving(x, projection(noise)[:, :, None, None]))
        return self.code(x.flatten(1))


class Joined(nn.Module):
    """T(x, z) as one network on the image, with a projection of the code added to each hidden layer."""

    def __init__(self, image_shape: tuple[int, int, int], latent_dim: int, width: int):
        super().__init__()
        self.network = NoisyConvolutions(image_shape, latent_dim, 1, width, slope=0.2)

    def forward(self, x: Tensor, *codes: Tensor) -> list[Tensor]:
        """Images and sets of codes `[n, d]` -> `[n]` for each set."""
        return [self.network(x, z)[:, 0].float() for z in codes]


class InnerProduct(nn.Module):
    """T(x, z) = ⟨f(x), g(z)⟩; f's features are reused for every z of an image."""

    def __init__(self, of_image: nn.Module, of_code: nn.Module):
        super().__init__()
        self.of_image, self.of_code = of_image, of_code

    def forward(self, x: Tensor, *codes: Tensor) -> list[Tensor]:
        """Images and sets of codes `[n, d]` -> `[n]` for each set."""
        features = self.of_image(x).float()
        return [(features * self.of_code(z).float()).sum(1) for z in codes]


def mlp_pairs(image_shape: tuple[int, ...], latent_dim: int, width: int, depth: int) -> InnerProduct:
    """Two perceptrons with `depth` hidden layers of `width` units, which is also the length of their outputs."""
    of_image = nn.Sequential(nn.Flatten(), *mlp(math.prod(image_shape), width, width, depth))
    return InnerProduct(of_image, mlp(latent_dim, width, width, depth))


def conv_pairs(image_shape: tuple[int, int, int], latent_dim: int, width: int, features: int) -> InnerProduct:
    """Convolutions with batch norm on the image, one hidden layer on the code, both to `features`."""
    channels, sides = _channels(image_shape, width), _halves(image_shape)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise((image_shape[0], *channels)):
        layers += [nn.Conv2d(before, after, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(after)]
        layers.append(nn.LeakyReLU(0.2))
    convolutions = _dcgan_weights(nn.Sequential(*layers))
    of_image = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(channels[-1] * math.prod(sides[-1]), features))
    return InnerProduct(of_image, mlp(latent_dim, features, features, 1))


def conv_generator(latent_dim: int, image_shape: tuple[int, int, int], width: int) -> nn.Sequential:
    """A linear layer and 5×5 transposed convolutions of stride 2, with ReLU and no batch norm: logits of pixels."""
    channels, sides = _channels(image_shape, width), _halves(image_shape)
    layers = _smallest(latent_dim, channels[-1], sides[-1])
    outputs = (image_shape[0], *channels)
    for i in reversed(range(len(channels))):
        extra = tuple(large - (2 * small - 1) for large, small in zip(sides[i], sides[i + 1], strict=True))
        turned = nn.ConvTranspose2d(channels[i], outputs[i], 5, stride=2, padding=2, output_padding=extra)
        layers += [nn.ReLU(), turned]
    return nn.Sequential(*layers)


def residual_generator(latent_dim: int, image_shape: tuple[int, int, int], width: int) -> nn.Sequential:
    """A linear layer, then at each doubling of the side three residual units without batch norm: logits of pixels."""
    channels, sides = _channels(image_shape, width), _halves(image_shape)
    layers = _smallest(latent_dim, channels[-1], sides[-1])
    outputs = (channels[0], *channels)
    for i in reversed(range(len(channels))):
        layers += [nn.Upsample(sides[i]), ResidualUnit(channels[i], outputs[i], norm=False)]
        layers += [ResidualUnit(outputs[i], outputs[i], norm=False) for _ in range(UNITS - 1)]
    return nn.Sequential(*layers, nn.Conv2d(channels[0], image_shape[0], 3, padding=1))


def _smallest(latent_dim: int, channels: int, side: tuple[int, int]) -> list[nn.Module]:
    """A generator's first layers: codes `[n, d]` -> `[n, channels, *side]`."""
    return [nn.Linear(latent_dim, channels * math.prod(side)), nn.Unflatten(1, (channels, *side))]


def _halves(image_shape: tuple[int, int, int]) -> list[tuple[int, int]]:
    """(H, W), halved (rounding up) at most four times, until neither exceeds 2."""
    check_image_shape(image_shape)
    sides = [tuple(image_shape[1:])]
    while len(sides) <= HALVINGS and max(sides[-1]) > 2:
        sides.append(tuple((side + 1) // 2 for side in sides[-1]))
    return sides


def _channels(image_shape: tuple[int, int, int], width: int) -> list[int]:
    """After each halving: width, 2 width, 4 width, 8 width."""
    return [width * 2**i for i in range(len(_halves(image_shape)) - 1)]
