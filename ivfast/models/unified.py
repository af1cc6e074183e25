"""S3, "On Unifying Deep Generative Models": the networks and settings that its GANs and VAEs have in common."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import ivfast

from .. import nets
from ..data.points import POINTS
from ..train.declare import NETWORKS, setting
from ..train.phase import System
from ..train.settings import Settings

LOGVAR = 10.0  # log-variances are clamped to ±10: a standard deviation of e^±5 is far from any posterior's


@dataclass(frozen=True)
class UnifiedSettings(Settings):
    discriminator_width: int = setting(
        1024,
        help="Units per hidden layer of the networks that read images (D, E and classifiers); with --net conv, "
        "channels of their first layer.",
        panel=NETWORKS,
        at_least=1,
    )
    discriminator_depth: int = setting(
        2, help="Hidden layers of the networks that read images, where they are mlps.", panel=NETWORKS, at_least=0
    )


@dataclass(frozen=True)
class LabelledSettings(UnifiedSettings):
    classes: int = setting(10, help="Number of classes; `ivfast train` takes the data set's.", at_least=1)


class Unified(System):
    """Networks that read images, with or without their class: D, E and classifiers are of one architecture."""

    Settings = UnifiedSettings

    def __init__(self, settings: Settings, image_shape: tuple[int, int, int]):
        super().__init__(settings, image_shape)
        self.classes = 0 if self.labels == "none" else settings.classes

    @classmethod
    def preset(cls, data: str) -> dict[str, object]:
        return {**_DCGAN, **_DATA.get(data.partition(":")[0], _IMAGES)}

    def reader(self, outputs: int, classes: int = 0) -> nn.Module:
        """Images with a plane per class `[n, C + classes, H, W]` -> `[n, outputs]`."""
        channels, *side = self.image_shape
        shape, settings = (channels + classes, *side), self.settings
        if settings.net == "mlp":
            return nets.mlp_encoder(shape, outputs, settings.discriminator_width, settings.discriminator_depth)
        return nets.radford_discriminator(shape, outputs, settings.discriminator_width)

    def read(self, name: str, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The reader `name` on images and, where given, their classes `[n, classes]`."""
        if y is not None:
            x = torch.cat([x, y[:, :, None, None].expand(-1, -1, *x.shape[2:])], 1)
        return self.modules[name](x).float()

    def one_hot(self, labels: Tensor) -> Tensor:
        """`[n]` -> `[n, classes]`; a row of zeros for −1, which is no label."""
        return (labels[:, None] == torch.arange(self.classes, device=labels.device)).float()


class Generative(Unified):
    """With a generator G on codes of the prior N(0, I)."""

    def writer(self, classes: int = 0) -> nn.Module:
        """Codes and classes `[n, d + classes]` -> logits of pixels `[n, C, H, W]`."""
        inputs, settings = self.latent_dim + classes, self.settings
        if settings.net == "mlp":
            layers = nets.mlp(inputs, math.prod(self.image_shape), settings.width, settings.depth)
            return nn.Sequential(*layers, nn.Unflatten(1, self.image_shape))
        return nets.radford_generator(inputs, self.image_shape, settings.width)

    def write(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Codes `[n, d]` and, where given, classes `[n, classes]` -> logits of pixels."""
        return self.modules["generator"](z if y is None else torch.cat([z, y], 1)).float()

    def image(self, logits: Tensor) -> Tensor:
        """Logits of pixels -> images in [-1, 1]."""
        raise NotImplementedError

    def posterior(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """μ and log σ² `[n, d]` of the Gaussian q(z|x, y)."""
        mu, logvar = self.read("encoder", x, y).chunk(2, 1)
        return mu, logvar.clamp(-LOGVAR, LOGVAR)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None, labels: Tensor | None = None) -> Tensor:
        """n generated images; of systems with classes those of `labels [n]`, by default the classes in turn.

        The generator as for `prior_codes`.
        """
        z = self.prior_codes(n, generator)
        if not self.classes:
            return self.image(self.write(z))
        labels = torch.arange(n, device=z.device) % self.classes if labels is None else labels
        return self.image(self.write(z, self.one_hot(labels.to(z.device))))


class Bernoulli(Generative):
    """Independent Bernoulli pixels: G gives their logits l, an image in [-1, 1] is of the means, 2 σ(l) − 1.

    Points are of 0 and 1, and their means σ(l).
    """

    @classmethod
    def misfit(cls, data: str) -> str | None:
        if data in POINTS and data != "four-points":
            return f"decodes to Bernoulli means, and {data} does not hold only 0 and 1"
        return super().misfit(data)

    def image(self, logits: Tensor) -> Tensor:
        return (0.5 * logits).tanh() if logits.dim() > 2 else logits.sigmoid()  # 2 σ(l) − 1

    def surprise(self, x: Tensor, z: Tensor, y: Tensor | None = None) -> Tensor:
        """−log p(x|z, y) `[n]`, nats."""
        return ivfast.reconstruction_loss(self.write(z, y), 0.5 * (x + 1) if x.dim() > 2 else x, kind="bce")


# "The DCGAN architecture and hyperparameter setting (Radford et al., 2015)", section 5.1; epochs are not in S3. Images
# keep their size, for bounds that compare with Table 3: MNIST's 28 x 28.
_DCGAN = {
    "net": "conv",
    "width": 128,
    "discriminator_width": 64,
    "latent_dim": 100,
    "batch_size": 128,
    "learning_rates": {"default": 2e-4},
    "betas": (0.5, 0.999),
    "epochs": 100,
}
_IMAGES = {"image_size": 64}
_DIGITS = {  # not in S3
    "net": "mlp",
    "width": 256,
    "discriminator_width": 256,
    "image_size": 8,
    "latent_dim": 16,
    "batch_size": 64,
    "epochs": 250,
    "evaluate_every": 50,
    "save_every": 50,
}
# S4's set; its paper's nets have layers of 512, and say nothing of rates, batches and the length of training
FOUR_POINTS = {
    "net": "mlp",
    "width": 128,
    "discriminator_width": 128,
    "latent_dim": 2,
    "batch_size": 128,
    "learning_rates": {"default": 1e-3},
    "steps": 6000,
    "log_every": 100,
    "evaluate_every": 10,
    "save_every": 10,
}
_DATA = {
    "mnist": {"image_size": 28},
    "fashion-mnist": {"image_size": 28},
    "stacked-mnist": {"image_size": 28},
    "svhn": {"image_size": 32},
    "cifar10": {"image_size": 32},
    "digits": _DIGITS,
    "stacked-digits": {**_DIGITS, "epochs": 10, "evaluate_every": 2, "save_every": 1},
    "four-points": FOUR_POINTS,
}
