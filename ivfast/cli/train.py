"""`ivfast train`."""

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from ..train import declare
from ..train.settings import Settings
from .app import THREADS, app, console, errors, friendly, integer, listed, option, say
from .names import DATA, PAPERS, SYSTEMS
from .options import COMMON, PerSystem, declared

TRAIN_HELP = f"""
Train a system of the papers, with the paper's settings for the data set.

\b[bold]ivfast train SYSTEM --help[/bold] lists the options of one system, with its
defaults; below are those that all systems share.

\bA run makes a folder [b]runs/SYSTEM-DATA-N[/b] with config.json, log.jsonl,
tensorboard/, pictures/ and checkpoints/. Ctrl-C, SIGTERM and SIGHUP finish the
step, save, draw the pictures and print the command that resumes; a second
Ctrl-C skips the pictures. A killed run resumes from its last checkpoint.

\b[bold]Systems[/bold]
{listed(SYSTEMS)}
{PAPERS}

\b[bold]Data sets[/bold]
{listed(DATA)}

\b[bold]Examples[/bold]
  [green]ivfast train[/green]
  [green]ivfast train wae-mmd --epochs 50 --seed 1[/green]
  [green]ivfast train ivaae-bw --data celeba --root ~/data --device cuda --compile[/green]
  [green]ivfast train aasvae --label-share 0.1 --temperature 3[/green]
  [green]ivfast train avb --data four-points --help[/green]
  [green]ivfast train as-introvae --data 8-gaussians --as-kernel additive[/green]
  [green]ivfast train --data folder --root ~/photos --image-size 64[/green]
  [green]ivfast train --resume --out runs/ivaae-rad-digits-1 --epochs 400[/green]
"""


def train(
    system: Annotated[
        str | None, typer.Argument(metavar="SYSTEM", help="Name of a system; default: ivaae-rad.", show_default=False)
    ] = None,
    download: Annotated[
        bool, option("--download", panel=declare.DATA, help="Download a missing data set. Nothing else is downloaded.")
    ] = False,
    threads: Annotated[
        int | None,
        integer(
            least=1,
            most=THREADS,
            panel=declare.MACHINE,
            show_default=False,
            help="CPU threads; default: 1 for small networks.",
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        option("--set", metavar="NAME=VALUE", panel=declare.RUN, help="Any setting of config.json: --set width=512."),
    ] = None,
    out: Annotated[
        Path | None, option(metavar="DIR", panel=declare.RUN, help="Folder of the run; default: runs/SYSTEM-DATA-N.")
    ] = None,
    resume: Annotated[bool, option("--resume", panel=declare.RUN, help="Resume the run in --out.")] = False,
    debug: Annotated[bool, option("--debug", panel=declare.RUN, help="Show the full traceback of an error.")] = False,
    **given: object,
) -> None:
    given = given if system is None else {"system": system, **given}
    _train(given, assigned=set_ or [], out=out, resume=resume, threads=threads, download=download)


class Train(PerSystem):
    train = staticmethod(train)


_shared = {name: Settings.declared()[name].default for name in COMMON}
app.command("train", cls=Train, help=TRAIN_HELP)(friendly(declared(train, Settings, _shared)))


def _train(
    given: dict[str, object],
    *,
    assigned: list[str],
    out: Path | None,
    resume: bool,
    threads: int | None,
    download: bool,
) -> None:
    """Trains with the settings `given`, NAME=VALUE of `assigned`, and the paper's for all others."""
    from .. import data as datasets
    from .. import models, runs
    from ..runs import report
    from ..train import ranks as processes
    from ..train.loop import Interrupted, fit

    given = {**given, **runs.assigned(given, assigned, out if resume else None)}
    settings, out = runs.resumed(given, out) if resume else runs.fresh(given, out)
    ranks = processes.join(settings.device)
    out = ranks.same(out)
    dataset = ranks.first_alone(
        lambda: datasets.load(settings.data, settings.root, settings.image_size, download=download)
    )
    settings = runs.with_classes(settings, dataset)
    if "classes" in given and settings.classes != given["classes"]:
        raise ValueError(f"classes must be {settings.classes}, as {settings.data} has, got {given['classes']}")
    runs.use_threads(threads, settings)
    network = models.build(settings, tuple(dataset.train.shape[1:]))
    images, labels = runs.training_set(network, dataset, download=download)
    shape, kind = "x".join(map(str, images.shape[1:])), "images" if images.dim() == 4 else "points"
    console.quiet = not ranks.first
    console.print(
        f"[bold]{settings.system}[/bold] on {settings.data}: {len(images):,} training and {len(dataset.test):,} "
        f"test {kind} {shape}, codes of {settings.latent_dim}, batches of {settings.batch_size}, on {settings.device}"
    )
    console.print(f"writing to [bold]{escape(str(out))}[/bold]", soft_wrap=True)
    before, begin = runs.last_step(out) if resume else 0, time.perf_counter()
    stopped = None
    try:
        history = fit(
            network,
            images,
            settings,
            out,
            resume=resume,
            evaluate=report.while_training(dataset),
            draw=report.draw_samples,
            labels=None if labels is None else labels.to(settings.device),
        )
    except Interrupted as interrupted:
        stopped, history = interrupted, interrupted.history
    seconds = time.perf_counter() - begin
    processes.leave()
    if ranks.first:
        try:
            trained, _ = runs.load_system(out, settings.device)
            drawn = report.draw(trained, dataset, out)
            if resume and stopped is None and runs.last_step(out) == before:
                console.print("The run was already complete; to continue it, raise --epochs or --steps.")
            report.print_end(console, settings, out, history, seconds, drawn)
        except (Exception, KeyboardInterrupt) as error:
            if stopped is None:
                raise
            if isinstance(error, Exception):  # how to go on is still to be said
                say(errors, f"[bold red]error:[/bold red] {escape(str(error) or type(error).__name__)}")
    if stopped is not None:
        raise stopped
