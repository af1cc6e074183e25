"""S2: the intervention GAN, and the cures of mode collapse with an encoder whose results it quotes.

O_i substitutes noise for block i of k of a code; E reads codes off images; f, on the discriminator's own features,
names the i of x' = G(O_i(E x)). In every loss here D(·) is a logit.

L_recon is a mean over pixels and over codes, not Eq. 5's sum: at Table 5's λ = .25 a sum over 3·64² pixels would be
thousands of times the adversarial loss. E meets no adversarial term, so one phase moves E and G on one forward pass.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ivfast

from .. import nets
from ..train.declare import setting
from .gan import Drawn, Gan, GanSettings, LsGan


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
    table5: ClassVar = {"learning_rates": {"default": 2e-4, "encoder": 1e-2}, "lam": 0.25, "lam2": 0.25}

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
    table5: ClassVar = {"learning_rates": {"default": 2e-4}, "lam": 1.0}

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
    table5: ClassVar = {"learning_rates": {"default": 2e-4, "encoder": 5e-3}, "mu": 0.5, "lam": 0.25, "k": 4}

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
