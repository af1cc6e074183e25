"""`ivfast train`."""

import time
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape

from .app import app, console, friendly, listed, option
from .names import DATA, PAPERS, SYSTEMS

_DATA, _LENGTH, _MODEL, _MACHINE, _RUN = "Data", "Length", "Model", "Machine", "Run"  # panels of the help

TRAIN_HELP = f"""
Train a system of the papers, with the paper's settings for the data set.

\bA run is a new folder [b]runs/SYSTEM-DATA-N[/b] with config.json, log.jsonl,
tensorboard/, pictures/ and checkpoints/. Ctrl-C and SIGTERM finish the step,
save, and say how to go on; a run that was killed goes on from its checkpoint.

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
  [green]ivfast train avb --data four-points[/green]
  [green]ivfast train as-introvae --data 8-gaussians --as-kernel additive[/green]
  [green]ivfast train --data folder --root ~/photos --image-size 64[/green]
  [green]ivfast train --resume --out runs/ivaae-rad-digits-1 --epochs 400[/green]
"""


@app.command(help=TRAIN_HELP)
@friendly
def train(
    system: Annotated[
        str | None, typer.Argument(metavar="SYSTEM", help="One of the above; default: ivaae-rad.", show_default=False)
    ] = None,
    data: Annotated[str | None, option(metavar="NAME", panel=_DATA, help="One of the above; default: digits.")] = None,
    root: Annotated[
        Path | None, option(metavar="DIR", panel=_DATA, help="Folder that holds the data set; default: data.")
    ] = None,
    image_size: Annotated[
        int | None, option(min=4, metavar="S", panel=_DATA, help="Resize images to S x S pixels.")
    ] = None,
    flip: Annotated[
        bool | None, option("--flip/--no-flip", panel=_DATA, help="Mirror training images at random; default: no.")
    ] = None,
    data_memory: Annotated[
        float | None,
        option(
            min=0,
            metavar="GIB",
            panel=_DATA,
            help="Device memory for the training images; a larger set stays on the host and is prefetched. "
            "Default: half of what is free.",
        ),
    ] = None,
    download: Annotated[
        bool, option("--download", panel=_DATA, help="Fetch a missing data set; without it, nothing is fetched.")
    ] = False,
    data_share: Annotated[
        float | None,
        option(metavar="P", panel=_DATA, help="Train on this share of the images, class by class: 0.01."),
    ] = None,
    label_share: Annotated[
        float | None,
        option(metavar="P", panel=_DATA, help="Share of the images that svae and aasvae see with labels; default: 1."),
    ] = None,
    epochs: Annotated[int | None, option(min=1, metavar="N", panel=_LENGTH, help="Passes over the data.")] = None,
    steps: Annotated[int | None, option(min=1, metavar="N", panel=_LENGTH, help="Steps, in place of epochs.")] = None,
    batch_size: Annotated[int | None, option(min=1, metavar="B", panel=_LENGTH, help="Images per step.")] = None,
    latent_dim: Annotated[int | None, option(min=1, metavar="D", panel=_MODEL, help="Size of a code.")] = None,
    encoder_loss: Annotated[
        Literal["ascent", "confusion"] | None,
        option(panel=_MODEL, help="IVAAE's and IVGAN's encoder: the papers' ascent (default) or bounded confusion."),
    ] = None,
    k: Annotated[
        int | None, option(min=1, metavar="K", panel=_MODEL, help="Number of blocks of a code that IVGAN replaces.")
    ] = None,
    mu: Annotated[
        float | None, option(min=0, metavar="MU", panel=_MODEL, help="Weight of IVGAN's intervention loss.")
    ] = None,
    lam: Annotated[
        float | None,
        option(min=0, metavar="LAMBDA", panel=_MODEL, help="Weight of the reconstruction (the papers' λ)."),
    ] = None,
    packing: Annotated[
        int | None,
        option(min=1, metavar="M", panel=_MODEL, help="A GAN's discriminator judges M samples side by side."),
    ] = None,
    fld_weight: Annotated[
        float | None,
        option(
            min=0,
            metavar="W",
            panel=_MODEL,
            help="Add W times the Fréchet latent distance of the batch's codes (S1, section 4) to the encoder's "
            "objective; default: 0. B codes span B - 1 directions: with B <= D their distance is D - B + 1 at best, "
            "and its pull shrinks them. Take B several times D.",
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        option(metavar="T", panel=_MODEL, help="Of the aa... systems: above 1, their samples weigh more; default: 1."),
    ] = None,
    contrast: Annotated[
        Literal["prior", "adaptive"] | None,
        option(panel=_MODEL, help="AVB tells codes from the prior (default), or from Gaussians of their moments."),
    ] = None,
    divergence: Annotated[
        Literal["js", "kl"] | None,
        option(panel=_MODEL, help="AVB's discriminator: a GAN's objective (js, the default), or Eq. 5.10's (kl)."),
    ] = None,
    beta_rec: Annotated[
        float | None, option(min=0, metavar="B", panel=_MODEL, help="Introspective VAEs: weight of the reconstruction.")
    ] = None,
    beta_kl: Annotated[
        float | None,
        option(min=0, metavar="B", panel=_MODEL, help="Likewise of the KL: of images, and for G of fakes."),
    ] = None,
    beta_neg: Annotated[
        float | None, option(min=0, metavar="B", panel=_MODEL, help="Likewise of the fakes' KL, which E raises.")
    ] = None,
    margin: Annotated[
        float | None,
        option(min=0, metavar="M", panel=_MODEL, help="Of introvae's hinge: E raises a KL up to here, nats."),
    ] = None,
    vae_steps: Annotated[
        int | None, option(min=0, metavar="N", panel=_MODEL, help="Introspective VAEs: first steps, as a plain VAE.")
    ] = None,
    anneal_steps: Annotated[
        int | None,
        option(min=0, metavar="N", panel=_MODEL, help="AS-IntroVAE: steps from the AS-Distance to the KL; S5: T/5."),
    ] = None,
    as_kernel: Annotated[
        Literal["product", "additive"] | None,
        option(panel=_MODEL, help="Its AS-Distance: S5's Eq. 8, or dimension by dimension as its authors' code."),
    ] = None,
    ema: Annotated[
        float | None, option(min=0, max=1, metavar="DECAY", panel=_MODEL, help="Average the weights, as in 0.999.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        option("--set", metavar="NAME=VALUE", panel=_MODEL, help="Any setting of config.json: --set width=512."),
    ] = None,
    seed: Annotated[int | None, option(metavar="S", panel=_MODEL, help="Fixes weights, noise and data order.")] = None,
    device: Annotated[
        str | None, option(metavar="NAME", panel=_MACHINE, help="cpu, cuda or cuda:N; default: a GPU, else the CPU.")
    ] = None,
    threads: Annotated[
        int | None, option(min=1, metavar="N", panel=_MACHINE, help="CPU threads; default: 1 for small networks.")
    ] = None,
    precision: Annotated[
        Literal["fp32", "bf16"] | None, option(panel=_MACHINE, help="bf16 is autocast; weights stay in fp32.")
    ] = None,
    compile_: Annotated[
        bool | None, option("--compile/--no-compile", panel=_MACHINE, help="Compile the losses with torch.compile.")
    ] = None,
    capture: Annotated[
        bool | None,
        option(
            "--capture/--no-capture",
            panel=_MACHINE,
            help="Each step as one CUDA graph; default: on a GPU, where the system allows it and without --compile.",
        ),
    ] = None,
    out: Annotated[
        Path | None, option(metavar="DIR", panel=_RUN, help="Folder of the run; default: runs/SYSTEM-DATA-N.")
    ] = None,
    resume: Annotated[bool, option("--resume", panel=_RUN, help="Go on with the run in --out.")] = False,
    debug: Annotated[bool, option("--debug", panel=_RUN, help="Show the full traceback of an error.")] = False,
) -> None:
    given = {
        "system": system, "data": data, "root": root and str(root), "epochs": epochs, "steps": steps,
        "batch_size": batch_size, "latent_dim": latent_dim, "image_size": image_size, "seed": seed, "device": device,
        "precision": precision, "compile": compile_, "capture": capture, "ema": ema, "encoder_loss": encoder_loss,
        "fld_weight": fld_weight, "k": k, "mu": mu, "lam": lam, "packing": packing, "temperature": temperature,
        "contrast": contrast, "divergence": divergence, "data_share": data_share, "label_share": label_share,
        "flip": flip, "data_memory": data_memory, "beta_rec": beta_rec, "beta_kl": beta_kl, "beta_neg": beta_neg,
        "margin": margin, "vae_steps": vae_steps, "anneal_steps": anneal_steps, "as_kernel": as_kernel,
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    _train(given, assigned=set_ or [], out=out, resume=resume, threads=threads, download=download)


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
    from ..train.loop import fit

    given = {**given, **runs.assignments(assigned)}
    settings, out = runs.resumed(given, out) if resume else runs.fresh(given, out)
    ranks = processes.join(settings.device)
    out = ranks.same(out)
    dataset = ranks.first_alone(
        lambda: datasets.load(settings.data, settings.root, settings.image_size, download=download)
    )
    settings = runs.with_classes(settings, dataset)
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
    seconds = time.perf_counter() - begin
    processes.leave()
    if not ranks.first:
        return
    trained, _ = runs.load_system(out, settings.device)
    drawn = report.draw(trained, dataset, out)
    if resume and runs.last_step(out) == before:
        console.print("The run was complete already: more --epochs or --steps would make it go on.")
    report.print_end(console, settings, out, history, seconds, drawn)
