"""S4, Adversarial Variational Bayes: a VAE whose posterior is a network of the image and noise, z_φ(x, ε).

Its divergence from the prior has no formula; a discriminator T of pairs (x, z) learns it:

  L_T  = softplus(−T(x, z_φ(x, ε))) + softplus(T(x, z)),  z ~ p,  whose minimum is T* = log q(z|x) − log p(z),
  L_θφ = T(x, z_φ(x, ε)) − log p_θ(x|z_φ(x, ε)).

Algorithm 1 prints both terms of L_T at z_φ, and descends where L_T's negative is to be ascended.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.points import POINTS
from ..nets import noisy
from ..train.declare import NETWORKS, setting
from ..train.phase import Phase
from ..train.settings import Settings
from .networks import DiscriminatorSettings
from .unified import FOUR_POINTS, Bernoulli

ROWS = 512  # images times draws of ε that pass through the encoder at a time where no batch norm looks at them together
FLOOR = 1e-6  # of the deviations that whiten a code: a posterior that has shrunk to a point stays finite


@dataclass(frozen=True)
class AvbSettings(DiscriminatorSettings, Settings):
    net: str = setting(
        "mlp",
        help="Fully connected, convolutional, or residual networks (S4's for faces).",
        panel=NETWORKS,
        choices=("mlp", "conv", "residual"),
    )
    noise_dim: int = setting(
        16, help="Dimensions of the noise ε that the encoder reads with the image.", panel=NETWORKS, at_least=1
    )
    contrast: str = setting(
        "prior",
        help="What the discriminator compares codes with: the prior, or a Gaussian with the mean and variance of each "
        "posterior (adaptive).",
        choices=("prior", "adaptive"),
    )
    contrast_draws: int = setting(8, help="Draws of ε per image for the moments of adaptive contrast.", at_least=2)
    divergence: str = setting(
        "js", help="The discriminator's objective: a GAN's (js), or an f-GAN's (kl, S4 Eq. 5.10).", choices=("js", "kl")
    )
    discriminator_steps: int = setting(1, help="Discriminator steps per step of encoder and decoder.", at_least=1)


class Encoded(NamedTuple):
    x: Tensor  # [n, *image_shape]
    z: Tensor  # z_φ(x, ε) [n, d]
    contrast: Tensor  # [n, d], of N(0, I): what T tells codes from
    mean: Tensor | None = None  # [n, d], of q(z|x), where the contrast is adaptive
    deviation: Tensor | None = None  # [n, d]


class Avb(Bernoulli):
    """E(x, ε) with T against the prior or, by `contrast="adaptive"`, against a Gaussian of the posterior's own moments.

    Adaptive contrast. With r(z|x) = N(μ(x), σ²(x)), the moments of q(z|x) over `contrast_draws` draws of ε, T sees the
    code whitened, z̃ = (z − μ)/σ, and tells it from N(0, I): T* = log q(z|x) − log r(z|x), zero for a Gaussian q. Then

      L_θφ = T(x, z̃) + log r(z|x) − log p(z) − log p_θ(x|z),

    with the moments held constant: at T* the derivative of the first two terms by μ and σ has the mean 0, as in
    Proposition 2.
    Source: section 4 of the later edition of S4 (Mescheder et al., ICML 2017).

    By `divergence="kl"` L_T = exp(T(x, z) − 1) − T(x, z_φ), whose minimum is T* = 1 + log q(z|x) − log p(z) (S4
    Eq. 5.10).
    """

    Settings = AvbSettings

    def __init__(self, settings: AvbSettings, image_shape: tuple[int, ...]):
        super().__init__(settings, image_shape)
        s, shape, d = settings, self.image_shape, self.latent_dim
        if s.net == "mlp":
            encoder = noisy.NoisyPerceptron(shape, s.noise_dim, d, s.width, s.depth)
            generator = self.writer()
            pairs = noisy.mlp_pairs(shape, d, s.discriminator_width, s.discriminator_depth)
        elif s.net == "residual":
            encoder = noisy.NoisyResidualUnits(shape, s.noise_dim, d, s.width)
            generator = noisy.residual_generator(d, shape, s.width)
            pairs = noisy.Joined(shape, d, s.width)
        else:
            encoder = noisy.NoisyConvolutions(shape, s.noise_dim, d, s.width)
            generator = noisy.conv_generator(d, shape, s.width)
            pairs = noisy.conv_pairs(shape, d, s.width, s.discriminator_width)
        self.modules = {"encoder": encoder, "generator": generator, "discriminator": pairs}
        self.to_device()
        self.adaptive = s.contrast == "adaptive"
        self.phases = [
            Phase("discriminator", self.adam("discriminator"), self.discriminator_loss),
            Phase(
                "autoencoder",
                self.adam("encoder", "generator"),
                self.autoencoder_loss,
                interval=s.discriminator_steps,
            ),
        ]

    @classmethod
    def preset(cls, data: str) -> dict[str, object]:
        name = data.partition(":")[0]
        return {**_S4, **_DATA.get(name, _POINTS if name in POINTS else _IMAGES)}

    def share(self, x: Tensor) -> Encoded:
        z = self.draw_codes(x)
        return Encoded(
            x, z, self.randn_like(z), *(self.moments(x, self.settings.contrast_draws) if self.adaptive else ())
        )

    def draw_codes(self, x: Tensor) -> Tensor:
        """z_φ(x, ε) `[n, d]`, ε ~ N(0, I)."""
        noise = self.randn(len(x), self.settings.noise_dim)
        return self.modules["encoder"](x, noise).float()

    def encode(self, x: Tensor) -> Tensor:
        """Images -> a code from the posterior of each `[n, d]`."""
        return self.draw_codes(x)

    def decode(self, z: Tensor) -> Tensor:
        """Codes `[n, d]` -> images in [-1, 1], or points."""
        return self.image(self.write(z))

    def proposal(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """μ and log σ² `[n, d]` of the Gaussian that `ivfast.metrics.importance_log_likelihood` draws codes from."""
        mean, deviation = self.moments(x, 64)
        return mean, 2 * deviation.log()

    @torch.no_grad()
    def moments(self, x: Tensor, draws: int) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation `[n, d]` of z_φ(x, ε) over draws of ε."""
        encoder, noise = self.modules["encoder"], self.randn(len(x), draws, self.settings.noise_dim)
        images = len(x) if encoder.training else max(1, ROWS // draws)
        z = torch.cat([
            encoder(some.repeat_interleave(draws, 0), its.flatten(0, 1)).float()
            for some, its in zip(x.split(images), noise.split(images), strict=True)
        ]).view(len(x), draws, -1)  # fmt: skip
        return z.mean(1), z.std(1).clamp_min(FLOOR)

    def whitened(self, shared: Encoded) -> Tensor:
        return (shared.z - shared.mean) / shared.deviation if self.adaptive else shared.z

    def discriminator_loss(self, shared: Encoded) -> dict[str, Tensor]:
        code, contrast = self.modules["discriminator"](shared.x, self.whitened(shared).detach(), shared.contrast)
        if self.settings.divergence == "kl":
            return {"code": -code.mean(), "contrast": (contrast - 1).exp().mean()}
        return {"code": F.softplus(-code).mean(), "contrast": F.softplus(contrast).mean()}

    def terms(self, shared: Encoded) -> dict[str, Tensor]:
        """Of each image `[n]`: −log p(x|z), T less what T* is at q = r, and log r(z|x) − log p(z) where r is not p."""
        z, code = shared.z, self.whitened(shared)
        (t,) = self.modules["discriminator"](shared.x, code)
        ratio = t - 1 if self.settings.divergence == "kl" else t
        terms = {"recon": self.surprise(shared.x, z), "adversarial": ratio}
        if self.adaptive:
            terms["contrast"] = 0.5 * (z.square() - code.square() - 2 * shared.deviation.log()).sum(1)
        return terms

    def autoencoder_loss(self, shared: Encoded) -> dict[str, Tensor]:
        return {name: term.mean() for name, term in self.terms(shared).items()}

    @torch.no_grad()
    def bound(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """The variational bound of log p(x) `[n]` as T estimates it by one code, S4's ELBO: a bound where T is T*."""
        return -sum(self.terms(self.share(x)).values())


# Section 4. S4 gives neither rates, batches and the length of training nor the sizes of noise and codes.
# T has to keep near T* (section 3.2), so E and G are slower, five times. At one rate T's bound is too high: on the four
# points .1 nats above the one by nearest neighbours, on digits 10 above the importance-weighted likelihood.
_S4 = {
    "contrast": "prior",
    "betas": (0.5, 0.999),
    "batch_size": 128,
    "learning_rates": {"default": 1e-4, "discriminator": 5e-4},
}
_PACE = {"default": 2e-4, "discriminator": 1e-3}  # of small networks
_IMAGES = {
    "net": "conv",
    "width": 64,
    "discriminator_width": 512,
    "latent_dim": 32,
    "noise_dim": 32,
    "image_size": 64,
    "epochs": 100,
}
_DIGITS = {
    "net": "mlp",
    "width": 256,
    "discriminator_width": 256,
    "image_size": 8,
    "latent_dim": 8,
    "noise_dim": 16,
    "batch_size": 64,
    "learning_rates": _PACE,
    "epochs": 250,
    "evaluate_every": 50,
    "save_every": 50,
}
_POINTS = {**FOUR_POINTS, "learning_rates": _PACE}
_DATA = {
    "four-points": _POINTS,
    "digits": _DIGITS,
    "stacked-digits": {**_DIGITS, "epochs": 10, "evaluate_every": 2, "save_every": 1},
    "mnist": {**_IMAGES, "image_size": 28},
    "fashion-mnist": {**_IMAGES, "image_size": 28},
    "stacked-mnist": {**_IMAGES, "image_size": 28},
    "svhn": {**_IMAGES, "image_size": 32},
    "cifar10": {**_IMAGES, "image_size": 32},
    "celeba": {**_IMAGES, "net": "residual"},
}
