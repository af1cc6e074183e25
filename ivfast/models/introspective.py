"""Introspective VAEs (S5): the networks and the two phases that they share, and their settings on each data set.

x_r = G(z), z ~ q(z|x), is a reconstruction and x_g = G(z), z ~ N(0, I), a sample: the fakes x_s, s = r, g. KL_s is
KL(q(z|x_s) ‖ N(0, I)), rec_s = ‖G(z_s) − x_s‖² with z_s ~ q(z|x_s), images in [0, 1] and points as they are. E meets
the fakes as constants and G meets them again after E's step, through E as that has left it. All losses are minimised.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.modules.batchnorm import _BatchNorm

import ivfast

from .. import nets
from ..data.points import POINTS
from ..train.declare import LENGTH, setting
from ..train.phase import Phase
from ..train.settings import Settings
from .decoding import Decoding

LOGVAR = 10.0  # log-variances are kept within ±10: a standard deviation of e^±5 is far from any posterior's


@dataclass(frozen=True)
class IntrospectiveSettings(Settings):
    beta_rec: float = setting(1.0, help="Weight of the reconstruction.", at_least=0, metavar="B")
    beta_kl: float = setting(1.0, help="Weight of the KL of images; in G's loss, of fakes.", at_least=0, metavar="B")
    beta_neg: float = setting(1.0, help="Weight of the KL of fakes, which E raises.", at_least=0, metavar="B")
    vae_steps: int | None = setting(
        0, help="Steps of a plain VAE before E and G compete.", panel=LENGTH, at_least=0,
        none="a 15th of the run's steps",
    )  # fmt: skip


class Posterior(NamedTuple):
    mu: Tensor  # [n, d]
    logvar: Tensor  # [n, d]
    z: Tensor  # [n, d]
    kl: Tensor  # [n], to the prior


class Encoded(NamedTuple):
    x: Tensor  # [n, ...]
    q: Posterior  # q(z|x)
    noise: Tensor  # [n, d], from the prior
    c: Tensor  # the share of KL in AS-IntroVAE's energy at this step
    adversarial: Tensor  # whether the steps of a plain VAE are over


class Judged(NamedTuple):
    """Fakes as E and G see them: n reconstructions, then n samples."""

    q: Posterior  # of 2n
    recon: Tensor | None  # rec_s [2n]


class Schedule(nn.Module):
    """The number i of the step, on the device and in the checkpoint."""

    def __init__(self):
        super().__init__()
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))


class Introspective(Decoding):
    """The networks and the two phases that introspective VAEs have in common.

    For its first `vae_steps` steps a system is a VAE: neither network meets the fakes.

    Attributes:
        total: T, the steps of the run, by `plan`; until then `settings.steps`.
    """

    Settings = IntrospectiveSettings

    def __init__(self, settings: Settings, image_shape: tuple[int, ...]):
        super().__init__(settings, image_shape)
        self.total = settings.steps
        d = self.latent_dim
        shape, width = self.image_shape, settings.width
        if settings.net == "mlp":
            self.modules["encoder"] = nets.mlp_encoder(shape, 2 * d, width, settings.depth)
            self.modules["decoder"] = nets.mlp_decoder(shape, d, width, settings.depth)
        else:
            self.modules["encoder"] = nets.conv_encoder(shape, 2 * d, width)
            self.modules["decoder"] = nets.conv_decoder(shape, d, width)
        self.modules["schedule"] = Schedule()
        self.to_device()
        self.normalises = any(isinstance(m, _BatchNorm) for m in nn.ModuleDict(self.modules).modules())
        self.pixel = 0.25 if len(shape) == 3 else 1.0  # a squared difference within [-1, 1] as one within [0, 1]
        self.phases = [
            Phase("encoder", self.adam("encoder"), self.encoder_loss),
            Phase("generator", self.adam("decoder"), self.generator_loss),
        ]

    @classmethod
    def preset(cls, data: str) -> dict[str, object]:
        name = data.partition(":")[0]
        return {**_S5, **(_points(name) if name in POINTS else _DATA.get(name, _IMAGES)), **cls.own(name)}

    @classmethod
    def own(cls, data: str) -> dict[str, object]:
        """What a system's preset has beside the others'."""
        return {}

    def plan(self, steps: int) -> None:
        self.total = steps
        if self.vae_steps >= steps:
            raise ValueError(
                f"vae_steps must be below the run's {steps} steps, got {self.vae_steps}: E and G would never compete"
            )

    @property
    def vae_steps(self) -> int:
        if self.settings.vae_steps is not None:
            return self.settings.vae_steps
        if self.total is None:
            raise ValueError("vae_steps follows the number of the run's steps, which plan(steps) has to tell")
        return self.total // 15

    def encode(self, x: Tensor) -> Tensor:
        """Images `[n, C, H, W]` in [-1, 1], or points -> the means of their posteriors `[n, d]`."""
        return self.modules["encoder"](x).float().chunk(2, 1)[0]

    def run(self, network: str, batches: Tensor, kinds: int) -> Tensor:
        """The network on so many kinds of batches `[kinds n, ...]`: each by itself where it normalises over a batch."""
        module = self.modules[network]
        if not self.normalises or kinds == 1:
            return module(batches).float()
        return torch.cat([module(x) for x in batches.chunk(kinds)]).float()

    def posterior(self, x: Tensor, kinds: int = 1) -> Posterior:
        mu, logvar = self.run("encoder", x, kinds).chunk(2, 1)
        logvar = returning_clamp(logvar, -LOGVAR, LOGVAR)
        return Posterior(mu, logvar, *self.reparameterize(mu, logvar, kinds))

    def share(self, x: Tensor) -> Encoded:
        step = self.modules["schedule"].step
        c, adversarial = self.share_of_kl(step), step >= self.vae_steps
        q = self.posterior(x)
        step.add_(1)
        return Encoded(x, q, self.randn_like(q.mu), c, adversarial)

    def share_of_kl(self, step: Tensor) -> Tensor:
        """c at a step."""
        return torch.ones_like(step, dtype=torch.float32)

    def distance(self, x: Tensor, target: Tensor) -> Tensor:
        """‖x − target‖² `[n]`."""
        return self.pixel * ivfast.reconstruction_loss(x, target)

    def judge(self, fakes: Tensor, *, again: bool, detach: bool = False) -> Judged:
        """The posteriors of reconstructions and samples `[2n, ...]` and, where asked for, how they come out `again`.

        Fakes are constants in rec_s and, with `detach`, so are the codes that they are reconstructed from.
        """
        q = self.posterior(fakes, 2)
        if not again:
            return Judged(q, None)
        back = self.run("decoder", q.z.detach() if detach else q.z, 2)
        return Judged(q, self.distance(back, fakes.detach()))

    def encoder_loss(self, shared: Encoded) -> dict[str, Tensor]:
        s, x_r = self.settings, self.decode(shared.q.z)
        recon, kl = self.distance(x_r, shared.x).mean(), shared.q.kl.mean()
        with torch.no_grad():
            fakes = torch.cat([x_r, self.decode(shared.noise)])
        terms = {"recon": self.scale * s.beta_rec * recon, "kl": self.scale * s.beta_kl * kl}
        return {**terms, **self.after_vae(shared, self.rejecting(shared, fakes))}

    def generator_loss(self, shared: Encoded) -> dict[str, Tensor]:
        fakes = self.run("decoder", torch.cat([shared.q.z.detach(), shared.noise]), 2)
        recon = self.scale * self.settings.beta_rec * self.distance(fakes[: len(shared.x)], shared.x).mean()
        return {"recon": recon, **self.after_vae(shared, self.deceiving(shared, fakes))}

    def after_vae(self, shared: Encoded, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self.vae_steps:
            return terms
        return {name: torch.where(shared.adversarial, term, 0) for name, term in terms.items()}

    scale = 1.0  # s

    def rejecting(self, shared: Encoded, fakes: Tensor) -> dict[str, Tensor]:
        """E's terms of the fakes."""
        raise NotImplementedError

    def deceiving(self, shared: Encoded, fakes: Tensor) -> dict[str, Tensor]:
        """G's terms of the fakes."""
        raise NotImplementedError


class Vae(Introspective):
    """β_rec rec + β_kl KL(x) on the same networks: the first column of S5's Table 1, not a system of its own."""

    def rejecting(self, shared: Encoded, fakes: Tensor) -> dict[str, Tensor]:
        return {}

    deceiving = rejecting


class _ReturningClamp(Function):
    @staticmethod
    def forward(ctx, x, least, most):
        ctx.save_for_backward(x)
        ctx.bounds = least, most
        return x.clamp(least, most)

    @staticmethod
    def backward(ctx, grad):
        (x,), (least, most) = ctx.saved_tensors, ctx.bounds
        leaving = ((x > most) & (grad < 0)) | ((x < least) & (grad > 0))  # a step of descent is −grad
        return grad.masked_fill(leaving, 0), None, None


def returning_clamp(x: Tensor, least: float, most: float) -> Tensor:
    """x within [least, most]. Outside, gradients that lead back pass and those that lead on do not.

    Under a plain clamp an encoder that has been driven outside, as by fakes whose KL it maximises, could not come back:
    the KL of its real images would have no gradient there.
    """
    return _ReturningClamp.apply(x, least, most)


# Daniel & Tamar 2021: their public code, and for images its table of settings. T is 30,000 steps for points; that their
# code lowers the rate tenfold after 10,000 and 15,000 of them is left out.
_S5 = {"learning_rates": {"default": 2e-4}, "beta_rec": 1.0, "beta_kl": 1.0, "beta_neg": 256.0}
_POINTS = {
    "net": "mlp",
    "width": 256,
    "depth": 3,
    "latent_dim": 2,
    "batch_size": 512,
    "steps": 30_000,
    "vae_steps": None,  # 2,000 of 30,000
    "margin": 5.0,
    "evaluate_every": 50,
    "save_every": 50,
}
_BETAS = {  # β_rec, β_kl, β_neg; the sets that they did not use have those of 8 Gaussians
    "spirals": (0.2, 0.5, 1.0),
    "checkerboard": (0.2, 0.1, 0.2),
}


def _points(name: str) -> dict[str, object]:
    betas = _BETAS.get(name, (0.2, 0.3, 0.9))
    return {**_POINTS, **dict(zip(("beta_rec", "beta_kl", "beta_neg"), betas, strict=True))}


_IMAGES = {
    "net": "conv",
    "width": 64,
    "image_size": 64,
    "latent_dim": 128,
    "batch_size": 32,
    "epochs": 250,
    "as_kernel": "additive",
    "margin": 20.0,
}
_MNIST = {**_IMAGES, "image_size": 28, "latent_dim": 32, "batch_size": 128}
_CELEBA = {"image_size": 128, "latent_dim": 256, "batch_size": 8, "beta_rec": 0.5, "beta_neg": 1024.0}
# Not in S5. At β_rec = 1, a deviation of .7 in a pixel, a VAE of 64 pixels gives the images' mean. In the exponentials
# β_neg weighs a nat nearly as MNIST's does.
_DIGITS = {
    "net": "mlp",
    "width": 256,
    "image_size": 8,
    "latent_dim": 16,
    "batch_size": 64,
    "beta_rec": 8.0,
    "beta_neg": 16.0,
    "as_kernel": "additive",
    "margin": 20.0,
    "epochs": 250,
    "evaluate_every": 50,
    "save_every": 50,
}
_DATA = {
    "mnist": _MNIST,
    "fashion-mnist": _MNIST,
    "cifar10": {**_IMAGES, "image_size": 32},
    "svhn": {**_IMAGES, "image_size": 32},
    "celeba": {**_IMAGES, **_CELEBA},
    "digits": _DIGITS,
    "stacked-digits": {**_DIGITS, "epochs": 10, "evaluate_every": 2, "save_every": 1},
}
