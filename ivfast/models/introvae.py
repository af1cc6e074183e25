"""S5: introspective VAEs, whose encoder is the discriminator, and what AS-IntroVAE puts in the place of their KL.

The notation is that of introspective.py.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import ivfast

from ..train.declare import LENGTH, setting
from .introspective import LOGVAR, Encoded, Introspective, IntrospectiveSettings, Posterior

DISTANCE = 30.0  # no kernel of the AS-Distance exceeds e^30: the square of its gradient, which Adam keeps, is finite


@dataclass(frozen=True)
class IntroVaeSettings(IntrospectiveSettings):
    beta_kl: float = setting(1.0, help="Weight of the KL of images.", at_least=0, metavar="B")
    beta_neg: float = setting(1.0, help="Weight of the KL of fakes, in both losses.", at_least=0, metavar="B")
    margin: float = setting(
        10.0, help="m of the hinge, in nats: E raises the KL of fakes up to it. Set it above the KL of images.",
        at_least=0, metavar="M",
    )  # fmt: skip


@dataclass(frozen=True)
class SoftIntroVaeSettings(IntrospectiveSettings):
    gamma_r: float = setting(
        1e-8, help="γ_r, the weight of the reconstruction of fakes in G's loss.", at_least=0, metavar="G"
    )


@dataclass(frozen=True)
class AsIntroVaeSettings(SoftIntroVaeSettings):
    anneal_steps: int | None = setting(
        None,
        help="Steps, after those of the plain VAE, over which the AS-Distance gives way to the KL; 0 is Soft-IntroVAE.",
        panel=LENGTH, at_least=0, none="a fifth of the run's steps",
    )  # fmt: skip
    as_kernel: str = setting(
        "product",
        help="Kernel of the AS-Distance: S5's Eq. 8 (product), or dimension by dimension, as in its authors' code "
        "(additive). The product underflows in 64 dimensions.",
        choices=("product", "additive"),
    )


class IntroVae(Introspective):
    """L_E = β_rec rec + β_kl KL(x) + ½ β_neg Σ_s [m − KL_s]₊,  L_G = β_rec rec + ½ β_neg Σ_s KL_s.

    S5 prints it at β_rec = β_kl = 1, and adds a bound that it means to subtract. β_neg is IntroVAE's α, m the `margin`.

    Source: S5 Eq. 3; Huang et al. 2018, Eqs. 11 and 12.
    """

    Settings = IntroVaeSettings

    @classmethod
    def own(cls, data: str) -> dict[str, object]:
        return {"beta_neg": 1.0}

    def rejecting(self, shared: Encoded, fakes: Tensor) -> dict[str, Tensor]:
        s, kl = self.settings, self.judge(fakes, again=False).q.kl
        return by_kind("hinge", 0.5 * s.beta_neg * mean_by_kind((s.margin - kl).relu()))

    def deceiving(self, shared: Encoded, fakes: Tensor) -> dict[str, Tensor]:
        kl = self.judge(fakes, again=False).q.kl
        return by_kind("kl", 0.5 * self.settings.beta_neg * mean_by_kind(kl))


class SoftIntroVae(Introspective):
    """L_E = s (β_rec rec + β_kl KL(x)) + ¼ Σ_s E exp(−2 s (β_rec rec_s + β_neg KL_s)),
    L_G = s (β_rec rec + ½ β_kl Σ_s KL_s + ½ γ_r β_rec Σ_s rec_s),  s = 1/dim x.

    Energies are never negative, so the exponentials lie in [0, 1]: one of a huge or infinite energy is 0, and so is its
    gradient. G reconstructs its fakes from codes held constant.

    Source: S5 Eq. 4; Daniel & Tamar 2021, Algorithm 1.
    """

    Settings = SoftIntroVaeSettings

    def __init__(self, settings: Settings, image_shape: tuple[int, ...]):
        super().__init__(settings, image_shape)
        self.scale = 1 / math.prod(self.image_shape)

    def energies(self, shared: Encoded, q: Posterior) -> Tensor:
        """What stands for the KL of reconstructions and of samples `[2n]`."""
        return q.kl

    def rejecting(self, shared: Encoded, fakes: Tensor) -> dict[str, Tensor]:
        s, judged = self.settings, self.judge(fakes, again=True)
        recon, energies = (x.view(2, -1) for x in (judged.recon, self.energies(shared, judged.q)))
        betas = {"beta_reconstruction": s.beta_rec, "beta_kl": s.beta_neg}
        exponentials = ivfast.exp_elbo_loss(recon, energies, scale=self.scale, alpha=2.0, **betas)  # ½ E exp(−2 …)
        return by_kind("exp", 0.5 * exponentials)

    def deceiving(self, shared: Encoded, fakes: Tensor) -> dict[str, Tensor]:
        s, half = self.settings, 0.5 * self.scale
        judged = self.judge(fakes, again=s.gamma_r > 0, detach=True)
        terms = by_kind("kl", half * s.beta_kl * mean_by_kind(self.energies(shared, judged.q)))
        if s.gamma_r:
            terms |= by_kind("again", half * s.gamma_r * s.beta_rec * mean_by_kind(judged.recon))
        return terms


class AsIntroVae(SoftIntroVae):
    """Soft-IntroVAE whose KL_s is c KL_s + (1 − c) D(x_r, x_g), c = min(5 i/T, 1), D the AS-Distance.

    i counts the steps after those of the plain VAE, T all steps of the run; `anneal_steps` stands for T/5. From there
    on this is Soft-IntroVAE. E maximises D through its exponentials and G minimises it. Inside D log-variances are kept
    above a floor under which a product kernel could exceed e^30; below it D looks at the means alone, and its gradient
    for the variance is 0.

    Source: S5 Eqs. 7 to 9. Eq. 9 prints + before c KL and (1 − c) D, which are costs.
    """

    Settings = AsIntroVaeSettings

    def __init__(self, settings: Settings, image_shape: tuple[int, ...]):
        super().__init__(settings, image_shape)
        dims = settings.latent_dim if settings.as_kernel == "product" else 1
        # Π_d (2π · 2 e^floor)^(−½) = e^DISTANCE
        self.floor = max(-LOGVAR, -2 * DISTANCE / dims - math.log(4 * math.pi))

    def share_of_kl(self, step: Tensor) -> Tensor:
        steps = self.settings.anneal_steps
        if steps is None and self.total is None:  # up to i = 0, c is 0 whatever T is
            known = step <= self.vae_steps
            torch._assert_async(known, "c follows the number of the run's steps, which plan(steps) has to tell")
            return torch.zeros_like(step, dtype=torch.float32)
        steps = self.total / 5 if steps is None else steps
        return ((step - self.vae_steps) / steps).clamp(0, 1) if steps else super().share_of_kl(step)

    def energies(self, shared: Encoded, q: Posterior) -> Tensor:
        (mu_r, mu_g), (logvar_r, logvar_g) = q.mu.chunk(2), q.logvar.clamp(min=self.floor).chunk(2)
        distance = self.ops.as_distance(mu_r, logvar_r, mu_g, logvar_g, kernel=self.settings.as_kernel)
        return shared.c * q.kl + (1 - shared.c) * distance


def mean_by_kind(x: Tensor) -> Tensor:
    """`[2n]` -> `[2]`."""
    return x.view(2, -1).mean(1)


def by_kind(name: str, terms: Tensor) -> dict[str, Tensor]:
    """A term of reconstructions and one of samples, from `[2]`."""
    return {f"{name}_rec": terms[0], f"{name}_fake": terms[1]}
