"""S1, "Intervention Adversarial Auto-Encoder": the discriminator alone (Fig. 2), Tables 1 and 2, the probe (Fig. 5)."""

import dataclasses
import math
import tempfile
from collections.abc import Callable

import torch
from torch import Tensor

from .. import metrics
from ..data import Dataset
from ..metrics.classifier import classifier_of
from ..metrics.inception import WeightsNotFound, inception
from ..metrics.probe import last_hidden_layer, probe
from ..runs.evaluation import REFERENCE
from ..train.loop import fit
from ..train.phase import System
from . import draw
from .session import Findings, Job, Session, Spread, Table, dataset_of, spread, trained

NAMES = {"wae-mmd": "WAE-MMD", "wae-gan": "WAE-GAN (AAE)", "ivaae-bw": "IVAAE bw", "ivaae-rad": "IVAAE rad",
         "ivaae-svgd": "IVAAE svgd"}  # fmt: skip
# FID and FLD on MNIST, CelebA and CIFAR-10, Tables 1 and 2
TABLE1 = {
    "wae-mmd": (67, 36, 87),
    "wae-gan": (53, 33, 109),
    "ivaae-bw": (49, 34, 117),
    "ivaae-rad": (50, 33, 80),
    "ivaae-svgd": (49, None, None),
}
TABLE2 = {
    "wae-mmd": (0.05, 0.34, 10.9),
    "wae-gan": (5.5, 1.5, 15.1),
    "ivaae-bw": (0.2, 0.22, 4.0),
    "ivaae-rad": (0.07, 0.18, 11.8),
    "ivaae-svgd": (5.7, None, None),
}
Distance = Callable[[Tensor], float]
SHORTER = {"epochs": 100, "milestones": {60: 0.5, 80: 0.2}, "evaluate_every": 20}  # the preset's 250, scaled


def figure2(session: Session) -> Findings:
    """Train, freeze E and G, and continue to train D: its cross-entropy next to log C, the value of an ignorant D."""
    systems, dimensions = ("wae-gan", "ivaae-bw"), (16, 32, 64)
    session.load("wae-gan")
    alone = session.length(5000 if session.full else 2000)
    jobs = [
        Job(session.settings(name, seed, latent_dim=d, epochs=50, ema=0.0, log_every=10), {"alone": alone})
        for name in systems for d in dimensions for seed in session.seeds
    ]  # fmt: skip
    found = session.values(alone_after_training, jobs)
    rows, path = [], session.out / "fig2.png"
    with draw.panels(path, 2, f"S1 Fig. 2 on {session.data}: D alone after 50 epochs, E and G frozen") as axes:
        for panel, name in zip(axes, systems, strict=True):
            chance = math.log(2 if name == "wae-gan" else 5)
            for d in dimensions:
                mine = [row for row in found if (row.job.settings.system, row.job.settings.latent_dim) == (name, d)]
                whole = [row.values for row in mine if "loss" in row.values]
                if whole:
                    draw.curve(panel, whole[0]["steps"], [values["loss"] for values in whole], f"d = {d}")
                start, end = spread(mine, "start"), spread(mine, "end")
                rows.append((NAMES[name], d, "towards 0" if name == "wae-gan" else "much more moderate", start, end,
                             Spread(tuple(value / chance for value in end.values), end.diverged)))  # fmt: skip
            panel.axhline(chance, color="0.4", linestyle="--", linewidth=1, label=f"log {2 if chance < 1 else 5}")
            style = "loss of D" if panel is axes[0] else ""
            draw.style(panel, NAMES[name], "steps of D alone", style)
            panel.set_ylim(0, 1.05 * chance)
            panel.legend(fontsize=8)
    table = Table("Cross-entropy of D per point", ("system", "d", "S1's curve", "first tenth", "last tenth",
                  "last / log C"), rows)  # fmt: skip
    note = (
        "S1 prints no numbers for its curves. With C classes, a D that knows nothing has a loss of log C: .693, 1.609."
    )
    return Findings([table], {"S1 Fig. 2": path}, [note])


def alone_after_training(job: Job) -> dict[str, object]:
    dataset = dataset_of(job.settings)
    system, _ = trained(job.settings, dataset)
    losses = discriminator_alone(system, dataset, job.extra["alone"])
    tenth = max(1, len(losses) // 10)
    steps, loss = draw.thin(losses)
    every = job.settings.log_every
    return {
        "steps": [every * step for step in steps], "loss": loss,
        "start": sum(losses[:tenth]) / tenth, "end": sum(losses[-tenth:]) / tenth,
    }  # fmt: skip


def discriminator_alone(system: System, dataset: Dataset, steps: int) -> list[float]:
    """D's cross-entropy per point over each `log_every` steps, with everything else frozen."""
    system.phases = [phase for phase in system.phases if phase.name == "discriminator"]
    settings = dataclasses.replace(system.settings, steps=steps, milestones={}, evaluate_every=10**6)
    system.settings = settings
    system.train()
    with tempfile.TemporaryDirectory() as out:
        history = fit(system, dataset.train.to(settings.device), settings, out, progress=False)
    # AAE's two terms are means over the same number of points; IVAAE's has the factor μ₁
    scale = 0.5 if settings.system == "wae-gan" else 1 / system.mu1
    return [scale * sum(line["losses"].values()) for line in history if line["kind"] == "losses"]


def quality(system: System, dataset: Dataset, samples: int, distance: Distance, seed: int = 0) -> dict:
    """FLD of the training codes, distance of samples to real images, PSNR of test images."""
    fake = metrics.generate(system, samples, seed)
    return {
        "fld": metrics.latent_frechet_distance(metrics.codes(system, dataset.train[:60_000])),
        "distance": distance(fake),
        "psnr": metrics.reconstruction(system, dataset.test).psnr,
    }


def distance_of(dataset: Dataset, kind: str, device: str = "cpu", real: Tensor | None = None) -> Distance:
    """uint8 images -> their Fréchet distance to the training images, or to `real`, "fid" or in "classifier" features.

    Network and reference are computed once: make it before the looks of a run. It never falls back to the other kind.
    """
    if kind == "fid":
        features = metrics.InceptionFeatures().to(device)
    else:
        features = metrics.ClassifierFeatures(classifier_of(dataset, device=device))
    return metrics.ReferenceDistance(features, dataset.train[:REFERENCE] if real is None else real, device)


def choose_distance(session: Session) -> str:
    """ "fid" at the paper's size if Inception's weights are available, otherwise "classifier", with a note."""
    if not session.full:
        return "classifier"
    try:
        inception(download=session.download)
    except WeightsNotFound as error:
        session.say(f"No FID: {error}")
        return "classifier"
    return "fid"


def called(kind: str) -> str:
    return "FID" if kind == "fid" else "classifier distance, not FID"


def tables(session: Session) -> Findings:
    """As in S1: evaluate during training and report the evaluation with the lowest distance, with its FLD."""
    dataset = session.load("wae-gan")
    kind = choose_distance(session)
    real = distance_of(dataset, kind, session.device)(dataset.test)  # trains the classifier, once
    changes = {"evaluate_every": 10} if session.full else SHORTER
    extra = {"distance": kind, "samples": session.count(20_000 if session.full else 5000)}
    jobs = [Job(session.settings(name, seed, **changes), extra) for name in NAMES for seed in session.seeds]
    found = session.values(best_look, jobs)
    by_name = {name: [row for row in found if row.job.settings.system == name] for name in NAMES}
    here = f"ours, {session.data}"
    first = Table(
        f"Table 1, samples: S1 reports FID, ours is {called(kind)} (test images: {real:.3g})",
        ("system", "S1 MNIST", "S1 CelebA", "S1 CIFAR10", here),
        [(NAMES[name], *TABLE1[name], spread(rows, "distance")) for name, rows in by_name.items()],
    )
    second = Table(
        "Table 2: FLD of the codes at the same evaluation",
        ("system", "S1 MNIST", "S1 CelebA", "S1 CIFAR10", here, "PSNR, dB"),
        [(NAMES[name], *TABLE2[name], spread(rows, "fld"), spread(rows, "psnr")) for name, rows in by_name.items()],
    )
    return Findings([first, second], _table_figures(session, by_name, kind), [
        "S1 prints no spread. bench/results/ivaae_digits.md covers the last weights, three latent sizes and both "
        "encoder objectives; docs/ivaae_on_digits.md discusses why S1's order does not carry over to digits.",
    ])  # fmt: skip


def best_look(job: Job) -> dict[str, object]:
    dataset, looks = dataset_of(job.settings), []
    distance = distance_of(dataset, job.extra["distance"], job.settings.device)

    def evaluate(system):
        values = quality(system, dataset, job.extra["samples"], distance, job.settings.seed)
        sigma = torch.cov(metrics.codes(system, dataset.train[:60_000]).double().T)
        looks.append((values, [[round(float(v), 3) for v in row] for row in sigma.abs()]))
        return values

    _, history = trained(job.settings, dataset, evaluate)
    epochs = [line["epoch"] for line in history if line["kind"] == "metrics"]
    best = min(range(len(looks)), key=lambda i: looks[i][0]["distance"])
    curve = {f"{name}_curve": [values[name] for values, _ in looks] for name in ("distance", "fld")}
    return {**looks[best][0], "epoch": epochs[best], "epochs": epochs, **curve, "covariance": looks[best][1]}


def _table_figures(session: Session, by_name: dict, kind: str) -> dict:
    curves, heat = session.out / "fig4.png", session.out / "fig6.png"
    with draw.panels(curves, 2, f"S1 Fig. 4 on {session.data}: evaluations during training") as axes:
        for name, rows in by_name.items():
            whole = [row.values for row in rows if "epochs" in row.values]
            for panel, value in zip(axes, ("distance_curve", "fld_curve"), strict=True):
                if whole:
                    draw.curve(panel, whole[0]["epochs"], [v[value] for v in whole], NAMES[name], marker=".")
        for panel, y in zip(axes, (called(kind), "FLD of the codes"), strict=True):
            draw.style(panel, y, "epochs")
            draw.logarithmic(panel)
        axes[0].legend(fontsize=8)
    title = f"S1 Fig. 6 on {session.data}: |Σ| of the codes; 0 black, 1 white"
    with draw.panels(heat, len(by_name), title, (2.3, 2.3)) as axes:
        for panel, (name, rows) in zip(axes, by_name.items(), strict=True):
            whole = [row.values["covariance"] for row in rows if "covariance" in row.values]
            if whole:
                panel.imshow(whole[0], cmap="gray", vmin=0, vmax=1)
            panel.set_title(NAMES[name], fontsize=10)
            panel.set_xticks([])
            panel.set_yticks([])
    return {"S1 Fig. 4": curves, "S1 Fig. 6": heat}


def figure5(session: Session) -> Findings:
    """Error rate of the probe on S1's three encoders, and on pixels for comparison."""
    systems = ("wae-gan", "ivaae-rad", "ivaae-svgd")
    dataset = session.load("wae-gan")
    session.need_labels(dataset)
    extra = {"steps": session.length(10_000 if session.full else 1500)}
    changes = {} if session.full else SHORTER
    jobs = [Job(session.settings(name, seed, **changes), extra) for name in systems for seed in session.seeds]
    found = session.values(probed, jobs)
    pixels = session.values(probed_pixels, [Job(session.settings("wae-gan", session.seeds[0]), extra)])[0].values
    path, rows = session.out / "fig5.png", []
    layers = {"hidden": "on the last hidden layer", "codes": "on the codes"}
    with draw.panels(path, 2, f"S1 Fig. 5 on {session.data}: error rate of a probe of the frozen encoder") as axes:
        for panel, (layer, where) in zip(axes, layers.items(), strict=True):
            for name in systems:
                mine = [row for row in found if row.job.settings.system == name]
                errors = [[100 * e for e in row.values[layer]] for row in mine if layer in row.values]
                draw.curve(panel, pixels["steps"], errors, NAMES[name])
            draw.curve(panel, pixels["steps"], [[100 * e for e in pixels["pixels"]]], "pixels", color="0.5", ls="--")
            draw.style(panel, where, "steps of the probe", "test error, %")
            panel.legend(fontsize=8)
    for name in systems:
        mine = [row for row in found if row.job.settings.system == name]
        ends = [[100 * row.values[layer][-1] for row in mine if layer in row.values] for layer in layers]
        lost = sum("diverged" in row.values for row in mine)
        rows.append((NAMES[name], "curve",
                     *(Spread(tuple(values), lost) for values in ends)))  # fmt: skip
    rows.append(("pixels, no encoder", None, 100 * pixels["pixels"][-1], 100 * pixels["pixels"][-1]))
    table = Table(f"Test error of the probe after {extra['steps']:,} steps, %",
                  ("encoder of", "S1's curve", *layers.values()), rows)  # fmt: skip
    note = (
        "S1 prints no numbers and calls its curves favourable to IVAAE. It probes the encoder's last hidden layer; the "
        "last column probes the codes, whose regularity S1 discusses."
    )
    return Findings([table], {"S1 Fig. 5": path}, [note])


def probed(job: Job) -> dict[str, object]:
    dataset = dataset_of(job.settings)
    system, _ = trained(job.settings, dataset)
    hidden, device = last_hidden_layer(system.modules["encoder"]), job.settings.device

    @torch.no_grad()
    def read(network, images):
        parts = images.split(metrics.BATCH)
        return torch.cat([network(metrics.to_float(x.to(device))).flatten(1).cpu() for x in parts])

    values = {}
    for name, network in (("hidden", hidden), ("codes", system.encode)):
        features = read(network, dataset.train), read(network, dataset.test)
        if not bool(features[0].isfinite().all()):
            return {"diverged": "the encoder's features are not finite"}
        values[name] = _probe(features, dataset, job).errors
    return values


def probed_pixels(job: Job) -> dict[str, object]:
    dataset = dataset_of(job.settings)
    features = [metrics.to_float(x).flatten(1) for x in (dataset.train, dataset.test)]
    found = _probe(features, dataset, job)
    return {"steps": found.steps, "pixels": found.errors}


def _probe(features, dataset: Dataset, job: Job):
    train, test = features
    settings = job.settings
    return probe(train, dataset.train_labels, test, dataset.test_labels, steps=job.extra["steps"], seed=settings.seed,
                 device=settings.device)  # fmt: skip
