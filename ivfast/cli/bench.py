"""`ivfast bench` and `ivfast info`."""

from pathlib import Path
from typing import Annotated

import typer

from .app import Debug, app, console, errors, friendly, option

BENCH_HELP = """
Measure the ops against the best other ways to compute them, on this machine.

\b[bold]Ops[/bold]
  as_distance, as_distance_additive, as_distance_sums, bridge, bridge_blockwise,
  bridge_substitute, exp_elbo, fld, frechet, frechet_samples, gaussian, gaussian_kl,
  gaussian_statistics, importance, linear_multi_js, median, mmd, multi_js, multi_js_blocks,
  multi_js_divergence, polar, reconstruction, reconstruction_bce, sqrtm_spd, svgd,
  svgd_bridge, svgd_sampling

\b[bold]Providers[/bold]
  ivfast as it comes and each of its implementations, eager PyTorch,
  torch.compile, fused attention, and where they are installed
  ([b]pip install "ivfast\\[bench]"[/b]) KeOps, JAX and blackjax. Each is checked
  against float64 first, and a wrong one is not timed. They take turns, so
  that a drift of the machine meets all of them.

\b[bold]Results[/bold]
  Median times, over ivfast's and over the best peer's; the share of a limit:
  the op's flop at the rate of a large product, its traffic at the rate of a
  copy, or a call that computes nothing; peak memory above the inputs. JSON,
  tables and pictures go to bench/results in a clone of the repository, else
  to bench-results. What is measured again replaces what was there.

\b[bold]Examples[/bold]
  [green]ivfast bench --minutes 12[/green]
  [green]ivfast bench svgd --quick[/green]                rough; written only with --out
  [green]ivfast bench svgd --shapes 64x16,300x50[/green]
  [green]ivfast bench --resume[/green]                    after Ctrl-C
"""


@app.command(help=BENCH_HELP)
@friendly
def bench(
    ops: Annotated[
        list[str] | None, typer.Argument(metavar="OP", help="Of the above; default: all.", show_default=False)
    ] = None,
    shapes: Annotated[str | None, option(metavar="NxD,...", help="Sizes, in place of the op's own.")] = None,
    providers: Annotated[
        str | None, option(metavar="A,B,...", help="Peers and implementations to measure beside ivfast.")
    ] = None,
    quick: Annotated[bool, option("--quick", help="Small sizes, few rounds, no memory.")] = False,
    device: Annotated[str | None, option(metavar="NAME", help="cpu or cuda; default: a GPU, else the CPU.")] = None,
    threads: Annotated[int | None, option(min=1, metavar="N", help="Processors for every provider.")] = None,
    minutes: Annotated[float | None, option(min=0, metavar="M", help="Start nothing new after so long.")] = None,
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Peak memory, a process each.")] = True,
    resume: Annotated[bool, option("--resume", help="Only what is not there yet with these versions.")] = False,
    out: Annotated[Path | None, option(metavar="DIR", help="Folder of the results.")] = None,
    debug: Debug = False,
) -> None:
    from ..bench.harness import command

    given = {"ops": ops, "shapes": shapes, "providers": providers, "quick": quick, "device": device, "out": out}
    right = command.bench(console, **given, threads=threads, minutes=minutes, memory=memory, resume=resume)
    if not right:
        errors.print("[bold red]error:[/bold red] ivfast computed something wrong: see the table")
        raise typer.Exit(1)


@app.command()
@friendly
def info(debug: Debug = False) -> None:
    """Versions, and which implementation serves each operator on this machine and why the others do not."""
    from .info import report

    report(console)
