"""S2: the intervention GAN, the GANs it is compared with, and the cures of mode collapse whose results it quotes.

O_i substitutes noise for block i of k of a code; E reads codes off images; f, on the discriminator's own features,
names the i of x' = G(O_i(E x)). In every loss here D(·) is a logit.

L_recon is a mean over pixels and over codes, not Eq. 5's sum: at Table 5's λ = .25 a sum over 3·64² pixels would be
thousands of times the adversarial loss. E meets no adversarial term, so one phase moves E and G on one forward pass.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import ivfast

from .. import nets
from ..data.points import POINTS
from ..train.declare import setting
from ..train.phase import Phase, System
from ..train.settings import Settings
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


@dataclass(frozen=True)
class MrGanSettings(GanSettings):
    lam: float = setting(1.0, help="λ₁, the weight of the reconstruction.", at_least=0, metavar="LAMBDA")
    lam2: float = setting(0.25, help="λ₂, the weight of −log D(G(E x)).", at_least=0, metavar="LAMBDA")


@dataclass(frozen=True)
class VeeGanSettings(GanSettings):
    lam: float = setting(1.0, help="Weight of the reconstruction of the noise.", at_least=0, metavar="LAMBDA")


@dataclass(frozen=True)
class IvDcganSettings(GanSettings):
    k: int = setting(4, help="Blocks of a code, one of which is replaced by noise.", at_least=1, metavar="K")
    lam: float = setting(1.0, help="λ, the weight of the reconstruction.", at_least=0, metavar="LAMBDA")
    mu: float = setting(0.5, help="μ, the weight of the classifier's cross-entropy.", at_least=0, metavar="MU")
    encoder_loss: str = setting(
        "ascent",
        help="The encoder maximises the cross-entropy (ascent, as in the paper) or fits uniform labels "
        "(confusion, which is bounded).",
        choices=("ascent", "confusion"),
    )
    code_reconstruction: str = setting(
        "prior", help="The codes that E(G(w)) must recover: O_i(z) (prior) or O_i(E x) (codes).",
        choices=("prior", "codes"),
    )  # fmt: skip


class Drawn(NamedTuple):
    x: Tensor  # [n, *image_shape]
    z: Tensor  # [n, d], from the prior
    fake: Tensor  # G(z)
    block: Tensor | None = None  # i [n / packing], from 0 to k − 1
    code: Tensor | None = None  # E x [n, d]
    substituted: Tensor | None = None  # O_i(E x) [n, d]
    intervened: Tensor | None = None  # x' = G(O_i(E x))


class Gan(System):
    """DCGAN: L_D = −log σ(D(x)) − log(1 − σ(D(G z))), L_G = −log σ(D(G z)), z ~ N(0, I).

    Source: S2 Eq. 1; Goodfellow et al. 2014 for the non-saturating L_G; Radford et al. 2015.
    """

    Settings = GanSettings
    second_order = ()  # phases whose loss differentiates twice, which torch.compile cannot
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
        return {**_S2, **_TABLE5[cls], **_data(data.partition(":")[0])}

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

    def decode(self, z: Tensor) -> Tensor:
        """Codes `[n, d]` -> images `[n, C, H, W]` in [-1, 1], or points."""
        return self.modules["generator"](z).float()

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n images from the prior, `[n, C, H, W]` or points `[n, D]`; the generator as for `prior_codes`."""
        return self.decode(self.prior_codes(n, generator))

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


class UnrolledGan(Gan):
    """Unrolled GAN: L_G(θ_G, θ_D^K) after K steps θ_D^{j+1} = θ_D^j − η ∇L_D that depend on θ_G; D takes its own one.

    Source: Metz et al. 2017, section 2.2, with plain gradient steps as they are written.
    """

    Settings = UnrolledGanSettings
    second_order = ("generator",)

    def __init__(self, settings: Settings, image_shape: tuple[int, ...]):
        super().__init__(settings, image_shape)
        self.rate = self.learning_rate("unrolled")

    @classmethod
    def preset(cls, data: str) -> dict[str, object]:
        settings = super().preset(data)
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


class EncodingGan(Gan):
    """A GAN with an encoder from images to codes."""

    def networks(self) -> dict[str, nn.Module]:
        s, networks = self.settings, super().networks()
        if s.net == "mlp":
            networks["encoder"] = nets.mlp_encoder(self.image_shape, self.latent_dim, s.width, s.depth)
        else:
            networks["encoder"] = nets.dcgan_encoder(self.image_shape, self.latent_dim, s.width)
        return networks

    def encode(self, x: Tensor) -> Tensor:
        """Images `[n, C, H, W]` in [-1, 1], or points -> codes `[n, d]`."""
        return self.modules["encoder"](x).float()


class MrGan(EncodingGan):
    """MRGAN: L_D as DCGAN's, L_{G,E} = L_G + λ₁ ‖x − G(E x)‖² − λ₂ log σ(D(G(E x))).

    Source: Che et al. 2016, "Regularized-GAN", whose λ₂ term is printed without its minus sign.
    """

    Settings = MrGanSettings

    def generator_loss(self, shared: Drawn) -> dict[str, Tensor]:
        back = self.decode(self.encode(shared.x))
        return {
            **super().generator_loss(shared),
            "recon": self.settings.lam * _mean_distance(back, shared.x, "l2"),
            "modes": self.settings.lam2 * self.deceiving(self.discriminate(back)),
        }


class VeeGan(EncodingGan):
    """VEEGAN: D tells (z, G z) from (E x, x); L_G = D(z, G z) + λ ‖z − E(G z)‖², L_E = λ ‖z − E(G z)‖².

    Source: Srivastava et al. 2017, Alg. 1, with a deterministic E.
    """

    Settings = VeeGanSettings

    def head(self) -> nn.Module:
        codes = self.settings.packing * self.latent_dim
        return nets.mlp(self.features + codes, 1, self.settings.discriminator_width, 1)

    def discriminate_pairs(self, z: Tensor, x: Tensor) -> Tensor:
        discriminator = self.modules["discriminator"]
        features = discriminator.features(self.seen(x)).float()
        return discriminator.head(torch.cat([features, self.pack(z)], 1)).float()

    def discriminator_loss(self, shared: Drawn) -> dict[str, Tensor]:
        with torch.no_grad():
            code = self.encode(shared.x)
        generated = self.discriminate_pairs(shared.z, shared.fake.detach())
        encoded = self.discriminate_pairs(code, shared.x)
        return {"generated": F.softplus(-generated).mean(), "encoded": F.softplus(encoded).mean()}

    def generator_loss(self, shared: Drawn) -> dict[str, Tensor]:
        code = ivfast.reconstruction_loss(self.encode(shared.fake), shared.z).mean()
        return {
            "adversarial": self.discriminate_pairs(shared.z, shared.fake).mean(),
            "code": self.settings.lam * code,
        }


class IvDcgan(EncodingGan):
    """IVDCGAN: a GAN whose generator makes the distributions of x' = G(O_i(E x)) alike, i = 1..k (Alg. 1).

    L_{D,f} = L_D + μ CE,  L_G = L_G + λ L_recon − μ CE,  L_E = λ L_recon − μ CE (or + μ CE against the uniform label:
    `encoder_loss`),  CE = −log f_i(x'),  L_recon = ‖G(E x) − x‖₁ + ‖E(G w) − w‖₁ with w = O_i(z).

    Source: S2 Eqs. 3, 5 and 6.
    """

    Settings = IvDcganSettings

    def __init__(self, settings: Settings, image_shape: tuple[int, ...]):
        super().__init__(settings, image_shape)
        if settings.latent_dim % settings.k:
            raise ValueError(f"k must divide latent_dim = {settings.latent_dim}, got {settings.k}")

    def networks(self) -> dict[str, nn.Module]:
        return {**super().networks(), "classifier": nn.Linear(self.features, self.settings.k)}

    def share(self, x: Tensor) -> Drawn:
        s, drawn = self.settings, super().share(x)
        code = self.encode(x)
        block = self.randint(s.k, len(x) // s.packing)  # one for all samples of a pack
        index = block.repeat_interleave(s.packing)
        substituted = ivfast.block_substitute(code, s.k, index, draws=self.randn_like(code))
        return drawn._replace(block=block, code=code, substituted=substituted, intervened=self.decode(substituted))

    def block_logits(self, x: Tensor) -> Tensor:
        """Logits of f, on D's features."""
        return self.modules["classifier"](self.modules["discriminator"].features(self.seen(x))).float()

    def discriminator_loss(self, shared: Drawn) -> dict[str, Tensor]:
        cross_entropy = F.cross_entropy(self.block_logits(shared.intervened.detach()), shared.block)
        return {**super().discriminator_loss(shared), "intervention": self.settings.mu * cross_entropy}

    def generator_loss(self, shared: Drawn) -> dict[str, Tensor]:
        s, logits = self.settings, self.block_logits(shared.intervened)
        if s.encoder_loss == "ascent":
            intervention = -F.cross_entropy(logits, shared.block)
        else:
            intervention = F.cross_entropy(logits, shared.block, label_smoothing=1.0)
        if s.code_reconstruction == "prior":  # O_i(z) ~ z (Definition 1), so z itself serves, and the G(z) at hand
            w, image = shared.z, shared.fake
        else:
            w, image = shared.substituted, shared.intervened
        return {
            **super().generator_loss(shared),
            "recon": s.lam * _mean_distance(self.decode(shared.code), shared.x, "l1"),
            "code": s.lam * _mean_distance(self.encode(image), w, "l1"),
            "intervention": s.mu * intervention,
        }


class IvLsgan(IvDcgan, LsGan):
    """IVLSGAN: IVDCGAN with LSGAN's L_D and L_G. Source: S2 section 3."""


def _mean_distance(output: Tensor, target: Tensor, kind: str) -> Tensor:
    return ivfast.reconstruction_loss(output, target, kind=kind).mean() / target[0].numel()


def _data(name: str) -> dict[str, object]:
    """The settings for a data set; what S2 does not name gets those of its nearest."""
    if name in POINTS:
        return _POINTS
    return {"digits": _DIGITS, "stacked-digits": _STACKED_DIGITS, "stacked-mnist": _STACKED_MNIST}.get(name, _IMAGES)


# Learning rates and weights of S2 Table 5, for images. The quoted systems are not in it.
_TABLE5 = {
    Gan: {"learning_rates": {"default": 1e-4}},
    LsGan: {"learning_rates": {"default": 2e-4}},
    WganGp: {"learning_rates": {"default": 1e-4}, "betas": (0.5, 0.9), "discriminator_steps": 5, "penalty": 10.0},
    MrGan: {"learning_rates": {"default": 2e-4, "encoder": 1e-2}, "lam": 0.25, "lam2": 0.25},
    IvDcgan: {"learning_rates": {"default": 2e-4, "encoder": 5e-3}, "mu": 0.5, "lam": 0.25, "k": 4},
    IvLsgan: {"learning_rates": {"default": 2e-4, "encoder": 5e-3}, "mu": 0.5, "lam": 0.25, "k": 4},
    PacDcgan: {"learning_rates": {"default": 2e-4}, "packing": 2},
    VeeGan: {"learning_rates": {"default": 2e-4}, "lam": 1.0},
    UnrolledGan: {"learning_rates": {"default": 1e-4}, "unroll": 5},
}
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
