"""The command line: `ivfast train | sample | evaluate | paper | bench | info`.

torch is imported inside the commands, so that this file costs the help nothing.
"""

import functools
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape

from .papers import EXPERIMENTS, Experiment, find

app = typer.Typer(
    name="ivfast",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
console, errors = Console(highlight=False), Console(stderr=True, highlight=False)

# Systems of the command line, each with the paper it is from.
SYSTEMS = {
    "ivaae-rad": "IVAAE, radial bridge (S1)",
    "ivaae-bw": "IVAAE, blockwise bridge (S1)",
    "ivaae-svgd": "IVAAE, SVGD bridge (S1)",
    "wae-gan": "WAE-GAN, which is AAE (Tolstikhin et al. 2017; S1)",
    "wae-mmd": "WAE-MMD (Tolstikhin et al. 2017; S1)",
    "ivdcgan": "IVGAN on DCGAN: tells which block of a code was replaced (S2)",
    "ivlsgan": "IVGAN on LSGAN (S2)",
    "dcgan": "DCGAN, the non-saturating GAN (Radford et al. 2015; S2)",
    "lsgan": "LSGAN, least squares (Mao et al. 2016; S2)",
    "wgan-gp": "WGAN with gradient penalty (Gulrajani et al. 2017; S2)",
    "mrgan": "MRGAN, mode-regularised (Che et al. 2016; S2)",
    "pacdcgan": "PacDCGAN, judges samples in packs (Lin et al. 2018; S2)",
    "veegan": "VEEGAN, judges codes with images (Srivastava et al. 2017; S2)",
    "unrolled-gan": "Unrolled GAN, looks D's steps ahead (Metz et al. 2017; S2)",
    "gan": "GAN, non-saturating (Goodfellow et al. 2014; S3 Eq. 7)",
    "iwgan": "GAN, generator's loss importance-weighted by D/(1-D) (S3 Eq. 22)",
    "cgan": "class-conditional GAN; reads labels (S3, section 5.1)",
    "iwcgan": "the same, importance-weighted; reads labels (S3, section 5.1)",
    "infogan": "GAN that recovers the code of its samples (S3 Eq. 15)",
    "ada": "adversarial domain adaptation to --set target=...; reads labels (S3 Eqs. 1-5)",
    "vae": "VAE of Bernoulli pixels (Kingma & Welling 2014; S3 Eq. 17)",
    "aavae": "VAE, adversary activated: learns from its samples too (S3 Eq. 23)",
    "cvae": "class-conditional VAE; reads labels (S3, section 5.2)",
    "aacvae": "the same, adversary activated; reads labels (S3, section 5.2)",
    "svae": "semi-supervised VAE, M2; reads a --label-share (Kingma et al. 2014; S3)",
    "aasvae": "the same, adversary activated; reads a --label-share (S3, section 5.2)",
    "avb": "VAE of a black-box posterior, whose KL T learns (S4 Alg. 1)",
    "introvae": "IntroVAE: E judges by a KL with a margin (Huang et al. 2018; S5)",
    "s-introvae": "Soft-IntroVAE: by exponential ELBOs (Daniel & Tamar 2021; S5)",
    "as-introvae": "AS-IntroVAE: at first by an AS-Distance, --as-kernel (S5 Eq. 9)",
}
DATA = {
    "digits": "scikit-learn's handwritten digits, 8x8, embedded",
    "mnist, fashion-mnist": "below --root, as torchvision lays them out",
    "cifar10, svhn, celeba": "likewise",
    "stl10, stl10-all": "likewise; the second with the unlabelled images",
    "lsun:CATEGORY": "lsun:church_outdoor, ...; needs the package lmdb",
    "folder": "your own images: every image file below --root",
    "stacked-digits": "three digits as colours, 1,000 modes (S2)",
    "stacked-mnist": "three MNIST digits likewise",
    "ring, grid, 8-gaussians": "points in the plane: mixtures of 8, 25 and 8 Gaussians",
    "spirals, checkerboard": "points in the plane without separate modes",
    "four-points": "the four unit vectors of four dimensions (S4)",
}
METRICS = {
    "fld": "Fréchet distance of the codes to the prior (S1)",
    "reconstruction": "mean squared error, PSNR and SSIM on test images",
    "classifier-distance": "Fréchet distance in a classifier's features; not FID",
    "classifier-score": "the Inception score's formula, by that classifier",
    "bound": "variational lower bound on test images, nats (S3); avb's own estimate (S4)",
    "likelihood": "of test images, by importance-weighted codes, nats",
    "kl-to-prior": "KL of the aggregated posterior to the prior, nats (S4)",
    "accuracy": "of a system's own classifier on test images (S3)",
    "conditional-accuracy": "samples that a classifier takes for their class (S3)",
    "fid": "Inception FID; needs pytorch-fid's weights",
    "probe": "error of a perceptron on the frozen codes, learning labels (S1)",
    "modes": "modes covered of stacked digits or Gaussians, KL to uniform (S2)",
    "histogram": "KL and JSD of points in the plane, as published and in nats (S5)",
}
_DATA, _LENGTH, _MODEL, _MACHINE, _RUN = "Data", "Length", "Model", "Machine", "Run"
PAPERS = (
    "S1: Intervention Adversarial Auto-Encoder. S2: Intervention GAN. S3: On Unifying Deep Generative Models. "
    "S4: Adversarial Variational Bayes. S5: AS-IntroVAE."
)


def option(*names: str, panel: str | None = None, **keywords):
    """An option without "[default: None]"; what happens without it stands in its help."""
    return typer.Option(*names, show_default=False, rich_help_panel=panel, **keywords)


Run = Annotated[Path, typer.Argument(help="Folder of a run, as [b]ivfast train[/b] wrote it.", show_default=False)]
Debug = Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")]
Device = Annotated[str | None, option(metavar="NAME", help="cpu, cuda or cuda:N; default: a GPU, else the CPU.")]
Root = Annotated[Path | None, option(metavar="DIR", help="Folder that holds the data set; default: the run's.")]
Download = Annotated[bool, typer.Option("--download", help="Fetch what is missing; without it, nothing is fetched.")]


def _listed(entries: dict[str, str]) -> str:
    wide = max(map(len, entries))
    return "\n".join(f"  [cyan]{name:{wide}}[/cyan]  {about}" for name, about in entries.items())


def friendly(command: Callable) -> Callable:
    """Errors in one line and exit code 2, Ctrl-C in one line and 130 (SIGTERM: 143); under --debug with a traceback."""

    @functools.wraps(command)
    def wrapped(*args, debug: bool = False, **options):
        try:
            return command(*args, debug=debug, **options)
        except KeyboardInterrupt as stop:
            errors.print(f"\n[yellow]stopped[/yellow] {escape(str(stop).removeprefix('stopped '))}".rstrip())
            raise typer.Exit(128 + getattr(stop, "signal", signal.SIGINT)) from None
        except (TypeError, ValueError, OSError, ArithmeticError, RuntimeError) as error:
            if debug or isinstance(error, typer.Exit):  # Exit is a RuntimeError
                raise
            text = str(error) or type(error).__name__
            if type(error).__name__ == "OutOfMemoryError":
                text = f"the GPU's memory does not suffice: take a smaller --batch-size ({text.splitlines()[0]})"
            errors.print(f"[bold red]error:[/bold red] {escape(text)}", soft_wrap=True)
            raise typer.Exit(2) from None

    return wrapped


@app.callback()
def ivfast() -> None:
    """Train the generative models of the intervention / adversarial auto-encoder family, on fast kernels.

    \b[green]ivfast train[/green]  is the shortest way in: IVAAE on handwritten digits, on a CPU
    [green]ivfast train --help[/green]  lists the systems and the data sets
    """


TRAIN_HELP = f"""
Train a system of the papers, with the paper's settings for the data set.

\bA run is a new folder [b]runs/SYSTEM-DATA-N[/b] with config.json, log.jsonl,
tensorboard/, pictures/ and checkpoints/. Ctrl-C and SIGTERM finish the step,
save, and say how to go on; a run that was killed goes on from its checkpoint.

\b[bold]Systems[/bold]
{_listed(SYSTEMS)}
{PAPERS}

\b[bold]Data sets[/bold]
{_listed(DATA)}

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
    from . import data as datasets
    from . import models, report, runs
    from .train import ranks as processes
    from .train.loop import fit

    given = {**{name: value for name, value in given.items() if value is not None}, **runs.assignments(set_ or [])}
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


@app.command()
@friendly
def sample(
    run: Run,
    n: Annotated[int, typer.Option("-n", "--number", min=1, metavar="N", help="How many samples.")] = 64,
    out: Annotated[
        Path | None,
        option(metavar="PATH", help="One grid if it ends in .png, else a folder of files; default: RUN/samples.png."),
    ] = None,
    columns: Annotated[int | None, option(min=1, metavar="N", help="Samples per row of the grid.")] = None,
    seed: Annotated[int, typer.Option(metavar="S", help="The same seed draws the same samples.")] = 0,
    device: Device = None,
    debug: Debug = False,
) -> None:
    """Draw samples from a trained system.

    \b[bold]Examples[/bold]
      [green]ivfast sample runs/ivaae-rad-digits-1 -n 64 --out grid.png[/green]
      [green]ivfast sample runs/ivaae-rad-digits-1 -n 5000 --out samples/[/green]
    """
    from . import metrics, pictures, runs

    system, settings = runs.trained(run, device)
    if not hasattr(system, "sample"):
        raise ValueError(f"{settings.system} generates no images")
    images = metrics.generate(system, n, seed)
    out = out or run / "samples.png"
    points = images.dim() == 2
    if points and out.suffix.lower() != ".png":
        raise ValueError(f"points are drawn into one picture: --out must end in .png, got {out}")
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
{_listed(METRICS)}

\b[bold]Examples[/bold]
  [green]ivfast evaluate runs/ivaae-rad-digits-1[/green]
  [green]ivfast evaluate runs/ivaae-rad-mnist-1 --metrics fld,fid --samples 20000[/green]
"""


@app.command(help=EVALUATE_HELP)
@friendly
def evaluate(
    run: Run,
    metrics: Annotated[
        str | None, option(metavar="A,B,...", help="Of the above; default: all that apply, except fid and probe.")
    ] = None,
    samples: Annotated[int, typer.Option(min=2, metavar="N", help="Samples drawn; S1 takes 20000 for FID.")] = 10_000,
    seed: Annotated[int, typer.Option(metavar="S", help="Seed of the samples.")] = 0,
    root: Root = None,
    device: Device = None,
    inception_weights: Annotated[
        Path | None, option(metavar="FILE", help="pytorch-fid's pt_inception-2015-12-05-6726825d.pth, for fid.")
    ] = None,
    download: Download = False,
    debug: Debug = False,
) -> None:
    from . import data as datasets
    from . import report, runs

    names = [name.strip() for name in metrics.split(",") if name.strip()] if metrics else None
    for name in names or []:
        if name not in report.METRICS:
            raise runs.unknown("metric", name, report.METRICS)
    system, settings = runs.trained(run, device)
    dataset = datasets.load(settings.data, root or settings.root, settings.image_size, download=download)
    evaluation = report.Evaluation(
        system, dataset, n=samples, seed=seed, inception_weights=inception_weights, download=download
    )
    values = []
    for name in names or evaluation.default():
        with console.status(f"{name} ..."):
            values += evaluation.run(name)
    record = {value.name: value.value for value in values} | {"samples": samples, "seed": seed}
    (run / "metrics.json").write_text(json.dumps(record, indent=2) + "\n")
    console.print(report.values_table(f"{settings.system} on {settings.data}, {run}", values))


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
    list_: Annotated[bool, typer.Option("--list", help="The experiments with their sizes, and nothing else.")] = False,
) -> None:
    """Repeat an experiment of the papers: their numbers beside ours, and their figure.

    \b[bold]Examples[/bold]
      [green]ivfast paper s2-example1[/green]
      [green]ivfast paper s1-fig2 --seeds 0,1,2 --out fig2[/green]
      [green]ivfast paper s2-stacked --full --root ~/data --device cuda[/green]
      [green]ivfast paper s1-tables --help[/green]
    """
    if list_:
        for experiment in EXPERIMENTS.values():
            console.print(
                f"[bold cyan]{experiment.name}[/bold cyan]  {experiment.source}\n  {experiment.about}\n"
                f"  [dim]{experiment.small}; --full: {experiment.full}[/dim]",
                soft_wrap=True,
            )
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
        raise ValueError(f"--seeds takes a number or a list like 0,1,2, got {text!r}") from None
    return list(range(numbers[0])) if "," not in text and numbers else numbers


def _paper_command(experiment: Experiment) -> None:
    about = f"""
{experiment.source}. {experiment.about}

\b[bold]Size[/bold]    {experiment.small}
[bold]--full[/bold]  {experiment.full}

A finished run is kept in [b]rows.jsonl[/b] of the folder and not run again, so after Ctrl-C the same
command goes on. The report is [b]report.md[/b], its numbers [b]report.json[/b].
"""

    @paper.command(experiment.name, help=about, short_help=f"{experiment.source}. {experiment.about}")
    @friendly
    def command(
        full: Annotated[
            bool, option("--full", help="The paper's size and data; where those are missing, says so and runs small.")
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
                help=f"How many, or which; default: {experiment.seeds}, with --full {experiment.full_seeds}.",
            ),
        ] = None,
        steps: Annotated[
            int | None, option(min=1, metavar="N", help="Steps of every training, in place of the experiment's.")
        ] = None,
        samples: Annotated[
            int | None, option(min=2, metavar="N", help="Samples behind each value, in place of the experiment's.")
        ] = None,
        device: Device = None,
        workers: Annotated[
            int | None, option(min=1, metavar="N", help="Runs side by side; default: one per core, one on a GPU.")
        ] = None,
        out: Annotated[
            Path | None, option(metavar="DIR", help=f"Folder of the report; default: papers/{experiment.name}.")
        ] = None,
        debug: Debug = False,
    ) -> None:
        from .papers import report

        report.run(
            experiment.name, console=console, seeds=_seeds(seeds), full=full, data=data, root=root, device=device,
            out=out, steps=steps, samples=samples, workers=workers, download=download,
        )  # fmt: skip


for _experiment in EXPERIMENTS.values():
    _paper_command(_experiment)


BENCH_HELP = """
Measure the ops against the best other ways to compute them, on this machine.

\b[bold]Ops[/bold]
  as_distance, as_distance_additive, bridge, bridge_blockwise, frechet, frechet_fld,
  frechet_samples, gaussian, gaussian_statistics, linear_multi_js, median, mmd, multi_js, svgd,
  svgd_bridge

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
    from .bench import command

    given = {"ops": ops, "shapes": shapes, "providers": providers, "quick": quick, "device": device, "out": out}
    right = command.bench(console, **given, threads=threads, minutes=minutes, memory=memory, resume=resume)
    if not right:
        errors.print("[bold red]error:[/bold red] ivfast computed something wrong: see the table")
        raise typer.Exit(1)


@app.command()
@friendly
def info(debug: Debug = False) -> None:
    """Versions, and which implementation serves each operator on this machine and why the others do not."""
    from .__main__ import main as report

    report(console)


def main() -> None:
    """Entry point of `ivfast`."""
    app()
