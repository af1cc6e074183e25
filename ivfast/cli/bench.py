"""`ivfast bench` and `ivfast info`."""

from pathlib import Path
from typing import Annotated

import typer

from .app import THREADS, Debug, app, console, errors, friendly, integer, option

BENCH_HELP = """
Measure the ops against the best alternatives on this machine.

\b[bold]Ops[/bold]
  as_distance, as_distance_additive, as_distance_sums, bridge,
  bridge_blockwise, bridge_substitute, exp_elbo, fld, frechet,
  frechet_samples, gaussian, gaussian_kl, gaussian_statistics, importance,
  linear_multi_js, median, mmd, multi_js, multi_js_blocks,
  multi_js_divergence, polar, reconstruction, reconstruction_bce,
  sqrtm_spd, svgd, svgd_bridge, svgd_sampling

\b[bold]Providers[/bold]
  ivfast by default and with each of its implementations, eager PyTorch,
  torch.compile, fused attention, and, if installed, KeOps, JAX and blackjax
  ([b]pip install "ivfast\\[bench]"[/b]). Each is first checked against float64; a
  wrong one is not timed. Providers take turns, so that a drift of the
  machine affects all of them.

\b[bold]Results[/bold]
  Median times, and their ratios to ivfast and to the best peer; how close
  ivfast comes to its limit (the op's flop at the rate of a large product, its
  traffic at the rate of a copy, or a call that computes nothing); peak memory
  above the inputs. JSON, tables and pictures go to bench/results in a clone
  of the repository, otherwise to bench-results. New measurements replace old
  ones.

\b[bold]Examples[/bold]
  [green]ivfast bench --minutes 12[/green]
  [green]ivfast bench svgd --quick[/green]                rough; saved only with --out
  [green]ivfast bench svgd --shapes 64x16,300x50[/green]
  [green]ivfast bench --resume[/green]                    after Ctrl-C
"""


@app.command(help=BENCH_HELP)
@friendly
def bench(
    ops: Annotated[
        list[str] | None, typer.Argument(metavar="OP", help="Ops to measure; default: all.", show_default=False)
    ] = None,
    shapes: Annotated[str | None, option(metavar="NxD,...", help="Sizes to measure instead of the op's own.")] = None,
    providers: Annotated[
        str | None, option(metavar="A,B,...", help="Peers and implementations to compare with ivfast.")
    ] = None,
    quick: Annotated[bool, option("--quick", help="Small sizes, few rounds, no peak memory.")] = False,
    device: Annotated[str | None, option(metavar="NAME", help="cpu or cuda; default: a GPU if there is one.")] = None,
    threads: Annotated[
        int | None, integer(least=1, most=THREADS, show_default=False, help="CPU threads of every provider.")
    ] = None,
    minutes: Annotated[float | None, option(min=0, metavar="M", help="Start nothing new after M minutes.")] = None,
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Peak memory, each in its own process.")] = True,
    resume: Annotated[bool, option("--resume", help="Measure only what has no results for these versions.")] = False,
    out: Annotated[Path | None, option(metavar="DIR", help="Folder of the results.")] = None,
    debug: Debug = False,
) -> None:
    from ..bench.harness import command

    given = {"ops": ops, "shapes": shapes, "providers": providers, "quick": quick, "device": device, "out": out}
    right = command.bench(console, **given, threads=threads, minutes=minutes, memory=memory, resume=resume)
    if not right:
        errors.print("[bold red]error:[/bold red] ivfast computed a wrong result: see the table")
        raise typer.Exit(1)


@app.command()
@friendly
def info(debug: Debug = False) -> None:
    """Show versions, which implementation serves each operator here, and why others do not."""
    from .info import report

    report(console)
