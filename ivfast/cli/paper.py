"""`ivfast paper`: a command for each experiment."""

import functools
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.padding import Padding

from ..papers import EXPERIMENTS, Experiment, find
from .app import Debug, Device, Download, app, console, errors, friendly, integer, option

MOST_SEEDS = 10_000  # of which each is a training
KEPT = (
    "Finished runs are kept in the folder's [b]rows.jsonl[/b] and are not repeated, so after Ctrl-C the same command "
    "continues. The report is [b]report.md[/b]; its numbers are in [b]report.json[/b]."
)


class Experiments(typer.core.TyperGroup):
    """An unknown name is an error of ours, which names the known ones."""

    def resolve_command(self, context, arguments):
        try:
            find(arguments[0])
        except ValueError as error:
            errors.print(f"[bold red]error:[/bold red] {escape(str(error))}", soft_wrap=True)
            raise typer.Exit(2) from None
        return super().resolve_command(context, arguments)


paper = typer.Typer(
    cls=Experiments,
    rich_markup_mode="rich",
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
app.add_typer(paper, name="paper")


@paper.callback()
def experiments(
    context: typer.Context,
    list_: Annotated[bool, typer.Option("--list", help="List the experiments with their sizes.")] = False,
) -> None:
    """Repeat an experiment of the papers, with their numbers next to ours.

    \b[bold]Examples[/bold]
      [green]ivfast paper s2-example1[/green]
      [green]ivfast paper s1-fig2 --seeds 0,1,2 --out fig2[/green]
      [green]ivfast paper s2-stacked --full --root ~/data --device cuda[/green]
      [green]ivfast paper s1-tables --help[/green]
    """
    if list_:
        for experiment in EXPERIMENTS.values():
            sizes = f"[dim]{experiment.small}\n--full: {experiment.full}[/dim]"
            console.print(f"[bold cyan]{experiment.name}[/bold cyan]  {experiment.source}")
            console.print(Padding(f"{experiment.about}\n{sizes}", (0, 0, 0, 2)))
        raise typer.Exit
    if context.invoked_subcommand is None:
        console.print(context.get_help())


def _seeds(text: str | None) -> list[int] | None:
    """`3` for 0, 1, 2; `4,7` for those, `4,` for one."""
    if text is None:
        return None
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"--seeds takes a number or a list like 0,1,2, got {text!r:.80}") from None
    if "," in text or not numbers:
        return numbers
    if not 1 <= numbers[0] <= MOST_SEEDS:
        raise ValueError(
            f"--seeds must be a number of seeds from 1 to {MOST_SEEDS}, or a list like 0,1,2, got {text!r:.80}"
        )
    return list(range(numbers[0]))


def _paper_command(experiment: Experiment) -> None:
    about = f"""
{experiment.source}. {experiment.about}

[bold]Size:[/bold] {experiment.small}.

[bold]With --full:[/bold] {experiment.full}.

{KEPT}
"""

    @paper.command(experiment.name, help=about, short_help=f"{experiment.source}. {experiment.about}")
    @functools.partial(friendly, name="paper")
    def command(
        full: Annotated[
            bool, option("--full", help="Use the paper's size and data; if the data is missing, say so and run small.")
        ] = False,
        data: Annotated[
            str | None,
            option(
                metavar="NAME",
                help=f"Data set; default: {experiment.data or 'none'}"
                + (f", with --full {experiment.paper_data}." if experiment.paper_data != experiment.data else "."),
            ),
        ] = None,
        root: Annotated[Path, option(metavar="DIR", help="Folder that holds the data set; default: data.")] = "data",
        download: Download = False,
        seeds: Annotated[
            str | None,
            option(
                metavar="N|A,B,..",
                help=f"Number of seeds, or a list; default: {experiment.seeds}, with --full {experiment.full_seeds}.",
            ),
        ] = None,
        steps: Annotated[
            int | None,
            integer(least=1, show_default=False, help="Steps of each training, instead of the experiment's."),
        ] = None,
        samples: Annotated[
            int | None,
            integer(least=2, show_default=False, help="Samples for each value, instead of the experiment's."),
        ] = None,
        device: Device = None,
        workers: Annotated[
            int | None,
            integer(least=1, show_default=False, help="Parallel runs; default: one per core, one on a GPU."),
        ] = None,
        out: Annotated[
            Path | None, option(metavar="DIR", help=f"Folder of the report; default: papers/{experiment.name}.")
        ] = None,
        debug: Debug = False,
    ) -> None:
        from ..papers import report

        report.run(
            experiment.name, console=console, seeds=_seeds(seeds), full=full, data=data, root=root, device=device,
            out=out, steps=steps, samples=samples, workers=workers, download=download,
        )  # fmt: skip


for _experiment in EXPERIMENTS.values():
    _paper_command(_experiment)
