"""`ivfast info`: versions, which implementation serves each op here, and why the others do not."""

import importlib
import os
import platform
from importlib import metadata
from pathlib import Path

import torch
from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

import ivfast

from .._registry import EXTENSION_ERRORS, OPS, Op, instruction_set
from ..kernels.card import card

COLUMNS = (("cpu", "cpu", "C++"), ("triton", "cuda", "Triton"), ("cuda", "cuda", "CUDA C++"))


def missing(op: Op) -> tuple[str | None, ...]:
    """Per column of the table: why the implementation cannot serve, without the op's name; None where it can."""
    reasons = (op.missing(implementation, device) for implementation, device, _ in COLUMNS)
    return tuple(reason and reason.replace(op.name, "the op") for reason in reasons)


def served(reasons: tuple[str | None, ...]) -> tuple[str, str]:
    """What serves CPU tensors and CUDA tensors."""
    cpu, triton, cuda = (reason is None for reason in reasons)
    on_cuda = " or ".join(name for name, present in (("Triton", triton), ("CUDA C++", cuda)) if present)
    return "C++" if cpu else "reference", on_cuda or "reference"


def rows() -> list[tuple[str, tuple[str | None, ...]]]:
    """`(name, reasons)` per op; an op and its backward share a row where they are served alike."""
    found = {name: missing(op) for name, op in OPS.items()}
    out = []
    for name in sorted(found):
        forward = name.removesuffix("_backward")
        if name == forward or found.get(forward) != found[name]:
            out.append((name, found[name]))
    return out


def ops_table() -> Group:
    table = Table(
        title="Operators",
        title_justify="left",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
    )
    table.add_column("op", no_wrap=True)
    table.add_column("CPU tensors")
    table.add_column("CUDA tensors")
    for *_, label in COLUMNS:
        table.add_column(label, justify="center")
    notes: list[str] = []
    for name, reasons in rows():
        marks = []
        for reason in reasons:
            if reason is not None and reason not in notes:
                notes.append(reason)
            marks.append(Text("✓", "green") if reason is None else Text(str(notes.index(reason) + 1), "dim"))
        table.add_row(name, *served(reasons), *marks)
    lines = [Text(f"{i}  {reason}", "dim") for i, reason in enumerate(notes, 1)]
    lines.append(
        Text(
            "The reference is plain PyTorch and runs on any device. Where two are named, the shape decides. "
            "A backward pass has a row only if it is served differently from its op.",
            "dim",
        )
    )
    if not torch.cuda.is_available():
        lines.append(Text("torch sees no GPU here; the CUDA columns show what would serve one.", "dim"))
    return Group(table, Text(""), *lines)


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def versions_table() -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("ivfast", f"{ivfast.__version__} from {Path(ivfast.__file__).parent}")
    table.add_row("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    table.add_row("torch", f"{torch.__version__}, {built_for()}")
    table.add_row("GPU", ", ".join(gpu(i) for i in range(torch.cuda.device_count())) or "none")
    table.add_row(
        "CPU", f"{os.cpu_count()} cores, threads: {torch.get_num_threads()}, {torch.backends.cpu.get_cpu_capability()}"
    )
    for package in ("triton", "torchvision", "scikit-learn", "pytorch-fid"):
        table.add_row(package, version(package))
    for module, language in (("_C", "C++"), ("_cuda", "CUDA C++")):
        table.add_row(f"ivfast.{module}", kernels(module, language))
    return table


def built_for() -> str:
    cuda, rocm = torch.version.cuda, torch.version.hip
    return f"CUDA {cuda}" if cuda else f"ROCm {rocm}" if rocm else "CPU build"


def gpu(index: int) -> str:
    """A GPU's name, and what Triton compiles for."""
    found = card(torch.device("cuda", index))
    architecture = f"sm_{found.architecture}" if found.backend == "cuda" else found.architecture
    return f"{torch.cuda.get_device_name(index)} ({architecture})"


def kernels(module: str, language: str) -> str:
    """Whether an extension is loaded; if not, why, and the command that builds it in a clone of the repository."""
    error = EXTENSION_ERRORS.get(module)
    try:
        build = importlib.import_module("ivfast._build")
    except ModuleNotFoundError:  # not installed by setup.py
        build = None
    if error is None and module == "_C":
        return f"{language} kernels, loaded, on {instruction_set()}"
    if error is None:
        architectures = build.BUILT.get(module) if build else None
        return f"{language} kernels, loaded" + (f", for compute capability {architectures}" if architectures else "")
    why = build.LEFT_OUT.get(module) if build else None
    command = "pip install --no-deps --force-reinstall ."
    how = f"a C++ compiler: {command}" if module == "_C" else f"a CUDA toolkit: IVFAST_CUDA=1 {command}"
    return f"not built: {why}; to build with {how}" if why else f"not loaded: {error}; to build with {how}"


def report(console: Console | None = None) -> None:
    console = console or Console()
    console.print(versions_table())
    console.print()
    console.print(ops_table())
