"""The floors of CONTRIBUTING.md: which module imports which, read from the sources without running them."""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"ivfast": ROOT / "ivfast", "ivfast.bench": ROOT / "bench", "ivfast.kernels": ROOT / "kernels"}


def floors(text: str) -> dict[str, int]:
    """Path -> floor (0 is the lowest), from the table in CONTRIBUTING.md."""
    table = text.split("| floor | files |")[1].split("\n\n")[0]
    rows = [re.findall(r"`([^`]+)`", line) for line in table.splitlines() if "`" in line]
    return {path: floor for floor, paths in enumerate(reversed(rows)) for path in paths}


FLOORS = floors((ROOT / "CONTRIBUTING.md").read_text())


def sources() -> dict[str, Path]:
    """Module name -> file. `ivfast/bench` and `ivfast/kernels` may be links to folders of the root."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            if package != "ivfast" or parts[0] not in ("bench", "kernels", "_build"):  # setup.py writes _build.py
                found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


MODULES = sources()


def imports(module: str, path: Path, source: str, known: set[str]) -> Iterator[tuple[int, str]]:
    """Line and name of each of our modules that a file imports, at the top or inside a function."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # `from package import x` imports the module x if there is one, otherwise the package
            names = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name in known and name != module)


def graph() -> dict[str, list[tuple[int, str]]]:
    return {name: list(imports(name, path, path.read_text(), set(MODULES))) for name, path in MODULES.items()}


def floor_of(path: Path) -> int | None:
    """The floor of the longest table entry that contains the file."""
    name = path.relative_to(ROOT).as_posix()
    holding = [entry for entry in FLOORS if name == entry or (entry.endswith("/") and name.startswith(entry))]
    return FLOORS[max(holding, key=len)] if holding else None


def upward(found: dict[str, list[tuple[int, str]]]) -> list[str]:
    return [
        f"{MODULES[module].relative_to(ROOT)}:{line} imports {other} from a higher floor"
        for module, others in found.items()
        for line, other in others
        if floor_of(MODULES[other]) > floor_of(MODULES[module])
    ]


def circle(found: dict[str, list[tuple[int, str]]]) -> list[str]:
    try:
        TopologicalSorter({module: {other for _, other in others} for module, others in found.items()}).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_the_table_has_six_floors_and_names_what_is_there():
    assert set(FLOORS.values()) == set(range(6))
    for entry in FLOORS:
        assert (ROOT / entry).is_dir() if entry.endswith("/") else (ROOT / entry).is_file(), entry


def test_every_file_is_on_a_floor():
    assert [str(path) for path in MODULES.values() if floor_of(path) is None] == []


def test_nothing_imports_from_a_higher_floor():
    assert upward(graph()) == []


def test_no_module_imports_itself_by_way_of_others():
    assert circle(graph()) == []


@pytest.mark.parametrize(
    ("module", "line", "other"),
    [
        ("ivfast.ops.svgd", "from ..sampling import svgd", "ivfast.sampling"),
        ("ivfast.ops.svgd", "from .. import models", "ivfast.models"),
        ("ivfast.data", "def load():\n    from ..train.loop import fit", "ivfast.train.loop"),
        ("ivfast.train.phase", "import ivfast.train.loop as loop", "ivfast.train.loop"),
        ("ivfast.kernels.svgd", "from ivfast import runs", "ivfast.runs"),
    ],
)
def test_an_upward_import_is_found(module, line, other):
    broken = list(imports(module, MODULES[module], line, set(MODULES)))
    assert [name for _, name in broken] == [other]
    assert len(upward({module: broken})) == 1


def test_a_circle_is_found():
    line = "def direction(x):\n    from . import svgd_bridge"
    broken = list(imports("ivfast.ops.svgd", MODULES["ivfast.ops.svgd"], line, set(MODULES)))
    found = graph()
    assert set(circle({**found, "ivfast.ops.svgd": found["ivfast.ops.svgd"] + broken})) >= {
        "ivfast.ops.svgd",
        "ivfast.ops.svgd_bridge",
    }
