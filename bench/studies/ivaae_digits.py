"""S1's claim on the embedded digits: FLD and classifier-feature distance of the five systems.

python bench/studies/ivaae_digits.py           # all runs: 5 systems, 3 seeds, d = 8, 16, 32, both encoder objectives;
                                               # at d = 16 also the preset of `ivfast train SYSTEM`
python bench/studies/ivaae_digits.py --table   # only the table of the finished runs

The grid uses the weights, learning rates and Adam settings of the paper (`S1`). Each finished run adds a row to
bench/results/ivaae_digits.jsonl and is not run again. The table is written to bench/results/ivaae_digits.md.
"""

import argparse
import itertools
import json
import multiprocessing
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch
from rich.progress import track

RESULTS = Path(__file__).parents[1] / "results" / "ivaae_digits.jsonl"
SYSTEMS = ("wae-mmd", "wae-gan", "ivaae-bw", "ivaae-rad", "ivaae-svgd")
DIMENSIONS = (8, 16, 32)
SEEDS = (0, 1, 2)
S1 = {"lam": 1.0, "betas": (0.9, 0.999), "ema": 0.0, "epochs": 250, "milestones": {150: 0.5, 200: 0.2}}
PRESET = "preset"  # in place of an encoder objective


def jobs() -> list[tuple[str, str, int, int]]:
    """(system, encoder objective, d, seed); only the intervention systems have a choice of objective."""
    forms = [(s, e) for s in SYSTEMS for e in (("ascent", "confusion") if s.startswith("ivaae") else ("-",))]
    grid = [(s, e, d, seed) for seed, d, (s, e) in itertools.product(SEEDS, DIMENSIONS, forms)]
    return grid + [(s, PRESET, 16, seed) for seed, s in itertools.product(SEEDS, SYSTEMS)]


def run(job: tuple[str, str, int, int]) -> dict:
    from ivfast import models
    from ivfast.data import load
    from ivfast.papers.s1 import distance_of, quality
    from ivfast.train.loop import NonFiniteLoss, NonFiniteWeights, fit

    torch.set_num_threads(1)
    system_name, encoder_loss, d, seed = job
    digits = load("digits")
    settings = models.preset(system_name, "digits")
    settings = replace(settings, latent_dim=d, seed=seed, device="cpu", tensorboard=False, save_every=10**6)
    if encoder_loss != PRESET:
        settings = replace(settings, **S1)
    if encoder_loss in ("ascent", "confusion"):
        settings = replace(settings, encoder_loss=encoder_loss)
    system = models.build(settings, tuple(digits.train.shape[1:]))
    row = {"system": system_name, "encoder_loss": encoder_loss, "d": d, "seed": seed, "epochs": settings.epochs}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        try:
            fit(system, digits.train, settings, out, progress=False)
        except (NonFiniteLoss, NonFiniteWeights) as error:
            return {**row, "diverged": str(error)}
    row["seconds"] = round(time.perf_counter() - start, 1)
    values = quality(system, digits, 5000, distance_of(digits, "classifier", real=digits.test), seed)
    return {**row, "fld": values["fld"], "fcd": values["distance"], "psnr": values["psnr"]}


def yardstick() -> float:
    """Classifier-feature distance of training to test images: what a perfect generator would score."""
    from ivfast.data import load
    from ivfast.papers.s1 import distance_of

    digits = load("digits")
    return distance_of(digits, "classifier", real=digits.test)(digits.train)


def rows() -> list[dict]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def table(real: float) -> str:
    groups = defaultdict(list)
    for row in rows():
        groups[row["system"], row["encoder_loss"], row["d"]].append(row)

    def cell(key, name):
        values = [row[name] for row in groups.get(key, ()) if name in row]
        lost = sum("diverged" in row for row in groups.get(key, ()))
        if not values:
            return "diverged" if lost else "–"
        low, middle, high = min(values), statistics.median(values), max(values)
        return f"{middle:.3g} ({low:.3g}–{high:.3g})" + (f", {lost} diverged" if lost else "")

    seconds = [row["seconds"] for row in rows() if "seconds" in row]
    lines = [
        f"Digits 8×8, {len(SEEDS)} seeds: median (lowest–highest). The settings are S1's (IVAAE; weight λ of the",
        "reconstruction 1, Adam's β₁ .9, 250 epochs) or the preset of `ivfast train`; values are those of the last",
        "weights. FLD: Fréchet distance of the 1,497 training codes of size d to the prior. FCD: Fréchet distance of",
        "5,000 samples to the 300 test images in features of a digit classifier (real training images score "
        f"{real:.3g}).",
        f"torch {torch.__version__}, one CPU thread per run: {statistics.median(seconds):.0f} s." if seconds else "",
        "Command: `python bench/studies/ivaae_digits.py`.",
        "",
        "| system | encoder | " + " | ".join(f"FLD d={d}" for d in DIMENSIONS) + " | "
        + " | ".join(f"FCD d={d}" for d in DIMENSIONS) + " |",
        "|---|---|" + "---|" * (2 * len(DIMENSIONS)),
    ]  # fmt: skip
    for system, loss in dict.fromkeys((s, e) for s, e, _, _ in jobs()):
        cells = [cell((system, loss, d), name) for name in ("fld", "fcd") for d in DIMENSIONS]
        lines.append(f"| {system} | {loss} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="write the table of the finished runs and run nothing")
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    options = parser.parse_args()
    real = yardstick()  # also trains and stores the classifier, once
    if not options.table:
        done = {(r["system"], r["encoder_loss"], r["d"], r["seed"]) for r in rows()}
        todo = [job for job in jobs() if job not in done]
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        with multiprocessing.get_context("spawn").Pool(options.workers) as pool, RESULTS.open("a") as file:
            for row in track(pool.imap_unordered(run, todo), "training", total=len(todo)):
                file.write(json.dumps(row) + "\n")
                file.flush()
    text = table(real)
    RESULTS.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
