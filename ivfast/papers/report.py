"""An experiment's tables on a terminal, in Markdown and in JSON."""

import json
import math
import time
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from .. import _defaults
from . import Experiment
from .session import Cell, Findings, Session, Spread, Table, start


@_defaults.initial()
def run(name: str, *, console: Console | None = None, **options) -> Findings:
    """Run an experiment, show it, and write report.md, report.json and its figures to the out folder.

    Args:
        options: those of `ivfast.papers.session.start`.
    """
    session = start(name, console=console, **options)
    begin = time.perf_counter()
    found = session.experiment.function()(session)
    found = found._replace(notes=[*session.notes, *found.notes])
    seconds = time.perf_counter() - begin
    session.out.mkdir(parents=True, exist_ok=True)
    (session.out / "report.md").write_text(markdown(session, found, seconds))
    (session.out / "report.json").write_text(json.dumps(as_json(session, found, seconds), indent=1) + "\n")
    show(session.console, session, found, seconds)
    return found


def text(cell: Cell) -> str:
    if cell is None:
        return "–"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def heading(session: Session, seconds: float) -> tuple[str, str]:
    """The title, and the conditions of the run."""
    experiment: Experiment = session.experiment
    where = f" on {session.data}" if session.data else ""
    title = f"{experiment.name}: {experiment.source}{where}"
    if not experiment.data:
        return title, f"Computed exactly, in {seconds:.1f} s."
    size = "the paper's size" if session.full else "a size for two CPU cores"
    given = {"steps": session.steps, "samples": session.samples}
    options = "".join(f", --{name} {value}" for name, value in given.items() if value is not None)
    seeds = ", ".join(map(str, session.seeds))
    return (
        title,
        f"Run at {size}{options}, with seeds {seeds}, in {seconds:.0f} s; ± is the standard deviation over seeds.",
    )


def show(console: Console, session: Session, found: Findings, seconds: float) -> None:
    title, conditions = heading(session, seconds)
    console.print(f"\n[bold]{escape(title)}[/bold]\n{session.experiment.about}\n[dim]{escape(conditions)}[/dim]")
    for table in found.tables:
        console.print(_terminal(table))
    for note in found.notes:
        console.print(f"• {escape(note)}")
    files = {**found.figures, "tables": session.out / "report.md", "numbers": session.out / "report.json"}
    console.print("\n[bold]Look at[/bold]")
    wide = max(len(str(path)) for path in files.values())
    for what, path in files.items():
        console.print(f"  {escape(f'{path!s:{wide}}')}  [dim]{escape(what)}[/dim]", soft_wrap=True)


def _terminal(table: Table) -> RichTable:
    drawn = RichTable(title=escape(table.title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(table.columns):
        drawn.add_column(escape(column), justify="left" if i == 0 else "right")
    for row in table.rows:
        drawn.add_row(*(escape(text(cell)) for cell in row))
    return drawn


def markdown(session: Session, found: Findings, seconds: float) -> str:
    title, conditions = heading(session, seconds)
    lines = [f"# {title}", "", session.experiment.about, "", conditions, ""]
    for table in found.tables:
        lines += [f"**{table.title}**", "", _line(table.columns), "|---|" + "---:|" * (len(table.columns) - 1)]
        lines += [_line(map(text, row)) for row in table.rows] + [""]
    lines += [line for what, path in found.figures.items() for line in (f"![{what}]({path.name})", "")]
    return "\n".join(lines + [f"- {note}" for note in found.notes]).rstrip() + "\n"


def _line(cells) -> str:
    return "| " + " | ".join(cells) + " |"


def as_json(session: Session, found: Findings, seconds: float) -> dict[str, object]:
    def plain(cell: Cell) -> object:
        if isinstance(cell, Spread):
            return {"values": [plain(value) for value in cell.values], "diverged": cell.diverged}
        return str(cell) if isinstance(cell, float) and not math.isfinite(cell) else cell  # JSON has no infinity

    return {
        "experiment": session.experiment.name, "source": session.experiment.source, "data": session.data,
        "full": session.full, "steps": session.steps, "samples": session.samples, "seeds": list(session.seeds),
        "seconds": round(seconds, 2),
        "tables": [
            {"title": t.title, "columns": list(t.columns), "rows": [list(map(plain, row)) for row in t.rows]}
            for t in found.tables
        ],
        "figures": {what: Path(path).name for what, path in found.figures.items()},
        "notes": found.notes,
    }  # fmt: skip
