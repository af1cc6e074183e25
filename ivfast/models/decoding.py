"""Systems whose samples are decoded codes of the prior."""

import torch
from torch import Tensor

from ..train.phase import System


class Decoding(System):
    """With a network that decodes codes.

    Attributes:
        decoder: its name among `modules`.
    """

    decoder = "decoder"

    def decode(self, z: Tensor) -> Tensor:
        """Codes `[n, d]` -> images `[n, C, H, W]` in [-1, 1], or points `[n, D]`; float32 under autocast too."""
        return self.modules[self.decoder](z).float()

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n images `[n, C, H, W]` or points `[n, D]`, decoded from the prior; the generator as for `prior_codes`."""
        return self.decode(self.prior_codes(n, generator))
