"""How benchmarks run: problems and providers, sessions, limits, peak memory, results, tables and pictures."""

from ivfast._extra import require

require("ivfast bench", "rich", "matplotlib")
