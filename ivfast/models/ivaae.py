"""S1: the intervention adversarial auto-encoder, and the two Wasserstein auto-encoders it is compared with.

recon(x) = mean over the batch of ‖G(E x) − x‖² summed over pixels, images in [-1, 1] (Tolstikhin et al., 2017).
E and G carry recon together and meet no other common term, so one phase moves both on one forward pass.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import ivfast

from .. import nets
from ..data.points import POINTS
from ..train.declare import setting
from ..train.phase import Phase
from ..train.settings import Settings
from .decoding import Decoding
from .networks import DiscriminatorSettings


@dataclass(frozen=True)
class AutoEncoderSettings(Settings):
    lam: float = setting(1.0, help="λ, the weight of the penalty on the codes.", at_least=0, metavar="LAMBDA")
    fld_weight: float = setting(
        0.0,
        help="Add W times the Fréchet latent distance of the batch's codes (S1, section 4) to the encoder's loss. "
        "Use batches several times as large as the latent dimension: smaller ones shrink the codes.",
        at_least=0,
        metavar="W",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.fld_weight and self.batch_size < 2:
            raise ValueError("fld_weight needs a batch_size of at least 2, for the covariance of the codes")


@dataclass(frozen=True)
class WaeGanSettings(DiscriminatorSettings, AutoEncoderSettings):
    pass


@dataclass(frozen=True)
class IvaaeSettings(DiscriminatorSettings, AutoEncoderSettings):
    t: int = setting(
        4,
        help="Bridges after the code itself; D tells T + 1 distributions apart.",
        at_least=1,
        metavar="T",
    )
    lam: float = setting(1.0, help="λ, the weight of the reconstruction.", at_least=0, metavar="LAMBDA")
    mu1: float | None = setting(
        None, help="μ₁, the weight of the discriminator's cross-entropy.", at_least=0, metavar="MU", none="4/(t + 1)"
    )
    mu2: float | None = setting(
        None, help="μ₂, the weight of the encoder's cross-entropy.", at_least=0, metavar="MU", none="2/(t + 1)"
    )
    encoder_loss: str = setting(
        "ascent",
        help="The encoder maximises the cross-entropy (ascent, as in the paper) or fits uniform labels "
        "(confusion, which is bounded).",
        choices=("ascent", "confusion"),
    )


class Encoded(NamedTuple):
    x: Tensor  # [n, C, H, W]
    z: Tensor  # [n, d]
    bridge: Tensor | None = None  # [t+1, n, d]


class AutoEncoder(Decoding):
    """A deterministic encoder and decoder, with a prior N(0, I) on the codes `[n, d]`."""

    Settings = AutoEncoderSettings

    def __init__(self, settings: Settings, image_shape: tuple[int, int, int], discriminator_outputs: int = 0):
        super().__init__(settings, image_shape)
        shape, d, width = self.image_shape, self.latent_dim, settings.width
        if settings.net == "mlp":
            self.modules["encoder"] = nets.mlp_encoder(shape, d, width, settings.depth)
            self.modules["decoder"] = nets.mlp_decoder(shape, d, width, settings.depth)
        else:
            self.modules["encoder"] = nets.conv_encoder(shape, d, width)
            self.modules["decoder"] = nets.conv_decoder(shape, d, width)
        if discriminator_outputs:
            self.modules["discriminator"] = nets.mlp(
                d, discriminator_outputs, settings.discriminator_width, settings.discriminator_depth
            )
        self.to_device()

    @classmethod
    def preset(cls, data: str) -> dict[str, object]:
        name = data.partition(":")[0]
        return {**_S1, **(_POINTS if name in POINTS else _DATA.get(name, _IMAGES))}

    def encode(self, x: Tensor) -> Tensor:
        """Images `[n, C, H, W]` in [-1, 1] -> codes `[n, d]`, float32 under autocast too."""
        return self.modules["encoder"](x).float()

    def discriminate(self, z: Tensor) -> Tensor:
        return self.modules["discriminator"](z).float()

    def share(self, x: Tensor) -> Encoded:
        return Encoded(x, self.encode(x))

    def reconstruction(self, shared: Encoded) -> Tensor:
        return ivfast.reconstruction_loss(self.decode(shared.z), shared.x).mean()

    def latent_distance(self, shared: Encoded) -> dict[str, Tensor]:
        """The term w FLD(E x) over the batch, which the objectives below take on; none where w = 0.

        n <= d codes have n − 1 directions: their FLD is d − n + 1 at best, at a variance of n − 1 in all, where the
        prior's is d. Such a batch draws the codes together.

        Source: S1 section 4 has the distance as a metric.
        """
        w = self.settings.fld_weight
        return {"fld": w * self.ops.fld(shared.z)} if w else {}


class WaeMmd(AutoEncoder):
    """WAE-MMD: recon + λ MMD²_U(E x, z), z ~ N(0, I), inverse multiquadratic kernels."""

    def __init__(self, settings: Settings, image_shape: tuple[int, int, int]):
        super().__init__(settings, image_shape)
        if settings.batch_size < 2:
            raise ValueError(f"batch_size must be at least 2 for the unbiased MMD, got {settings.batch_size}")
        self.phases = [Phase("autoencoder", self.adam("encoder", "decoder"), self.autoencoder_loss)]

    @classmethod
    def preset(cls, data: str) -> dict[str, Any]:
        settings: dict[str, Any] = super().preset(data)
        rates = {name: rate for name, rate in settings["learning_rates"].items() if name != "discriminator"}
        return {**settings, "learning_rates": rates}

    def autoencoder_loss(self, shared: Encoded) -> dict[str, Tensor]:
        mmd = self.ops.mmd(shared.z, self.randn_like(shared.z))
        return {
            "recon": self.reconstruction(shared),
            "mmd": self.settings.lam * mmd,
            **self.latent_distance(shared),
        }


class WaeGan(AutoEncoder):
    """WAE-GAN, also AAE: D tells codes from the prior, E is rewarded for codes that D takes for the prior."""

    Settings = WaeGanSettings

    def __init__(self, settings: Settings, image_shape: tuple[int, int, int]):
        super().__init__(settings, image_shape, discriminator_outputs=1)
        self.phases = [
            Phase("discriminator", self.adam("discriminator"), self.discriminator_loss),
            Phase("autoencoder", self.adam("encoder", "decoder"), self.autoencoder_loss),
        ]

    def discriminator_loss(self, shared: Encoded) -> dict[str, Tensor]:
        z = shared.z.detach()
        prior, code = self.discriminate(torch.cat([self.randn_like(z), z])).chunk(2)
        return {"prior": F.softplus(-prior).mean(), "code": F.softplus(code).mean()}

    def autoencoder_loss(self, shared: Encoded) -> dict[str, Tensor]:
        adversarial = F.softplus(-self.discriminate(shared.z)).mean()
        return {
            "recon": self.reconstruction(shared),
            "adversarial": self.settings.lam * adversarial,
            **self.latent_distance(shared),
        }


class Ivaae(AutoEncoder):
    """IVAAE: D names which of the bridge's distributions T_0 E x, …, T_t E x a point is from; E makes them alike.

    L_D = μ₁ CE,  L_G = λ recon,  L_E = λ recon − μ₂ CE (or + μ₂ CE against the uniform label: `encoder_loss`).
    Codes and bridge are computed once per step; D sees them detached, E through D as D's update has left it (Alg. 1).
    """

    Settings = IvaaeSettings

    def __init__(self, settings: Settings, image_shape: tuple[int, int, int]):
        super().__init__(settings, image_shape, discriminator_outputs=settings.t + 1)
        self.mu1 = 4 / (settings.t + 1) if settings.mu1 is None else settings.mu1
        self.mu2 = 2 / (settings.t + 1) if settings.mu2 is None else settings.mu2
        self.phases = [
            Phase("discriminator", self.adam("discriminator"), self.discriminator_loss),
            Phase("autoencoder", self.adam("encoder", "decoder"), self.autoencoder_loss),
        ]

    @classmethod
    def preset(cls, data: str) -> dict[str, object]:
        settings = super().preset(data)
        # An image of 8 x 8 has a 64th of S1's pixels, and the reconstruction is a sum over them. With this weight a
        # classifier is sure (> .9) of 70 % of ivaae-rad's samples; with λ = 1 and S1's Adam, of 45 %.
        return {**settings, "lam": 0.2} if data == "digits" else settings

    def bridge(self, z: Tensor) -> Tensor:
        """Codes `[n, d]` -> `[t+1, n, d]`."""
        raise NotImplementedError

    def share(self, x: Tensor) -> Encoded:
        z = self.encode(x)
        return Encoded(x, z, self.bridge(z))

    def discriminator_loss(self, shared: Encoded) -> dict[str, Tensor]:
        logits = self.discriminate(shared.bridge.detach().flatten(0, 1))
        return {"intervention": self.mu1 * self.ops.multi_js_loss(logits)}

    def autoencoder_loss(self, shared: Encoded) -> dict[str, Tensor]:
        logits = self.discriminate(shared.bridge.flatten(0, 1))
        if self.settings.encoder_loss == "ascent":
            intervention = -self.ops.multi_js_loss(logits)
        else:
            intervention = self.ops.multi_js_loss(logits, label_smoothing=1.0)
        return {
            "recon": self.settings.lam * self.reconstruction(shared),
            "intervention": self.mu2 * intervention,
            **self.latent_distance(shared),
        }


class IvaaeBlockwise(Ivaae):
    def __init__(self, settings: Settings, image_shape: tuple[int, int, int]):
        super().__init__(settings, image_shape)
        if settings.latent_dim % settings.t:
            raise ValueError(f"t must divide latent_dim = {settings.latent_dim}, got {settings.t}")

    def bridge(self, z: Tensor) -> Tensor:
        return self.ops.blockwise_bridge(z, self.settings.t)


class IvaaeRadial(Ivaae):
    def bridge(self, z: Tensor) -> Tensor:
        return self.ops.radial_bridge(z, self.settings.t)


class IvaaeSvgd(Ivaae):
    """SVGD, two iterations per bridge, bandwidth 100·med²/log n, noise .1 (S1 section 4, "MNIST")."""

    def bridge(self, z: Tensor) -> Tensor:
        return self.ops.svgd_bridge(z, self.settings.t)


_S1 = {
    "learning_rates": {"encoder": 1e-3, "decoder": 1e-3, "discriminator": 5e-4},
    "milestones": {30: 0.5, 50: 0.2, 100: 0.1},  # each on top of the ones before
    "epochs": 300,
    "t": 4,
    "lam": 1.0,
}
_CONV = {"net": "conv", "width": 128, "discriminator_width": 512, "discriminator_depth": 4, "image_size": 64}
_IMAGES = {**_CONV, "latent_dim": 64, "batch_size": 100}
_CIFAR10 = {**_CONV, "latent_dim": 128, "batch_size": 128}
_MNIST = {
    "net": "mlp",
    "width": 1024,
    "discriminator_width": 1024,
    "image_size": 64,
    "latent_dim": 16,
    "batch_size": 64,
    "learning_rates": {"encoder": 5e-5, "decoder": 1e-4, "discriminator": 1e-4},
    "milestones": {100: 0.5, 200: 0.5},
}
# Not in S1. 23 steps per epoch, so that its milestones would come after seconds. Adam's β₁ is .5, as in S2: at S1's .9
# ivaae-rad diverges with the λ below.
_DIGITS = {
    "net": "mlp",
    "width": 256,
    "discriminator_width": 256,
    "image_size": 8,
    "latent_dim": 16,
    "batch_size": 64,
    "epochs": 250,
    "milestones": {150: 0.5, 200: 0.2},
    "betas": (0.5, 0.999),
    "ema": 0.999,
    "evaluate_every": 50,
    "save_every": 50,
}
_POINTS = {
    **_DIGITS,
    "width": 128,
    "discriminator_width": 128,
    "image_size": None,
    "epochs": 20,
    "milestones": {15: 0.2},
    "evaluate_every": 5,
    "save_every": 5,
}
_DATA = {  # what S1 does not name gets the settings of its nearest
    "celeba": _IMAGES,
    "cifar10": _CIFAR10,
    "svhn": _CIFAR10,
    "mnist": _MNIST,
    "fashion-mnist": _MNIST,
    "stacked-mnist": _MNIST,
    "digits": _DIGITS,
    "stacked-digits": {**_DIGITS, "epochs": 10, "milestones": {6: 0.5, 8: 0.2}, "evaluate_every": 2, "save_every": 1},
}
