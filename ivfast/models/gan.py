"""S2: the GANs that the intervention GAN is compared with. In every loss here D(·) is a logit."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from .. import nets
from ..data.points import POINTS
from ..train.declare import setting
from ..train.phase import Phase
from ..train.settings import Settings
from .decoding import Decoding
from .networks import DiscriminatorSettings


@dataclass(frozen=True)
class GanSettings(DiscriminatorSettings, Settings):
    packing: int = setting(
        1, help="Samples that the discriminator judges together; must divide the batch size.", at_least=1, metavar="M"
    )
    instance_noise: float = setting(
        0.0, help="Standard deviation of the noise on everything that the discriminator sees.", at_least=0
    )
    discriminator_steps: int = setting(1, help="Discriminator steps per generator step.", at_least=1)


@dataclass(frozen=True)
class WganGpSettings(GanSettings):
    penalty: float = setting(10.0, help="λ, the weight of the gradient penalty.", at_least=0, metavar="LAMBDA")


@dataclass(frozen=True)
class UnrolledGanSettings(GanSettings):
    unroll: int = setting(
        5,
        help='Discriminator steps that the generator looks ahead, at the learning rate "unrolled".',
        at_least=0,
    )


class Drawn(NamedTuple):
    x: Tensor  # [n, *image_shape]
    z: Tensor  # [n, d], from the prior
    fake: Tensor  # G(z)
    block: Tensor | None = None  # i [n / packing], from 0 to k − 1
    code: Tensor | None = None  # E x [n, d]
    substituted: Tensor | None = None  # O_i(E x) [n, d]
    intervened: Tensor | None = None  # x' = G(O_i(E x))


class Gan(Decoding):
    """DCGAN: L_D = −log σ(D(x)) − log(1 − σ(D(G z))), L_G = −log σ(D(G z)), z ~ N(0, I).

    Source: S2 Eq. 1; Goodfellow et al. 2014 for the non-saturating L_G; Radford et al. 2015.
    """

    Settings = GanSettings
    # rates and weights for images, of S2 Table 5 where the system is in it
    table5: ClassVar[dict[str, Any]] = {"learning_rates": {"default": 1e-4}}
    second_order = ()  # phases whose loss differentiates twice, which torch.compile cannot
    decoder = "generator"
    batch_norm = True  # in a convolutional D

    def __init__(self, settings: Settings, image_shape: tuple[int, ...]):
        super().__init__(settings, image_shape)
        if settings.batch_size % settings.packing:
            raise ValueError(f"packing must divide batch_size = {settings.batch_size}, got {settings.packing}")
        self.packing = settings.packing
        self.modules = self.networks()
        self.to_device()
        judges = [name for name in self.modules if name in ("discriminator", "classifier")]
        makers = [name for name in self.modules if name not in judges]
        self.phases = [
            Phase("discriminator", self.adam(*judges), self.discriminator_loss),
            Phase("generator", self.adam(*makers), self.generator_loss, interval=settings.discriminator_steps),
        ]
        for phase in self.phases:
            phase.compile = phase.name not in self.second_order

    @classmethod
    def preset(cls, data: str) -> dict[str, object]:
        return {**_S2, **cls.table5, **_data(data.partition(":")[0])}

    def networks(self) -> dict[str, nn.Module]:
        s, shape, d = self.settings, self.image_shape, self.latent_dim
        if s.net == "mlp":
            generator = nets.mlp_decoder(shape, d, s.width, s.depth)
            features = nets.mlp_features(shape, s.discriminator_width, s.discriminator_depth, s.packing)
        else:
            generator = nets.dcgan_generator(shape, d, s.width)
            features = nets.dcgan_features(shape, s.width, s.packing, batch_norm=self.batch_norm)
        packed = torch.zeros(2, s.packing * shape[0], *shape[1:])
        with torch.no_grad():
            self.features = features.eval()(packed).shape[1]
        discriminator = nn.Sequential(OrderedDict(features=features.train(), head=self.head()))
        return {"generator": generator, "discriminator": discriminator}

    def head(self) -> nn.Module:
        return nn.Linear(self.features, 1)

    def share(self, x: Tensor) -> Drawn:
        z = self.randn(len(x), self.latent_dim)
        return Drawn(x, z, self.decode(z))

    def pack(self, x: Tensor) -> Tensor:
        """PacGAN: m samples side by side in channels, `[n, C, ...]` -> `[n/m, m·C, ...]`."""
        m = self.packing
        return x if m == 1 else x.reshape(len(x) // m, m * x.shape[1], *x.shape[2:])

    def seen(self, x: Tensor) -> Tensor:
        """What the discriminator sees of x: packed, under instance noise (Jenni & Favaro 2019)."""
        noise = self.settings.instance_noise
        return self.pack(x + noise * self.randn_like(x) if noise else x)

    def discriminate(self, x: Tensor) -> Tensor:
        return self.modules["discriminator"](self.seen(x)).float()

    def real_or_fake(self, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        """L_D of the logits of images and of samples."""
        return {"real": F.softplus(-real).mean(), "fake": F.softplus(fake).mean()}

    def deceiving(self, fake: Tensor) -> Tensor:
        """L_G of the logits of samples."""
        return F.softplus(-fake).mean()

    def discriminator_loss(self, shared: Drawn) -> dict[str, Tensor]:
        return self.real_or_fake(self.discriminate(shared.x), self.discriminate(shared.fake.detach()))

    def generator_loss(self, shared: Drawn) -> dict[str, Tensor]:
        return {"adversarial": self.deceiving(self.discriminate(shared.fake))}


class LsGan(Gan):
    """LSGAN: L_D = (D(x) − 1)² + (D(G z) + 1)², L_G = D(G z)², whose optimum minimises the Pearson χ² divergence.

    Source: Mao et al. 2016, with a = −1, b = 1, c = 0.
    """

    table5: ClassVar = {"learning_rates": {"default": 2e-4}}

    def real_or_fake(self, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        return {"real": (real - 1).square().mean(), "fake": (fake + 1).square().mean()}

    def deceiving(self, fake: Tensor) -> Tensor:
        return fake.square().mean()


class WganGp(Gan):
    """WGAN-GP: L_D = D(G z) − D(x) + λ (‖∇D(x̂)‖ − 1)², L_G = −D(G z); n_dis steps of D, a batch each, for one of G.

    D has no batch norm: the penalty is on the gradient of each sample by itself.

    Source: Gulrajani et al. 2017, Alg. 1.
    """

    Settings = WganGpSettings
    table5: ClassVar = {
        "learning_rates": {"default": 1e-4},
        "betas": (0.5, 0.9),
        "discriminator_steps": 5,
        "penalty": 10.0,
    }
    second_order = ("discriminator",)
    batch_norm = False

    def head(self) -> nn.Module:
        return nn.Linear(self.features, 1, bias=False)  # L_D does not depend on a constant

    def real_or_fake(self, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        return {"real": -real.mean(), "fake": fake.mean()}

    def deceiving(self, fake: Tensor) -> Tensor:
        return -fake.mean()

    def discriminator_loss(self, shared: Drawn) -> dict[str, Tensor]:
        penalty = self.gradient_penalty(self.pack(shared.x), self.pack(shared.fake.detach()))
        return {**super().discriminator_loss(shared), "penalty": self.settings.penalty * penalty}

    def gradient_penalty(self, real: Tensor, fake: Tensor) -> Tensor:
        """E (‖∇D(x̂)‖ − 1)² at x̂ = ε x + (1 − ε) G(z), ε ~ U(0, 1)."""
        share = self.rand(len(real), *[1] * (real.dim() - 1))
        between = torch.lerp(fake, real, share).requires_grad_()
        total = self.modules["discriminator"](between).float().sum()
        (slope,) = torch.autograd.grad(total, between, create_graph=True)
        return (slope.flatten(1).norm(dim=1) - 1).square().mean()


class PacDcgan(Gan):
    """PacDCGAN: DCGAN whose discriminator judges two samples side by side. Source: Lin et al. 2018."""

    table5: ClassVar = {"learning_rates": {"default": 2e-4}, "packing": 2}


class UnrolledGan(Gan):
    """Unrolled GAN: L_G(θ_G, θ_D^K) after K steps θ_D^{j+1} = θ_D^j − η ∇L_D that depend on θ_G; D takes its own one.

    Source: Metz et al. 2017, section 2.2, with plain gradient steps as they are written.
    """

    Settings = UnrolledGanSettings
    table5: ClassVar = {"learning_rates": {"default": 1e-4}, "unroll": 5}
    second_order = ("generator",)

    def __init__(self, settings: Settings, image_shape: tuple[int, ...]):
        super().__init__(settings, image_shape)
        self.rate = self.learning_rate("unrolled")

    @classmethod
    def preset(cls, data: str) -> dict[str, Any]:
        settings: dict[str, Any] = super().preset(data)
        return {**settings, "learning_rates": {**settings["learning_rates"], "unrolled": 0.1}}

    def generator_loss(self, shared: Drawn) -> dict[str, Tensor]:
        rate, discriminator = self.rate, self.modules["discriminator"]
        weights = {name: weight.detach().requires_grad_() for name, weight in discriminator.named_parameters()}

        def unrolled(x):
            return functional_call(discriminator, weights, (self.seen(x),)).float()

        for _ in range(self.settings.unroll):
            loss = sum(self.real_or_fake(unrolled(shared.x), unrolled(shared.fake)).values())
            slopes = self.mean_over_parts(torch.autograd.grad(loss, list(weights.values()), create_graph=True))
            weights = {name: w - rate * g for (name, w), g in zip(weights.items(), slopes, strict=True)}
        return {"adversarial": self.deceiving(unrolled(shared.fake))}


def _data(name: str) -> dict[str, object]:
    """The settings for a data set; what S2 does not name gets those of its nearest."""
    if name in POINTS:
        return _POINTS
    return {"digits": _DIGITS, "stacked-digits": _STACKED_DIGITS, "stacked-mnist": _STACKED_MNIST}.get(name, _IMAGES)


_S2 = {"batch_size": 64, "betas": (0.5, 0.999)}
# S2 gives neither the length of training nor the deviation of the instance noise
_IMAGES = {
    "net": "conv",
    "width": 64,
    "discriminator_width": 512,
    "image_size": 64,
    "latent_dim": 100,
    "instance_noise": 0.1,
    "epochs": 100,
}
_STACKED_MNIST = {**_IMAGES, "steps": 100_000}
_SMALL = {"net": "mlp", "latent_dim": 16, "ema": 0.999}
_DIGITS = {
    **_SMALL,
    "width": 256,
    "discriminator_width": 256,
    "image_size": 8,
    "instance_noise": 0.1,
    "epochs": 250,
    "evaluate_every": 50,
    "save_every": 50,
}
_STACKED_DIGITS = {**_DIGITS, "epochs": 10, "evaluate_every": 2, "save_every": 1}
# At Table 5's rates no sample is within 3 deviations of a mode of the ring after 4,000 steps.
_POINTS = {
    **_SMALL,
    "width": 128,
    "discriminator_width": 128,
    "batch_size": 128,
    "epochs": 30,
    "learning_rates": {"default": 1e-3},
}
