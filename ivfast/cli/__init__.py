"""The command line: `ivfast train | sample | evaluate | paper | bench | info`.

torch is imported inside the commands, so that these files cost the help nothing.
"""

from .app import app, set_streams
from .names import DATA, METRICS, SYSTEMS

from . import train, evaluate, paper, bench  # the order of the help  # isort: skip

__all__ = ["DATA", "METRICS", "SYSTEMS", "app", "bench", "evaluate", "main", "paper", "train"]


def main() -> None:
    """Entry point of `ivfast`."""
    set_streams()
    app()
