"""`ivfast sample` and `ivfast evaluate`."""

import json
from pathlib import Path
from typing import Annotated

from rich.markup import escape

from .app import Debug, Device, Download, Root, Run, app, console, friendly, integer, listed, option
from .names import METRICS


@app.command()
@friendly
def sample(
    run: Run,
    n: Annotated[int, integer("-n", "--number", least=1, help="Number of samples.")] = 64,
    out: Annotated[
        Path | None,
        option(metavar="PATH", help="One grid if it ends in .png, else a folder of files; default: RUN/samples.png."),
    ] = None,
    columns: Annotated[int | None, integer(least=1, show_default=False, help="Samples per row of the grid.")] = None,
    seed: Annotated[int, integer(least=0, metavar="S", help="The same seed draws the same samples.")] = 0,
    device: Device = None,
    debug: Debug = False,
) -> None:
    """Draw samples from a trained system.

    \b[bold]Examples[/bold]
      [green]ivfast sample runs/ivaae-rad-digits-1 -n 64 --out grid.png[/green]
      [green]ivfast sample runs/ivaae-rad-digits-1 -n 5000 --out samples/[/green]
    """
    from .. import metrics, runs
    from ..runs import pictures

    if out is not None and out.suffix.lower() in (".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".pdf"):
        raise ValueError(f"--out must end in .png, or be a folder, got {out}")
    system, settings = runs.trained(run, device)
    if not hasattr(system, "sample"):
        raise ValueError(f"{settings.system} does not generate images")
    images = metrics.generate(system, n, seed)
    out = out or run / "samples.png"
    points = images.dim() == 2
    if points and out.suffix.lower() != ".png":
        raise ValueError(f"--out must end in .png for points, which are drawn into one picture, got {out}")
    if out.suffix.lower() == ".png":
        out.parent.mkdir(parents=True, exist_ok=True)
        pictures.samples(images, out, columns)
    else:
        pictures.single(images, out)
    size = f"{images.shape[-1]} coordinates" if points else f"{images.shape[-2]}x{images.shape[-1]}"
    console.print(f"{n:,} samples of {size} in [bold]{escape(str(out))}[/bold]", soft_wrap=True)


EVALUATE_HELP = f"""
Measure a trained system; the values also go to RUN/metrics.json.

\b[bold]Metrics[/bold]
{listed(METRICS)}

\b[bold]Examples[/bold]
  [green]ivfast evaluate runs/ivaae-rad-digits-1[/green]
  [green]ivfast evaluate runs/ivaae-rad-mnist-1 --metrics fld,fid --samples 20000[/green]
"""


@app.command(help=EVALUATE_HELP)
@friendly
def evaluate(
    run: Run,
    metrics: Annotated[
        str | None, option(metavar="A,B,...", help="Metrics to compute; default: all that apply except fid and probe.")
    ] = None,
    samples: Annotated[int, integer(least=2, help="Samples to draw; S1 uses 20000 for FID.")] = 10_000,
    seed: Annotated[int, integer(least=0, metavar="S", help="Seed of the samples.")] = 0,
    root: Root = None,
    device: Device = None,
    inception_weights: Annotated[
        Path | None,
        option(metavar="FILE", help="For fid: pytorch-fid's pt_inception-2015-12-05-6726825d.pth."),
    ] = None,
    download: Download = False,
    debug: Debug = False,
) -> None:
    from .. import data as datasets
    from .. import runs
    from ..runs import evaluation, report

    names = [name.strip() for name in metrics.split(",") if name.strip()] if metrics else None
    for name in names or []:
        if name not in evaluation.METRICS:
            raise runs.unknown("metric", name, evaluation.METRICS)
    system, settings = runs.trained(run, device, root)
    dataset = datasets.load(settings.data, settings.root, settings.image_size, download=download)
    runs.same_classes(system, dataset)
    evaluated = evaluation.Evaluation(
        system, dataset, n=samples, seed=seed, inception_weights=inception_weights, download=download
    )
    chosen = names or evaluated.default()
    left_out = {} if names else {name: reason for name in chosen if (reason := evaluated.missing(name))}
    values = []
    for name in chosen:
        if name in left_out:
            continue
        with console.status(f"{name} ..."):
            values += evaluated.run(name)
    record = {value.name: value.value for value in values} | {"samples": samples, "seed": seed}
    (run / "metrics.json").write_text(json.dumps(record, indent=2) + "\n")
    if values:
        console.print(report.values_table(f"{settings.system} on {settings.data}, {run}", values))
    for reason in left_out.values():
        console.print(f"left out: {escape(reason)}", soft_wrap=True)
    judges = {"classifier-distance", "modes", "histogram"}
    if names is None and hasattr(system, "sample") and not judges.intersection(chosen):
        console.print(
            "No metric above judges the samples. --metrics fid does; it needs pytorch-fid's Inception weights.",
            soft_wrap=True,
        )
