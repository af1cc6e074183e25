"""Settings that several families' networks read."""

from dataclasses import dataclass

from ..train.declare import NETWORKS, setting


@dataclass(frozen=True)
class DiscriminatorSettings:
    """A mixin for systems with a discriminator."""

    discriminator_width: int = setting(
        1024, help="Units per hidden layer of the discriminator, where it has such layers.", panel=NETWORKS, at_least=1
    )
    discriminator_depth: int = setting(
        2, help="Hidden layers of the discriminator, where it is an mlp.", panel=NETWORKS, at_least=0
    )
