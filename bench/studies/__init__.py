"""Measurements of more than one op, each a command: `python -m ivfast.bench.studies.scale`."""

from ivfast._extra import require

require("ivfast.bench.studies", "rich", "matplotlib")
