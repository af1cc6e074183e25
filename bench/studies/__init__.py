"""Measurements of more than one op, each a command: `python -m ivfast.bench.studies.scale`."""
