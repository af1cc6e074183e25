"""S3's GANs: plain, conditional, their importance weighting, InfoGAN, and adversarial domain adaptation.

y = 1 is a real image (the source domain), y = 0 a generated one (the target domain); D(x) = q(y=1|x) is the sigmoid of
the discriminator's logit l, so −log D = softplus(−l) and −log(1 − D) = softplus(l).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from .. import nets
from ..data.points import POINTS
from ..train.declare import DATA, setting
from ..train.phase import Phase
from ..train.settings import Settings
from .unified import Generative, LabelledSettings, Unified, UnifiedSettings


@dataclass(frozen=True)
class InfoGanSettings(UnifiedSettings):
    lam: float = setting(1.0, help="λ, the weight of −log q(z|G z).", at_least=0, metavar="LAMBDA")


@dataclass(frozen=True)
class AdaSettings(LabelledSettings):
    lam: float = setting(1.0, help="λ, the weight of the domain term in G's loss.", at_least=0, metavar="LAMBDA")
    target: str = setting(
        "negative", help="Target domain: a data set, or negative for the negatives of the images.", panel=DATA
    )


class Generated(NamedTuple):
    x: Tensor  # real images [n, C, H, W]
    fake: Tensor  # G(z, y) [n, C, H, W]
    z: Tensor  # [n, d]
    y: Tensor | None = None  # [n, classes]


class Gan(Generative):
    """L_D = −E log D(x) − E log(1 − D(G z)), L_G = −E log D(G z) (S3 Eqs. 4 and 7).

    A step's fakes are generated once; D sees them detached, G through D as D's update has left it.
    """

    def __init__(self, settings: Settings, image_shape: tuple[int, int, int]):
        super().__init__(settings, image_shape)
        self.modules["generator"] = self.writer(self.classes)
        self.modules["discriminator"] = self.reader(1, self.classes)
        self.to_device()
        self.phases = [
            Phase("discriminator", self.adam("discriminator"), self.discriminator_loss),
            Phase("generator", self.adam("generator"), self.generator_loss),
        ]

    @classmethod
    def misfit(cls, data: str) -> str | None:
        if data in POINTS and data != "four-points":
            return f"generates numbers between −1 and 1, and {data} holds others"
        return super().misfit(data)

    def image(self, logits: Tensor) -> Tensor:
        return logits.tanh()

    def share(self, x: Tensor) -> Generated:
        return self.generate(x)

    def generate(self, x: Tensor, y: Tensor | None = None) -> Generated:
        z = self.randn(len(x), self.latent_dim)
        return Generated(x, self.image(self.write(z, y)), z, y)

    def discriminate(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Logits `[n]`."""
        return self.read("discriminator", x, y).squeeze(1)

    def discriminator_loss(self, shared: Generated) -> dict[str, Tensor]:
        real, fake = self.discriminate(shared.x, shared.y), self.discriminate(shared.fake.detach(), shared.y)
        return {"real": F.softplus(-real).mean(), "fake": F.softplus(fake).mean()}

    def generator_loss(self, shared: Generated) -> dict[str, Tensor]:
        return {"adversarial": self.adversarial(self.discriminate(shared.fake, shared.y))}

    def adversarial(self, logits: Tensor) -> Tensor:
        """The generator's loss on D's logits of fakes `[n]`."""
        return F.softplus(-logits).mean()


class IwGan(Gan):
    """L_G = −Σ_i w_i log D(G z_i), w = D/(1 − D) held constant and normalised over the batch (S3 Eq. 22)."""

    def adversarial(self, logits: Tensor) -> Tensor:
        return self.ops.importance_weighted_loss(logits)


class Cgan(Gan):
    """GAN with G(z, c) and D(x, c); the fakes of a step have the classes of its real images."""

    Settings = LabelledSettings
    labels = "all"

    def share(self, x: Tensor, labels: Tensor) -> Generated:
        return self.generate(x, self.one_hot(labels))


class IwCgan(IwGan, Cgan):
    """The conditional GAN, importance weighted."""


class InfoGan(Gan):
    """L_G = L_E = −E log D(G z) − λ E log q(z|G z), E giving a Gaussian q; S3 Eq. 15 has λ = 1 and the whole code."""

    Settings = InfoGanSettings

    def __init__(self, settings: Settings, image_shape: tuple[int, int, int]):
        super().__init__(settings, image_shape)
        self.modules["encoder"] = self.reader(2 * self.latent_dim)
        self.to_device()
        self.phases[1] = Phase("generator", self.adam("generator", "encoder"), self.generator_loss)

    def generator_loss(self, shared: Generated) -> dict[str, Tensor]:
        mu, logvar = self.posterior(shared.fake)
        # −log q(z|x) = ½ Σ_d [(z − μ)²/σ² + log σ² + log 2π]
        code = 0.5 * ((shared.z - mu).square() * (-logvar).exp() + logvar + math.log(2 * math.pi)).sum(1)
        return {**super().generator_loss(shared), "code": self.settings.lam * code.mean()}


class Domains(NamedTuple):
    features: Tensor  # [n, d]
    labels: Tensor  # [n], −1 in the target domain


class Ada(Unified):
    """Adversarial domain adaptation: features G(z) whose domain D cannot tell, and a classifier on them.

    Images with a label are of the source domain, those without of the target domain. D minimises −E log q(y|x)
    (S3 Eqs. 1 and 4); G minimises −λ E log q(1−y|x) (Eqs. 2 and 5) and, with the classifier, the cross-entropy on the
    source, which S3 leaves out (Ganin et al. 2016).
    """

    Settings = AdaSettings
    labels = "source"

    def __init__(self, settings: Settings, image_shape: tuple[int, int, int]):
        super().__init__(settings, image_shape)
        self.modules["extractor"] = self.reader(self.latent_dim)
        for name, outputs in (("classifier", self.classes), ("discriminator", 1)):
            self.modules[name] = nets.mlp(self.latent_dim, outputs, settings.width, settings.depth)
        self.to_device()
        self.phases = [
            Phase("discriminator", self.adam("discriminator"), self.discriminator_loss),
            Phase("extractor", self.adam("extractor", "classifier"), self.extractor_loss),
        ]

    def share(self, x: Tensor, labels: Tensor) -> Domains:
        return Domains(self.read("extractor", x), labels)

    def classify(self, x: Tensor) -> Tensor:
        """Logits of the classes `[n, classes]`."""
        return self.modules["classifier"](self.read("extractor", x)).float()

    def discriminate(self, features: Tensor) -> Tensor:
        return self.modules["discriminator"](features).float().squeeze(1)

    def discriminator_loss(self, shared: Domains) -> dict[str, Tensor]:
        return self.domain_loss(self.discriminate(shared.features.detach()), shared.labels >= 0)

    def extractor_loss(self, shared: Domains) -> dict[str, Tensor]:
        source = shared.labels >= 0
        reversed_logits = -self.discriminate(shared.features)  # q(1−y|x)
        domains = self.domain_loss(reversed_logits, source)
        log_q = self.modules["classifier"](shared.features).float().log_softmax(1)
        cross_entropy = -(self.one_hot(shared.labels) * log_q).sum(1)
        return {
            "classification": self.mean(cross_entropy, source),
            **{name: self.settings.lam * value for name, value in domains.items()},
        }

    def domain_loss(self, logits: Tensor, source: Tensor) -> dict[str, Tensor]:
        """−E_{y=1} log D − E_{y=0} log(1 − D) of logits `[n]` with the domain indicator `source [n]`."""
        return {"source": self.mean(F.softplus(-logits), source), "target": self.mean(F.softplus(logits), ~source)}
