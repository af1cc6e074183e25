"""`ivfast bench`: measure, show and write results."""

import logging
import math
import time
import warnings
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ivfast.runs import unknown

from .. import names, problem_of
from . import machine, plot, tables
from .problem import Size
from .results import Results
from .session import Session


def sizes_of(text: str) -> list[Size]:
    """`64x16,1024x64`."""
    found = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        numbers = part.lower().replace("×", "x").split("x")
        if len(numbers) < 2 or not all(n.isdecimal() and int(n) > 0 for n in numbers):
            raise ValueError(f"--shapes takes sizes like 64x16,1024x64, got {part!r}")
        found.append(tuple(map(int, numbers)))
    if not found:
        raise ValueError(f"--shapes takes sizes like 64x16,1024x64, got {text!r}")
    return found


def providers_of(text: str, ops: list[str], device: str) -> list[str]:
    known = list(dict.fromkeys(p.name for op in ops for p in problem_of(op).providers(device)))
    given = [name.strip() for name in text.split(",") if name.strip()]
    for name in given:
        if name not in known:
            raise unknown("provider", name, known)
    return given


def folder(out: Path | None, partial: bool) -> Path | None:
    """The folder of the results; rough or partial results replace no others unless a folder is named."""
    if out or partial:
        return out
    return Path("bench/results") if Path("bench/harness/peers.py").is_file() else Path("bench-results")


def bench(
    console: Console,
    *,
    ops: list[str] | None = None,
    shapes: str | None = None,
    providers: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    minutes: float | None = None,
    quick: bool = False,
    memory: bool = True,
    resume: bool = False,
    out: Path | None = None,
) -> bool:
    """Run the benchmarks; returns whether every result of ivfast was right."""
    warnings.simplefilter("ignore")  # the peers' own, as are these logs
    for noisy in ("torch", "jax"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda is not available: torch sees no GPU; use --device cpu")
    for op in ops or []:
        if op not in names():
            raise unknown("benchmark", op, names())
    machine.use_threads(threads)
    session = Session(
        ops or names(),
        device,
        sizes=shapes and sizes_of(shapes),
        providers=providers and providers_of(providers, ops or names(), device),
        quick=quick,
        deadline=time.monotonic() + 60 * minutes if minutes else math.inf,
    )
    here = folder(out, quick or bool(providers))
    results = open_results(session, here)
    if resume:
        versions = results.session["versions"]
        session.done = lambda group: results.has((group.key[0], group.size, *group.key[2:]), versions)
    console.print(f"[bold]{results.machine['name']}[/bold], {torch.get_num_threads()} threads", highlight=False)
    try:
        measure(console, session, results, memory and not quick and device == "cpu")
    except KeyboardInterrupt:
        where = f"(the results so far are in {results.path}; --resume continues)" if here else ""
        raise KeyboardInterrupt(where) from None
    finally:
        if results.rows:
            written = finish(console, session, results)
    if here:
        console.print("\n".join(["[bold]Look at[/bold]", *(f"  {path}" for path in written)]), soft_wrap=True)
    ours = [row for row in results.rows if row.get("wrong") and row["kind"] != "peer"]
    return not ours


def open_results(session: Session, here: Path | None) -> Results:
    described = machine.describe(session.device)
    about = {
        "date": machine.today(),
        "versions": machine.versions(),
        "quick": session.quick,
        "ops": [problem_of(name).op for name in session.names],
        "limits": session.limits,
        "missing": session.missing,
        "not_started": session.not_started,
    }
    return Results(described, about, here and here / f"{described['name']}.json")


def measure(console: Console, session: Session, results: Results, memory: bool) -> None:
    columns = BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=session.steps() + 1)
        session.step = lambda text: progress.update(task, description=text, advance=1)
        for _, rows in session.run():
            results.add(rows)
        if not memory:
            return
        rows = [row for row in results.alike(results.session["versions"]) if row["op"] in results.session["ops"]]
        for op, provider in session.memory(rows):
            progress.update(task, description=f"peak memory  {op}  {provider}")
            results.write()


def finish(console: Console, session: Session, results: Results) -> list[Path]:
    """Tables on the terminal; tables and pictures in the folder."""
    results.write()
    report = results.report()
    for op in results.session["ops"]:
        console.print(tables.terminal(report, op))
    for text in session.not_started:
        console.print(f"[yellow]not started for lack of time: {text}[/yellow]")
    if results.path is None:
        return []
    written = [results.path, results.path.with_suffix(".md")]
    written[1].write_text(tables.markdown(report))
    for op in dict.fromkeys(row["op"] for row in report["rows"]):
        picture = plot.draw(report, op, results.path.with_name(f"{results.path.stem}-{op}.png"))
        written += [picture] if picture else []
    return written
