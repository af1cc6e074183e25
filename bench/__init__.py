"""Benchmarks: an op's problem and the ways to compute it, once, for pytest, `ivfast bench` and gpu.py.

Installed as ivfast.bench. A module named like an op's in `ivfast.ops`, with a suffix for a second form, holds its
benchmark, `PROBLEM`. `harness/` runs them; `studies/` measures whole systems.
"""

import importlib
import pkgutil

from ivfast import ops


def names() -> list[str]:
    """Every op with a benchmark, by the word that its files share."""
    here, there = ({module.name for module in pkgutil.iter_modules(path)} for path in (__path__, ops.__path__))
    return sorted(name for name in here if any(name == op or name.startswith(f"{op}_") for op in there))


def problem_of(name: str):
    return importlib.import_module(f".{name}", __name__).PROBLEM
