"""S3's VAEs: plain, conditional and semi-supervised, and the activation of the adversary that lies idle in them.

Pixels are Bernoulli: G gives their logits l, and an image in [-1, 1] is of the means, 2 σ(l) − 1. Bounds are in nats.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..train.declare import DATA, setting
from ..train.phase import Phase
from ..train.settings import Settings
from .unified import Bernoulli, LabelledSettings, UnifiedSettings

ALPHA = 0.1  # of the classifier's cross-entropy (Kingma et al. 2014, section 3.1.2)


@dataclass(frozen=True)
class SvaeSettings(LabelledSettings):
    label_share: float = setting(
        1.0, help="Share of the training images whose labels are used, the same for each class.", panel=DATA,
        above=0, at_most=1, metavar="P",
    )  # fmt: skip


@dataclass(frozen=True)
class ActivatedSettings(UnifiedSettings):
    temperature: float = setting(
        1.0, help="τ of the activated adversary; above 1, samples weigh more.", above=0, metavar="T"
    )


@dataclass(frozen=True)
class AaCvaeSettings(ActivatedSettings, LabelledSettings):
    pass


@dataclass(frozen=True)
class AaSvaeSettings(ActivatedSettings, SvaeSettings):
    pass


class Images(NamedTuple):
    x: Tensor  # [n, C, H, W] in [-1, 1]
    labels: Tensor | None = None  # [n], −1 where unknown


class Bounded(Bernoulli):
    """Minimises the mean of `terms` over the images; those named in `bound_terms` are a bound of the log-likelihood."""

    readers: tuple[str, ...] = ()
    bound_terms: tuple[str, ...] = ("recon", "kl")

    def __init__(self, settings: Settings, image_shape: tuple[int, int, int]):
        super().__init__(settings, image_shape)
        self.modules["encoder"] = self.reader(2 * self.latent_dim, self.classes)
        self.modules["generator"] = self.writer(self.classes)
        for name in self.readers:
            self.modules[name] = self.reader(self.classes)
        self.to_device()
        self.phases = [Phase("autoencoder", self.adam("encoder", "generator", *self.readers), self.autoencoder_loss)]

    def share(self, x: Tensor, labels: Tensor | None = None) -> Images:
        return Images(x, labels)

    def terms(self, images: Images) -> dict[str, Tensor]:
        """The loss of each image `[n]`, in parts."""
        raise NotImplementedError

    def generate(self, images: Images) -> Images:
        """As many images, from the prior."""
        raise NotImplementedError

    def gaussian_terms(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        """−log p(x|z, y) at one z ~ q(z|x, y), and KL(q(z|x, y) ‖ p(z)) (S3 Eq. 17)."""
        z, kl = self.reparameterize(*self.posterior(x, y))
        return {"recon": self.surprise(x, z, y), "kl": kl}

    def autoencoder_loss(self, shared: Images) -> dict[str, Tensor]:
        return {name: term.mean() for name, term in self.terms(shared).items()}

    def prior(self, images: Images) -> Tensor:
        return self.randn(len(images.x), self.latent_dim)

    @torch.no_grad()
    def bound(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """The variational lower bound of log p(x), of conditional systems log p(x|y), by one code per image: `[n]`."""
        terms = self.terms(Images(x, labels))
        return -sum(terms[name] for name in self.bound_terms)


class Vae(Bounded):
    """−ELBO(x) = −E_q log p(x|z) + KL(q(z|x) ‖ p(z)) (S3 Eq. 17)."""

    def share(self, x: Tensor) -> Images:
        return Images(x)

    def encode(self, x: Tensor) -> Tensor:
        """Images -> the means of their posteriors `[n, d]`."""
        return self.posterior(x)[0]

    def decode(self, z: Tensor) -> Tensor:
        """Codes `[n, d]` -> images in [-1, 1], or points."""
        return self.image(self.write(z))

    def draw_codes(self, x: Tensor) -> Tensor:
        """Images -> a code from the posterior of each `[n, d]`."""
        return self.reparameterize(*self.posterior(x)).z

    def proposal(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """μ and log σ² `[n, d]` of the Gaussian that `ivfast.metrics.importance_log_likelihood` draws codes from."""
        return self.posterior(x)

    def terms(self, images: Images) -> dict[str, Tensor]:
        return self.gaussian_terms(images.x)

    def generate(self, images: Images) -> Images:
        return Images(self.decode(self.prior(images)))


class Cvae(Bounded):
    """The VAE of each class: q(z|x, y) and p(x|z, y). Its fakes have the classes of the batch."""

    Settings = LabelledSettings
    labels = "all"

    def proposal(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """As the VAE's, of classes `[n, classes]`."""
        return self.posterior(x, y)

    def terms(self, images: Images) -> dict[str, Tensor]:
        return self.gaussian_terms(images.x, self.one_hot(images.labels))

    def generate(self, images: Images) -> Images:
        return Images(self.image(self.write(self.prior(images), self.one_hot(images.labels))), images.labels)


class Svae(Bounded):
    """Kingma's M2: −L(x, y) where the label is known, E_{q(y|x)}[−L(x, y)] − H(q(y|x)) where it is not.

    L(x, y) is the bound of log p(x, y), p(y) uniform; known labels also train the classifier q(y|x), by α times their
    mean cross-entropy. Fakes are unlabelled images, of classes from p(y).

    Source: S3 section 5.2; Kingma et al. 2014, Eqs. 6–9.
    """

    Settings = SvaeSettings
    labels = "some"
    readers = ("classifier",)
    bound_terms = ("recon", "kl", "label")

    def classify(self, x: Tensor) -> Tensor:
        """Logits of q(y|x) `[n, classes]`."""
        return self.read("classifier", x)

    def terms(self, images: Images) -> dict[str, Tensor]:
        x, n, c = images.x, len(images.x), self.classes
        labels = x.new_full((n,), -1) if images.labels is None else images.labels
        known, one_hot = labels >= 0, self.one_hot(labels)
        log_q = self.classify(x).log_softmax(1)
        q = log_q.exp()
        r = torch.where(known[:, None], one_hot, q)  # [n, c]
        every = torch.eye(c, dtype=x.dtype, device=x.device)
        terms = self.gaussian_terms(x.repeat_interleave(c, 0), every.repeat(n, 1))  # image i with class j at i c + j
        entropy = torch.where(known, 0, -(q * log_q).sum(1))
        return {
            **{name: (r * term.view(n, c)).sum(1) for name, term in terms.items()},
            "label": math.log(c) - entropy,  # KL(r ‖ p(y))
            # a share of the images has labels: over them all, this has the mean over those
            "classification": -ALPHA / self.settings.label_share * (one_hot * log_q).sum(1),
        }

    def generate(self, images: Images) -> Images:
        n = len(images.x)
        y = self.one_hot(self.randint(self.classes, n))
        return Images(self.image(self.write(self.prior(images), y)))


class Both(NamedTuple):
    real: Images
    fake: Images


class Activated(Bounded):
    """½{E[D_τ(x) terms(x)] + E[D_τ(x̃) terms(x̃)]} over real images x and as many fakes x̃ = G(z) (S3 Eq. 23).

    D_τ = σ(l/τ), held constant, is the probability of "real" by a discriminator that is trained as a GAN's (Eq. 50); a
    temperature τ > 1 lets more of the fakes in (section G.2). With D = 1 on reals and 0 on fakes, half the VAE's loss.
    """

    Settings = ActivatedSettings

    def __init__(self, settings: Settings, image_shape: tuple[int, int, int]):
        super().__init__(settings, image_shape)
        self.modules["discriminator"] = self.reader(1)
        self.to_device()
        self.phases.insert(0, Phase("discriminator", self.adam("discriminator"), self.discriminator_loss))

    def share(self, *batch: Tensor) -> Both:
        real = super().share(*batch)
        with torch.no_grad():
            return Both(real, self.generate(real))

    def discriminate(self, x: Tensor) -> Tensor:
        """Logits `[n]`."""
        return self.read("discriminator", x).squeeze(1)

    def discriminator_loss(self, shared: Both) -> dict[str, Tensor]:
        real, fake = self.discriminate(shared.real.x), self.discriminate(shared.fake.x)
        return {"real": F.softplus(-real).mean(), "fake": F.softplus(fake).mean()}

    def autoencoder_loss(self, shared: Both) -> dict[str, Tensor]:
        return {**self.weighted(shared.real, ""), **self.weighted(shared.fake, "fake_")}

    def weighted(self, images: Images, prefix: str) -> dict[str, Tensor]:
        with torch.no_grad():
            weight = torch.sigmoid(self.discriminate(images.x) / self.settings.temperature)
        return {f"{prefix}{name}": 0.5 * (weight * term).mean() for name, term in self.terms(images).items()}


class AaVae(Activated, Vae):
    """The VAE, its adversary activated."""


class AaCvae(Activated, Cvae):
    """The conditional VAE, its adversary activated."""

    Settings = AaCvaeSettings


class AaSvae(Activated, Svae):
    """The semi-supervised VAE, its adversary activated."""

    Settings = AaSvaeSettings
