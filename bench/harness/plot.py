"""Times against the first number of a size, such as the particles: a line a provider, a panel a pass."""

import math
from pathlib import Path

from .results import groups
from .tables import times

COLOURS = ("#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#7f7f7f", "#bcbd22", "#444444")
OURS = "#d62728"


def draw(report: dict, op: str, path: Path) -> Path | None:
    """The picture of an op; None where nothing was timed."""
    from matplotlib.figure import Figure

    found = {key: rows for key, rows in groups(report["rows"]).items() if key[0] == op and len(key[1]) == 2}
    found = {key: rows for key, rows in found.items() if key[2] == "float32"}
    rows = [row for rows in found.values() for row in rows if row.get("us")]
    passes = list(dict.fromkeys(row["pass"] for row in rows))
    if not rows:
        return None
    names = list(dict.fromkeys(row["provider"] for row in rows))
    colours = dict(zip((n for n in names if n != "ivfast"), COLOURS * 9, strict=False)) | {"ivfast": OURS}
    sizes = sorted({tuple(row["size"]) for row in rows}, key=math.prod)
    numbers = [size[0] for size in sizes]
    scale = dict(zip(sizes, numbers if len(set(numbers)) == len(sizes) else map(math.prod, sizes), strict=True))

    figure = Figure(figsize=(1.5 + 5.2 * len(passes), 5), layout="constrained")
    panels = figure.subplots(1, len(passes), sharey=True, squeeze=False)[0]
    for panel, what in zip(panels, passes, strict=True):
        for name in sorted(names, key=lambda n: n == "ivfast"):  # ivfast on top
            points = [(scale[tuple(r["size"])], r["us"]) for r in rows if (r["provider"], r["pass"]) == (name, what)]
            style = {"linewidth": 2.6, "markersize": 6} if name == "ivfast" else {"linewidth": 1.4, "markersize": 4}
            style["linestyle"] = "--" if name.startswith("ivfast:") else "-"
            panel.plot(*zip(*sorted(points), strict=True), marker="o", color=colours[name], label=name, **style)
        panel.set_title(what, loc="left")
        panel.set(xscale="log", yscale="log")
        panel.set_xticks(list(scale.values()), [times(size) for size in scale], rotation=60, ha="right", fontsize=8)
        panel.minorticks_off()
        panel.grid(True, which="major", color="0.9")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("median µs of a call")
    handles = {line.get_label(): line for panel in panels for line in panel.get_lines()}
    slowest = sorted(names, key=lambda name: -max(row["us"] for row in rows if row["provider"] == name))
    figure.legend([handles[name] for name in slowest], slowest, loc="outside right upper", frameon=False)
    figure.suptitle(f"{op} on {report['machine'].get('gpu') or report['machine']['name']}", x=0.01, ha="left")
    figure.savefig(path, dpi=150)
    return path
