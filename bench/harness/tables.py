"""Tables of results: one row per provider on a terminal, one column per provider in a file."""

from collections import Counter

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from .problem import label
from .results import Row, best_peer, groups


def microseconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def megabytes(value: float | None) -> str:
    return "–" if value is None else "< 1" if value < 1e6 else f"{value / 1e6:,.0f}"


def ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def share(row: Row) -> str:
    return f"{row['share']:.0%} {row['bound']}" if row.get("share") else "–"


def times(size: list[int] | tuple[int, ...]) -> str:
    return label(tuple(size)).replace("x", " × ")


def heading(key: tuple) -> str:
    _, size, dtype, what = key
    return f"{times(size)}" + (f" {dtype}" if dtype != "float32" else ""), what


def brief(key: tuple) -> str:
    size, what = heading(key)
    return f"{size} {what}".replace(" × ", "×").replace("forward", "fwd").replace("backward", "bwd")


def terminal(report: dict, op: str) -> Group:
    """Every row of an op, and the reasons for missing rows."""
    on_gpu = any("device_us" in row for row in report["rows"] if row["op"] == op)
    table = Table(title=op, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in ("µs", *(["µs on device"] if on_gpu else []), "/ ivfast", "/ best peer", "of limit", "MB"):
        table.add_column(name, justify="right", no_wrap=True)
    left_out = []
    for key, rows in groups(row for row in report["rows"] if row["op"] == op).items():
        best = best_peer(rows)
        table.add_row(f"[bold]{brief(key)}[/bold]")
        for row in rows:
            style = "bold" if row["kind"] == "ivfast" else "green" if row is best else None
            name = "  " + escape(row["provider"]) + (f" ({row['served']})" if "served" in row else "")
            if not row.get("us"):
                colour = "red" if row.get("wrong") else "dim"
                text = f"{brief(key)}  {row['provider']}: {row['reason']}"
                left_out.append(f"[{colour}]{escape(text)}[/{colour}]")
                continue
            device = [microseconds(row.get("device_us"))] if on_gpu else []
            ratios = ratio(row["over_ivfast"]), ratio(row["over_best_peer"])
            table.add_row(name, microseconds(row["us"]), *device, *ratios, share(row),
                          megabytes(row.get("peak_bytes")), style=style)  # fmt: skip
        table.add_section()
    notes = [f"[dim]missing: {escape(name)}: {escape(reason)}[/dim]" for name, reason in missing(report, op)]
    return Group(table, *left_out, *notes, "")


def missing(report: dict, op: str) -> list[tuple[str, str]]:
    last = [s for s in report["sessions"] if op in s["ops"]][-1:]
    return [(row["provider"], row["reason"]) for s in last for row in s["missing"] if row["op"] == op]


def markdown(report: dict) -> str:
    machine = ", ".join(f"{k} {v}" for k, v in report["machine"].items() if k != "name")
    lines = [f"# {report['machine']['name']}", "", machine, "", *_checked(report)]
    for s in report["sessions"]:
        versions = ", ".join(f"{k} {v}" for k, v in s["versions"].items())
        limit = s["limits"]
        lines += [
            f"Session {s['id']}, {s['date']}{', rough' if s.get('quick') else ''}: {versions}. "
            f"Limits: fp32 matrix product {limit['matmul_flop_per_s'] / 1e9:,.0f} GFLOP/s, "
            f"copy {limit['copy_bytes_per_s'] / 1e9:,.1f} GB/s (reads plus writes), "
            f"empty call {limit['empty_forward_s'] * 1e6:.1f} µs, "
            f"with backward {limit['empty_forward+backward_s'] * 1e6:.1f} µs"
            + (f", empty launch {limit['empty_launch_s'] * 1e6:.1f} µs" if "empty_launch_s" in limit else "")
            + "."
            + (f" Not started for lack of time: {'; '.join(s['not_started'])}." if s["not_started"] else ""),
            "",
        ]
    lines += [
        "The tables show the median time of a call through the public functions, in µs. Providers run in turns, each",
        "checked against float64 first. Where best peer / ivfast is below 1, ivfast is slower. The limit is the",
        "longest of three times: the op's flop at the rate of a large matrix product, its traffic at the rate of a",
        "large copy, and that of a call that computes nothing.",
        "",
    ]
    for op in dict.fromkeys(row["op"] for row in report["rows"]):
        lines += [f"## {op}", "", *_wide(report, op), ""]
    return "\n".join(lines)


def _checked(report: dict) -> list[str]:
    """What gpu.py found before it took times."""
    lines = []
    if "checks" in report:
        rows = report["checks"]
        counts = Counter((row["implementation"], row["status"]) for row in rows if row["what"] == "value")
        told = "; ".join(f"{name} {count} {status}" for (name, status), count in sorted(counts.items()))
        lines += [f"Checks against the float64 reference: {told}.", ""]
        further = Counter((row["what"], row["status"]) for row in rows if row["what"] != "value")
        lines += [f"- {what}: {count} {status}" for (what, status), count in further.items()]
        lines += [f"- {row['status']}: {row['what']}, {row['case']} {row['dtype']} {row['implementation']}"
                  for row in rows if row["status"] in ("wrong", "error")]  # fmt: skip
    if "sanitizer" in report:
        told = "; ".join(f"{tool} {result['status']}" for tool, result in report["sanitizer"].items()) or "not run"
        lines += ["", f"compute-sanitizer: {told}.", ""]
    if "tiles" in report:
        lines += ["| op | size | pass | tile | µs |", "|---|---|---|---|---:|"]
        for row in report["tiles"]:
            tile = ", ".join(f"{k} {v}" for k, v in row["tile"].items()) + (" (in use)" if row["present"] else "")
            took = microseconds(row["us"]) if "us" in row else row["reason"]
            lines.append(_row(row["op"], times(row["size"]), row["pass"], tile, took))
        lines.append("")
    return lines


def _wide(report: dict, op: str) -> list[str]:
    found = groups(row for row in report["rows"] if row["op"] == op)
    timed = {row["provider"] for row in report["rows"] if row["op"] == op and row.get("us")}
    names = [n for n in dict.fromkeys(row["provider"] for rows in found.values() for row in rows) if n in timed]
    served = next((row["served"] for rows in found.values() for row in rows if "served" in row), "not timed")
    lines = [f"Default implementation of `ivfast`: {served}.", ""]
    lines += _header("size", "pass", *names, "best peer / ivfast", "ivfast of limit")
    on_device, memory, reasons = [], [], {}
    for key, rows in found.items():
        by_name = {row["provider"]: row for row in rows}
        ours, best = by_name.get("ivfast", {}), best_peer(rows)
        over = best["us"] / ours["us"] if best and ours.get("us") else None

        def cells(field, text, by_name=by_name):
            return [text(by_name.get(name, {}).get(field)) for name in names]

        lines.append(_row(*heading(key), *cells("us", microseconds), ratio(over), share(ours)))
        if any(row.get("device_us") for row in rows):
            on_device.append(_row(*heading(key), *cells("device_us", microseconds)))
        if any((row.get("peak_bytes") or 0) >= 1e6 for row in rows):
            memory.append(_row(*heading(key), *cells("peak_bytes", megabytes)))
        for row in rows:
            if row.get("reason"):
                reasons.setdefault((row["provider"], row["reason"]), []).append(" ".join(heading(key)))
    if on_device:
        lines += ["", "On the device alone, in a CUDA graph, µs:", "", *_header("size", "pass", *names), *on_device]
    if memory:
        lines += ["", "Peak memory above the level before the call, MB:", ""]
        lines += [*_header("size", "pass", *names), *memory]
    notes = [f"- {name}, {'; '.join(where)}: {reason}" for (name, reason), where in reasons.items()]
    notes += [f"- {name}: {reason}" for name, reason in missing(report, op)]
    return lines + (["", "Not measured:", "", *notes] if notes else [])


def _header(*names: str) -> list[str]:
    return [_row(*names), "|---|---|" + "---:|" * (len(names) - 2)]


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"
