"""Rows on disk: <machine>.json, written after every group, and the ratios that the tables show."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

Row = dict[str, object]
KEY = ("op", "size", "dtype", "pass")


def key(row: Row) -> tuple:
    return row["op"], tuple(row["size"]), row["dtype"], row["pass"]


def groups(rows: Iterable[Row]) -> dict[tuple, list[Row]]:
    """Rows by op, size, dtype and pass, in the order in which people read them."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return dict(sorted(found.items(), key=lambda item: (item[0][0], len(item[0][1]), *item[0][1:])))


def with_ratios(rows: list[Row]) -> list[Row]:
    """Each timed row of one group with its time over ivfast's and over the best peer's."""
    times = {row["provider"]: row["us"] for row in rows if row.get("us")}
    peers = [row["us"] for row in rows if row.get("us") and row["kind"] == "peer"]
    ours, best = times.get("ivfast"), min(peers, default=None)
    ratios = (
        {
            "over_ivfast": row["us"] / ours if ours and row.get("us") else None,
            "over_best_peer": row["us"] / best if best and row.get("us") else None,
        }
        for row in rows
    )
    return [row | ratio for row, ratio in zip(rows, ratios, strict=True)]


def best_peer(rows: list[Row]) -> Row | None:
    timed = [row for row in rows if row.get("us") and row["kind"] == "peer"]
    return min(timed, key=lambda row: row["us"], default=None)


class Results:
    """The rows of a machine. A group that is measured again replaces its rows; each row names its session."""

    def __init__(self, machine: Row, session: Row, path: Path | None = None):
        self.machine, self.path = machine, path
        self.sessions, self.rows, self.extra = [], [], {}
        if path and path.exists():
            earlier = json.loads(path.read_text())
            self.sessions, self.rows = earlier.pop("sessions"), earlier.pop("rows")
            self.extra = {name: value for name, value in earlier.items() if name != "machine"}
        self.session = session
        self.session["id"] = max((s["id"] for s in self.sessions), default=-1) + 1
        self.sessions.append(session)

    def add(self, rows: list[Row]) -> None:
        if not rows:
            return
        kept = [row for row in self.rows if key(row) != key(rows[0])]
        self.rows = kept + [row | {"session": self.session["id"]} for row in with_ratios(rows)]
        self.write()

    def has(self, wanted: tuple, versions: dict) -> bool:
        """Whether a group was measured, with these versions."""
        return any(key(row) == wanted for row in self.alike(versions))

    def alike(self, versions: dict) -> list[Row]:
        """The rows measured with these versions, and not roughly."""
        sessions = {s["id"] for s in self.sessions if s["versions"] == versions and not s.get("quick")}
        return [row for row in self.rows if row["session"] in sessions]

    def report(self) -> dict[str, object]:
        used = {row["session"] for row in self.rows} | {self.session["id"]}
        rows = [row for rows in groups(self.rows).values() for row in rows]
        sessions = [s for s in self.sessions if s["id"] in used]
        return {"machine": self.machine, **self.extra, "sessions": sessions, "rows": rows}

    def write(self) -> None:
        """In one step: who stops it at any moment finds the file before or after."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".json.new")
        new.write_text(json.dumps(self.report(), indent=1) + "\n")
        os.replace(new, self.path)
