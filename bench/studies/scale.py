"""Cost against n, d, batch and ranks: `python -m ivfast.bench.studies.scale` fills docs/scale.md and docs/scale.png.

Medians over turns on this CPU, the bytes that gloo ranks send (`communication.py`), and what follows for more devices
(`reach.py`). It runs in a clone of the repository. With fewer minutes than the default it writes only with --out.
"""

import argparse
import contextlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from rich.progress import track

import ivfast
from ivfast import distributed, runs

from ..harness import machine, page
from . import communication, reach
from .train import images_of, in_turns, run_of, settings_of, step_of

MINUTES, TURNS = 4.0, 30
NS, AT_D = (64, 256, 1024, 4096, 16384), 64
DS, AT_N = (16, 32, 64, 128, 256, 512), 1024
BATCHES, SYSTEMS = (16, 32, 64, 128, 256, 512), ("ivaae-svgd", "wae-mmd")
RANKS = (2, 4)
DIRECTION, RING = "svgd_direction, forward", "svgd_direction by the ring, forward"
DIRECTION_BACKWARD, MEDIAN = "svgd_direction, forward+backward", "median_bandwidth, forward"
MMD, MMD_BACKWARD = "mmd, forward", "mmd, forward+backward"
COLOURS = ("#d62728", "#ff9896", "#8c564b", "#0072b2", "#009e73", "#7fc8a9", "#cc79a7", "#e69f00", "#444444")
MARKERS = "oosd^^vPX"


def with_gradient(function: Callable, *tensors: torch.Tensor) -> Callable[[], object]:
    leaves = [x.clone().requires_grad_() for x in tensors]
    return lambda: torch.autograd.grad(function(*leaves).sum(), leaves)


def calls_of(n: int, d: int) -> dict[str, Callable[[], object]]:
    x, y, mu, logvar = torch.randn(n, d), torch.randn(n, d) + 1, torch.randn(n, d), torch.randn(n, d) / 4
    h = float(d)

    def direction(x):
        return ivfast.svgd_direction(x, bandwidth=h)

    return {
        DIRECTION: lambda: direction(x),
        DIRECTION_BACKWARD: with_gradient(direction, x),
        RING: lambda: distributed.svgd_direction(x, bandwidth=h, exchange="ring", even=True),
        MEDIAN: lambda: ivfast.median_bandwidth(x),
        MMD: lambda: ivfast.mmd(x, y),
        MMD_BACKWARD: with_gradient(ivfast.mmd, x, y),
        "as_distance, forward": lambda: ivfast.as_distance(x, logvar, mu, logvar),
        "multi_js_loss of d classes, forward": lambda: ivfast.multi_js_loss(x),
        "fld, forward": lambda: ivfast.fld(x),
    }


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """A group of one rank: its ring does the arithmetic of a ring and sends nothing."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def steps_of(batch: int) -> dict[str, Callable[[], None]]:
    found = {}
    for system in SYSTEMS:
        settings = replace(settings_of(system, "mnist"), batch_size=batch)
        found[system] = step_of(run_of(settings, images_of("mnist")))
    return found


def affordable(expected: dict[str, float], seconds: float) -> set[str]:
    """The calls that fit into the time together, shortest first, at three repeats each."""
    found = set()
    for name, each in sorted(expected.items(), key=lambda item: item[1]):
        seconds -= 3 * each
        if seconds >= 0:
            found.add(name)
    return found


def curves(end: float) -> tuple[list[dict], list[str]]:
    """Rows {"against", "at", "what", "us", "turns", "threads"} and what there was no time for."""
    groups = [("n", at) for at in NS] + [("d", at) for at in DS] + [("batch", at) for at in BATCHES]
    shares = [max(1.0, at / 2048) if against == "n" else 1.0 for against, at in groups]
    rows, left_out, threads = [], [], torch.get_num_threads()
    last: dict[tuple, tuple[int, float]] = {}
    for k, (against, at) in enumerate(track(groups, "curves")):
        with contextlib.nullcontext() if against == "batch" else alone():
            if against == "batch":
                calls = steps_of(at)
                runs.use_threads(None, replace(settings_of(SYSTEMS[0], "mnist"), batch_size=at))
            else:
                calls = calls_of(at, AT_D) if against == "n" else calls_of(AT_N, at)
            power = 2 if against == "n" else 1
            expected = dict.fromkeys(calls, 0.0)
            for name in calls:
                if (against, name) in last:
                    before, each = last[against, name]
                    expected[name] = each * (at / before) ** power
            seconds = max(0.0, end - time.monotonic()) * shares[k] / sum(shares[k:])
            chosen = affordable(expected, seconds)
            if len(chosen) < len(calls):
                missing = "all" if not chosen else " and ".join(name for name in calls if name not in chosen)
                left_out.append(f"{missing} at {against} = {at}")
            if not chosen:
                continue
            deadline = time.monotonic() + seconds
            samples = in_turns({name: call for name, call in calls.items() if name in chosen}, TURNS, deadline)
            for name, times in samples.items():
                last[against, name] = at, statistics.median(times)
                about = {"against": against, "at": at, "what": name, "threads": torch.get_num_threads()}
                rows.append(about | {"us": statistics.median(times) * 1e6, "turns": len(times)})
            torch.set_num_threads(threads)
    return rows, left_out


def measure(minutes: float) -> dict:
    start = time.monotonic()
    about = {"date": machine.today(), "versions": machine.versions(), "minutes": minutes}
    load = [os.getloadavg()[0]]
    exchanged = []
    for ranks in RANKS:
        (first, *_) = communication.measure(ranks, d=AT_D, steps=tuple((system, "mnist") for system in SYSTEMS))
        exchanged += first["rows"]
        if first["bytes_per_s"]:
            about["bytes_per_s"] = first["bytes_per_s"]
    rows, left_out = curves(start + 60 * minutes)
    about["load"] = [*load, os.getloadavg()[0]]
    report = {"machine": machine.describe("cpu"), "session": about | {"left_out": left_out}}
    return report | {"rows": rows, "communication": exchanged}


def curve(report: dict, against: str, what: str) -> list[tuple[int, float]]:
    """(n, d or batch; seconds)."""
    return [(r["at"], r["us"] / 1e6) for r in report["rows"] if (r["against"], r["what"]) == (against, what)]


def names_of(report: dict, against: str) -> list[str]:
    return list(dict.fromkeys(row["what"] for row in report["rows"] if row["against"] == against))


def milliseconds(seconds: float | None) -> str:
    ms = None if seconds is None else seconds * 1e3
    return "–" if ms is None else f"{ms:.3f}" if ms < 1 else f"{ms:.2f}" if ms < 100 else f"{ms:,.0f}"


def about_text(report: dict) -> str:
    session, its = report["session"], report["machine"]
    versions = session["versions"]
    load = "load average {:.1f} before, {:.1f} after".format(*session["load"])
    lines = [
        f"{its['cpu']}, {its['instructions']}, threads {its['threads']}; Python {versions['python']}, torch "
        f"{versions['torch']}. {session['date']}, {session['minutes']:g} minutes, {load}."
    ]
    if max(session["load"]) > its["threads"] + 1:
        lines.append("**The machine was busy with other work: times, and what follows from them, are rough.**")
    if session["left_out"]:
        lines.append(f"There was no time for: {'; '.join(session['left_out'])}.")
    return "\n".join(lines)


def curves_text(report: dict) -> str:
    parts = []
    for against, points, about in (
        ("n", NS, f"Median time in ms against n, at d = {AT_D}:"),
        ("d", DS, f"Median time in ms against d, at n = {AT_N}:"),
        ("batch", BATCHES, "Median time in ms of a training step with S1's MNIST settings, against the batch:"),
    ):
        rows = [["", *(f"{at}" for at in points)]]
        for name in names_of(report, against):
            found = dict(curve(report, against, name))
            rows.append([name, *(milliseconds(found.get(at)) for at in points)])
        parts += [about, page.table(rows)]
    return "\n\n".join(parts)


def communication_text(report: dict) -> str:
    rows = [
        ["call", "exchange", "pass", *(f"{of}, {ranks}" for ranks in RANKS for of in ("formula", "counted", "written"))]
    ]
    found: dict[tuple, dict[int, dict]] = {}
    for row in report["communication"]:
        found.setdefault((row["what"], row["exchange"], row["pass"]), {})[row["ranks"]] = row
    for key, by_ranks in found.items():
        numbers = (by_ranks.get(ranks, {}).get(of) for ranks in RANKS for of in ("formula", "counted", "written"))
        rows.append([*key, *("–" if number is None else f"{number:,.0f}" for number in numbers)])
    return page.table(rows, right=3)


def fits(report: dict) -> dict[str, reach.Fit]:
    found = {name: reach.fit(curve(report, "n", name), 2) for name in names_of(report, "n")}
    return found | {name: reach.fit(curve(report, "batch", name), 1) for name in names_of(report, "batch")}


def pairs_of(system: str, found: dict[str, reach.Fit]) -> float:
    """Seconds per squared batch: MMD with its gradient, or the bridge's medians and directions with theirs."""
    if system == "wae-mmd":
        return found[MMD_BACKWARD].slope
    return communication.STEPS * (found[MEDIAN].slope + found[DIRECTION_BACKWARD].slope)


def reach_text(report: dict) -> str:
    found, bandwidth = fits(report), report["session"]["bytes_per_s"]
    gradients = {row["what"]: row for row in report["communication"] if "parameters" in row}
    rows = [["time of", "a", "b", "largest error of the fit"]]
    for name in (DIRECTION, RING, MEDIAN, *SYSTEMS):
        its, unit = found[name], "µs per sample" if name in SYSTEMS else "ns per pair"
        slope = its.slope * (1e6 if name in SYSTEMS else 1e9)
        rows.append([name, f"{slope:.3g} {unit}", f"{milliseconds(its.start)} ms", f"{its.error:.0%}"])
    reached = [
        ["devices", "n by gather", "n by ring", "n in 16 GB per rank, by ring", *(f"batch of {s}" for s in SYSTEMS)],
    ]
    for ranks in reach.DEVICES:
        gather = reach.direction_seconds(found[DIRECTION], ranks, bandwidth, gather=True)
        ring = reach.direction_seconds(found[RING], ranks, bandwidth)
        cells = [reach.rounded(reach.largest(seconds, 1.0)) for seconds in (gather, ring)]
        cells.append(reach.rounded(16e9 / (reach.BLOCKS * AT_D * reach.FLOAT) * ranks))
        for system in SYSTEMS:
            parameters = gradients[f"{system}, mnist"]["parameters"]
            seconds = reach.step_seconds(found[system], pairs_of(system, found), ranks, parameters, bandwidth)
            cells.append(reach.rounded(reach.largest(seconds, 1.0)))
        reached.append([f"{ranks}", *cells])
    parameters = gradients[f"{SYSTEMS[0]}, mnist"]["parameters"]
    link = f"Between two gloo processes here, a rank sends {bandwidth / 1e9:.2f} GB/s while it receives as much; "
    link += f"the gradients of one step of {SYSTEMS[0]} are {parameters * 4 / 1e6:.0f} MB."
    within = "The largest n of a direction at a given bandwidth (d = 64) and the largest batch of a step in one second:"
    return "\n\n".join([page.table(rows), link, within, page.table(reached, right=0)])


def gpu_text() -> str:
    header = [
        "GPUs",
        "n",
        "pairs per rank",
        "flop per rank",
        "products at peak, s",
        "as written, s",
        "median before it, s",
    ]
    rows = [[*header, "memory per rank, GB", "sent per rank, GB", "links, s"]]
    for ranks, n in [
        *((r, reach.largest(lambda n, r=r: reach.on_gpus(n, r).streamed, 1.0)) for r in reach.DEVICES),
        *((r, 1e7) for r in reach.DEVICES),
    ]:
        its = reach.on_gpus(n, ranks)
        count = "10,000,000" if n == 1e7 else reach.rounded(n)
        numbers = its.peak, its.streamed, its.median, its.memory / 1e9, its.sent / 1e9, its.link
        counts = f"{its.pairs:.1e}", f"{its.flop:.1e}"
        rows.append([f"{ranks}", count, *counts, *(f"{x:.2g}" if x < 10 else f"{x:,.0f}" for x in numbers)])
    most = reach.rounded(reach.fits_in_memory())
    return page.table(rows, right=0) + f"\n\nMemory alone would hold {most} particles per GPU."


def sections(report: dict) -> dict[str, str]:
    return {
        "measured": about_text(report),
        "curves": curves_text(report),
        "communication": communication_text(report),
        "reach": reach_text(report),
        "gpu": gpu_text(),
    }


def draw(report: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 6.4), layout="constrained")
    panels = figure.subplots(1, 3)
    styles = dict(zip(names_of(report, "n"), zip(COLOURS, MARKERS, strict=True), strict=False))
    styles |= dict(zip(SYSTEMS, (("#d62728", "o"), ("#009e73", "^")), strict=True))
    for panel, against, title in zip(
        panels, ("n", "d", "batch"), (f"n, d = {AT_D}", f"d, n = {AT_N}", "batch, a training step"), strict=True
    ):
        every = []
        for name in names_of(report, against):
            x, seconds = zip(*curve(report, against, name), strict=True)
            ms = [1e3 * s for s in seconds]
            every += ms
            colour, marker = styles[name]
            line = "--" if name == RING else "-"
            panel.plot(x, ms, line, marker=marker, color=colour, label=name, linewidth=1.8, markersize=5)
        points = sorted({row["at"] for row in report["rows"] if row["against"] == against})
        panel.set(xscale="log", yscale="log")
        panel.set_xticks(points, [f"{at}" for at in points])
        panel.minorticks_off()
        top = panel.get_ylim()[1]
        for power in (1, 2):
            start, end = points[0], points[-1]
            lowest = min(every) * 0.5
            guide = [lowest * (at / start) ** power for at in (start, end)]
            panel.plot((start, end), guide, ":", color="0.5", linewidth=1.2, zorder=0)
            letter = "B" if against == "batch" else against
            text = f"∝ {letter}" + ("²" if power == 2 else "")
            panel.annotate(text, (end, guide[1]), (4, 0), textcoords="offset points", color="0.4", va="center")
        panel.set_ylim(min(every) * 0.35, max(top, guide[1]) * 1.3)
        panel.set_title(f"against {title}", loc="left")
        panel.set_xlabel(against)
        panel.grid(True, which="major", color="0.92")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("median ms")
    handles = panels[0].get_lines()[: len(names_of(report, "n"))]
    figure.legend(handles=handles, loc="outside lower left", ncols=3, frameon=False)
    panels[2].legend(handles=panels[2].get_lines()[: len(SYSTEMS)], frameon=False, loc="upper left")
    figure.suptitle(report["machine"]["name"], x=0.01, ha="left")
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="limit for everything (default: %(default)g)")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of results, page and picture")
    parser.add_argument("--redraw", type=Path, metavar="JSON", help="make page and picture from earlier results")
    options = parser.parse_args(arguments)
    template = Path("docs/scale.md")
    if not template.is_file():
        parser.error("docs/scale.md must exist: run this in a clone of the repository")
    if options.redraw:
        report = json.loads(options.redraw.read_text())
    else:
        machine.use_threads(options.threads)
        report = measure(options.minutes)
    filled = page.write(template.read_text(), sections(report))
    if not options.out and not options.redraw and options.minutes < MINUTES:
        print(filled)
        return
    documents, results = options.out or template.parent, options.out or Path("bench/results")
    documents.mkdir(parents=True, exist_ok=True)
    path = results / f"scale-{report['machine']['name']}.json"
    for file, text in ((path, json.dumps(report, indent=1) + "\n"), (documents / "scale.md", filled)):
        new = file.with_name(file.name + ".new")
        new.write_text(text)
        os.replace(new, file)
    draw(report, documents / "scale.png")
    print(f"{path}, {documents / 'scale.md'}, {documents / 'scale.png'}")


if __name__ == "__main__":
    main()
