"""Benchmarks: each op's problem and the ways to compute it, shared by pytest, `ivfast bench` and gpu.py.

The package is installed as ivfast.bench. The benchmark of an op is `PROBLEM` in the module with the op's name in
`ivfast.ops`, plus a suffix for a second form. `harness/` runs the benchmarks; `studies/` measures whole systems.
"""

import importlib
import pkgutil

from ivfast import ops


def names() -> list[str]:
    """Every op with a benchmark, by the word that the op's files share."""
    here, there = ({module.name for module in pkgutil.iter_modules(path)} for path in (__path__, ops.__path__))
    return sorted(name for name in here if any(name == op or name.startswith(f"{op}_") for op in there))


def problem_of(name: str):
    return importlib.import_module(f".{name}", __name__).PROBLEM
