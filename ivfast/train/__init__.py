"""The one training loop: phases, settings, checkpoints.

`ivfast.train.loop.fit` trains what `ivfast.models.build` makes; `ivfast.runs.load_system` reads a run back. The loop is
not imported here: the models are built on phase and settings alone.
"""

from .settings import Settings

__all__ = ["Settings"]
