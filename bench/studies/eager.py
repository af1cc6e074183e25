"""Eager PyTorch training scripts of S1's systems, written as authors of such papers write theirs.

A Dataset hands out float images, a DataLoader stacks them (shuffled, in the process itself). Each network has its own
`torch.optim.Adam` as it comes. D is called for one bridge after the other, its loss is a sum of cross-entropies; SVGD
is cdist, median and exp, MMD a loop over scales. Codes whose gradient is not needed are computed under no_grad, and
`.item()` is called once per line of the log.

A step is Algorithm 1 line by line: an update of D, one of E, one of G, each with a forward and a backward pass of its
own. `joint` is the shorter way: E and G from one backward pass. Both are ivfast's step in numbers, so noise is drawn
once per step, E meets D as its update left it, and E and G move from the same weights: E's optimizer waits for G's
gradients. What differs are the running statistics of batch normalisation, which each forward pass moves: no loss of
the training reads them. The presets' moving average of the weights is left out.
"""

import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from ivfast.train.phase import System

from ..harness import peers


class Images(Dataset):
    """Images as torchvision's ToTensor and Normalize(.5, .5) leave them, one by one."""

    def __init__(self, images: Tensor):
        self.images = images  # uint8 [N, C, H, W]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        return self.images[i].float().div(127.5).sub(1)


class Script:
    """An eager training script; it starts from a copy of a system's weights."""

    def __init__(self, system: System, images: Tensor, joint: bool = False):
        self.settings = s = system.settings
        self.joint = joint
        self.networks = copy.deepcopy(system.modules)
        self.E, self.G, self.D = (self.networks.get(name) for name in ("encoder", "decoder", "discriminator"))
        self.optimizers = {
            name: torch.optim.Adam(network.parameters(), lr=s.learning_rate(name), betas=tuple(s.betas))
            for name, network in self.networks.items()
        }
        self.loader = DataLoader(Images(images), s.batch_size, shuffle=True, drop_last=True)
        self.batches = self.epochs()
        self.steps, self.log = 0, []

    def epochs(self) -> Iterator[Tensor]:
        while True:
            yield from self.loader

    def advance(self) -> None:
        losses = self.step(next(self.batches))
        self.steps += 1
        if self.steps % self.settings.log_every == 0:
            self.log.append([loss.item() for phase in losses.values() for loss in phase.values()])

    def step(self, x: Tensor) -> dict[str, dict[str, Tensor]]:
        noise = self.noise(len(x))
        losses = {}
        if self.D is not None:
            losses["discriminator"] = self.update_discriminator(x, noise)
        losses["autoencoder"] = self.encoder_gradients(x, noise)
        if not self.joint:
            self.decoder_gradients(x)
        self.optimizers["encoder"].step()
        self.optimizers["decoder"].step()
        return losses

    def update_discriminator(self, x: Tensor, noise: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            z = self.E(x)
        losses = self.discriminator_losses(z, noise)
        self.optimizers["discriminator"].zero_grad()
        sum(losses.values()).backward()
        self.optimizers["discriminator"].step()
        return losses

    def encoder_gradients(self, x: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """G's as well, which `joint` keeps."""
        z = self.E(x)
        losses = {"recon": self.recon_weight() * self.reconstruction(z, x), **self.penalty(z, noise)}
        self.optimizers["encoder"].zero_grad()
        self.optimizers["decoder"].zero_grad()
        sum(losses.values()).backward()
        return losses

    def decoder_gradients(self, x: Tensor) -> None:
        with torch.no_grad():
            z = self.E(x)
        loss = self.recon_weight() * self.reconstruction(z, x)
        self.optimizers["decoder"].zero_grad()
        loss.backward()

    def reconstruction(self, z: Tensor, x: Tensor) -> Tensor:
        return F.mse_loss(self.G(z), x, reduction="sum") / len(x)

    def recon_weight(self) -> float:
        return 1.0

    def noise(self, n: int) -> Tensor:
        return torch.randn(n, self.settings.latent_dim)

    def discriminator_losses(self, z: Tensor, noise: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError

    def penalty(self, z: Tensor, noise: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError


class WaeMmd(Script):
    def penalty(self, z, noise):
        return {"mmd": self.settings.lam * peers.mmd(z, noise)}


class WaeGan(Script):
    def discriminator_losses(self, z, noise):
        prior, code = self.D(noise), self.D(z)
        return {
            "prior": F.binary_cross_entropy_with_logits(prior, torch.ones_like(prior)),
            "code": F.binary_cross_entropy_with_logits(code, torch.zeros_like(code)),
        }

    def penalty(self, z, noise):
        code = self.D(z)
        return {"adversarial": self.settings.lam * F.binary_cross_entropy_with_logits(code, torch.ones_like(code))}


class Ivaae(Script):
    def recon_weight(self):
        return self.settings.lam

    def cross_entropy(self, z, noise):
        """S1 Eq. 1: −mean over k and j of log D_k(T_k z_j)."""
        total = 0
        for k, block in enumerate(self.bridge(z, noise)):
            logits = self.D(block)
            total = total + F.cross_entropy(logits, torch.full((len(z),), k))
        return total / (self.settings.t + 1)

    def discriminator_losses(self, z, noise):
        return {"intervention": 4 / (self.settings.t + 1) * self.cross_entropy(z, noise)}

    def penalty(self, z, noise):
        return {"intervention": -2 / (self.settings.t + 1) * self.cross_entropy(z, noise)}

    def bridge(self, z, noise):
        raise NotImplementedError


class IvaaeBlockwise(Ivaae):
    def bridge(self, z, noise):
        t, width = self.settings.t, z.shape[1] // self.settings.t
        return [torch.cat([noise[:, : k * width], z[:, k * width :]], 1) for k in range(t + 1)]


class IvaaeRadial(Ivaae):
    def bridge(self, z, noise):
        angles = [k * math.pi / 2 / self.settings.t for k in range(self.settings.t + 1)]
        return [math.cos(a) * z + math.sin(a) * noise for a in angles]


class IvaaeSvgd(Ivaae):
    def noise(self, n):
        return torch.randn(2 * (self.settings.t - 1) + 1, n, self.settings.latent_dim)

    def bridge(self, z, noise):
        return peers.svgd_bridge(z, self.settings.t, noise)


SCRIPTS = {
    "wae-mmd": WaeMmd,
    "wae-gan": WaeGan,
    "ivaae-bw": IvaaeBlockwise,
    "ivaae-rad": IvaaeRadial,
    "ivaae-svgd": IvaaeSvgd,
}
