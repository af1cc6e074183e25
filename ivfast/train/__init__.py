"""The one training loop: phases, settings, checkpoints.

`ivfast.train.loop.fit` trains, `ivfast.train.checkpoint.load_system` reads a run back, `ivfast.models.build` makes the
system that both need; they stand in modules of their own because the models are built on phase and settings.
"""

from .settings import Settings, preset

__all__ = ["Settings", "preset"]
