"""How benchmarks run: problems and providers, sessions, limits, peak memory, results, tables and pictures."""
