"""How a setting is declared: one field of a dataclass says everything that is known about it.

`setting(...)` is the field's value. Options, checks, messages and documentation are made from it. Nothing here imports
torch, so that the help of the command line stays quick.
"""

import dataclasses
import difflib
import json
import math
import numbers
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# Panels of the help, in its order.
DATA, LENGTH, OBJECTIVE, NETWORKS, OPTIMIZER, MACHINE, RUN = PANELS = (
    "Data", "Length", "Objective", "Networks", "Optimizer", "Machine", "Run"
)  # fmt: skip
WORDS = {int: "an integer", float: "a number", str: "a word", bool: "true or false", dict: "an object", tuple: "a list"}
LARGEST = 2**63 - 1  # of an integer in PyTorch
LETTERS = {int: "N", float: "X", str: "NAME", dict: "JSON", tuple: "JSON"}


@dataclass(frozen=True)
class About:
    """What `setting` was given, with the type that the annotation names."""

    name: str
    default: object = dataclasses.field(hash=False)  # may be a dict
    kind: type  # int, float, str, bool, dict or tuple
    optional: bool  # None is a value
    key: type  # of a dict
    length: int | None  # of a tuple
    help: str
    panel: str
    at_least: float | None
    above: float | None
    at_most: float | None
    below: float | None
    choices: tuple[str, ...]
    must: str | None
    none: str | None
    metavar: str
    option: str | None
    resumable: bool

    def check(self, value: object) -> None:
        """Raises ValueError for a value of another type or out of range; the message names the setting."""
        if value is None and self.optional:
            return
        if self.kind in (dict, tuple):
            if not isinstance(value, self.kind) or (self.length is not None and len(value) != self.length):
                takes = WORDS[self.kind] + (f" of {self.length} numbers" if self.length else "")
                raise ValueError(f"{self.name} must be {takes}, got {self.encode(value)!r}")
            if self.kind is dict and self.key is int:
                for key in value:
                    if not _whole(key) or key < 0:
                        raise ValueError(f"the keys of {self.name} must be integers >= 0, got {key!r}")
            for key, number in value.items() if self.kind is dict else enumerate(value):
                self._check_number(f"{self.name}[{key!r}]", number)
        elif self.choices:
            if value not in self.choices:
                raise ValueError(f"{self.name} must be one of {', '.join(map(repr, self.choices))}, got {value!r}")
        elif self.kind in (int, float):
            self._check_number(self.name, value)
        elif not isinstance(value, self.kind):
            raise ValueError(f"{self.name} must be {WORDS[self.kind]}, got {value!r}")

    def _check_number(self, name: str, value: object) -> None:
        number = _whole(value) if self.kind is int else _finite(value)
        if not (number and self._in_range(value)):
            raise ValueError(f"{name} must {self.must or f'be {self.range}'}, got {value!r:.80}")
        if self.kind is int and abs(value) > LARGEST:
            least = "-2^63 + 1" if self.at_least is None else f"{self.at_least:g}"
            raise ValueError(f"{name} must be an integer from {least} to 2^63 - 1, got {value!r:.80}")

    def _in_range(self, value: float) -> bool:
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    @property
    def range(self) -> str:
        """The values that it takes, as a phrase after "must be"."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        limits = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        limits = {name: f"{limit:g}" for name, limit in limits.items() if limit is not None}
        if self.kind is int:
            return f"an integer >= {limits['at least']}" if [*limits] == ["at least"] else "an integer"
        if limits == {"above": "0"}:
            return "finite and positive"
        if limits == {"at least": "0"}:
            return "finite and >= 0"
        return " and ".join(f"{name} {limit}" for name, limit in limits.items()) or WORDS[self.kind]

    @property
    def bounds(self) -> str:
        """The limits as the help shows them, "x>=1" or "0<x<=1"; empty where there are none."""
        low = [f"{limit:g}{sign}" for sign, limit in (("<=", self.at_least), ("<", self.above)) if limit is not None]
        high = [f"{sign}{limit:g}" for sign, limit in (("<=", self.at_most), ("<", self.below)) if limit is not None]
        if low and not high:
            return f"x>={self.at_least:g}" if self.above is None else f"x>{self.above:g}"
        return f"{''.join(low)}x{''.join(high)}" if high else ""

    @property
    def example(self) -> str:
        """A value in JSON."""
        value = self.encode(self.default)
        return json.dumps({int: 1, float: 1.0, bool: True}.get(self.kind) if value is None else value)

    @property
    def flag(self) -> str:
        """The option's name on the command line."""
        return f"--{self.option or self.name.replace('_', '-')}"

    def parse(self, text: str) -> object:
        """The value that an option's text means.

        Raises:
            ValueError: another type's text, or a value out of range.
        """
        try:
            value = json.loads(text) if self.kind in (dict, tuple) else self.kind(text)
        except (ValueError, RecursionError):
            takes = f"JSON like {self.example}" if self.kind in (dict, tuple) else WORDS[self.kind]
            raise ValueError(f"{self.flag} takes {takes}, got {text!r:.80}") from None
        value = self.decode(value)
        self.check(value)
        return value

    def encode(self, value: object) -> object:
        """The value as JSON holds it."""
        if isinstance(value, dict):
            return {str(key): entry for key, entry in value.items()}
        return list(value) if isinstance(value, tuple) else value

    def decode(self, value: object) -> object:
        """Inverse of `encode`.

        Raises:
            ValueError: keys of another type, or two that are the same.
        """
        if self.kind is dict and isinstance(value, dict):
            if self.key is int and not all(re.fullmatch("-?[0-9]{1,18}", str(key)) for key in value):
                raise ValueError(f"the keys of {self.name} must be integers >= 0, got {[*value]}")
            decoded = {self.key(key): entry for key, entry in value.items()}
            if len(decoded) < len(value):
                raise ValueError(f"the keys of {self.name} must differ, got {[*value]}")
            return decoded
        return tuple(value) if self.kind is tuple and isinstance(value, list) else value

    def plain(self, value: object) -> object:
        """The value as Python's own number, where it is another library's."""
        if isinstance(value, numbers.Integral) and not isinstance(value, bool):
            return int(value)
        return float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else value

    def shown(self, value: object) -> str:
        """A value in the help and in tables."""
        if value is None:
            return self.none or "none"
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, dict | tuple):
            return json.dumps(self.encode(value))
        return f"{value:g}" if isinstance(value, float) else str(value)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _finite(value: object) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer that no float is near
        return False


def did_you_mean(given: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """A question with the likely names among the `known` ones: but for case and hyphens, by their beginning, by their
    letters. Empty where none is near."""
    known, letters = list(known), _letters(given)
    near = [name for name in known if _letters(name) == letters]
    near = near or ([name for name in known if _letters(name).startswith(letters)] if len(letters) > 1 else [])
    near = near or difflib.get_close_matches(given, known, 1, cutoff)
    return f"did you mean {' or '.join(near[:3])}?" if near else ""


def _letters(name: str) -> str:
    return re.sub("[-_ ]", "", name.lower())


def table(entries: Mapping[About, str]) -> str:
    """Settings in Markdown, each with the systems that have it."""
    lines = ["| setting | default | values | what it is | systems |", "|---|---|---|---|---|"]
    for entry, systems in entries.items():
        values = " | ".join(entry.choices) or entry.bounds
        cells = (f"`{entry.name}`", entry.shown(entry.default), values, entry.help, systems)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def setting(
    default: object,
    *,
    help: str,
    panel: str = OBJECTIVE,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] = (),
    must: str | None = None,
    none: str | None = None,
    metavar: str | None = None,
    option: str | None = None,
    resumable: bool = False,
) -> Any:
    """A field of a `Settings`. Its annotation gives the type: int, float, str, bool, dict, tuple, or such | None.

    Args:
        default: a family's; `preset` of a system stands above it.
        help: a sentence or two for the help and the documentation.
        panel: one of `PANELS`.
        at_least, above, at_most, below: limits of a number, or of each number in a dict or tuple.
        choices: the words that a str is one of.
        must: replaces "be <range>" in the message about a value out of range.
        none: what None stands for.
        metavar: the value's name in the help.
        option: the option's name where it is not the field's; "" for none.
        resumable: a run may be resumed with another value.
    """
    about = {name: value for name, value in locals().items() if name != "default"}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata={"setting": about})
    return dataclasses.field(default=default, metadata={"setting": about})


def about(field: dataclasses.Field) -> About:
    """What a field's declaration says; TypeError for a field that was declared without `setting`."""
    if "setting" not in field.metadata:
        raise TypeError(f"{field.name} must be declared by setting(default, help=...)")
    said = dict(field.metadata["setting"])
    kinds = typing.get_args(field.type) if isinstance(field.type, types.UnionType) else (field.type,)
    (full,) = (kind for kind in kinds if kind is not type(None))
    kind = typing.get_origin(full) or full
    said["metavar"] = said["metavar"] or ("|".join(said["choices"]) or LETTERS.get(kind, ""))
    return About(
        name=field.name,
        default=field.default if field.default is not dataclasses.MISSING else field.default_factory(),
        kind=kind,
        optional=type(None) in kinds,
        key=typing.get_args(full)[0] if kind is dict else str,
        length=len(typing.get_args(full)) if kind is tuple and ... not in typing.get_args(full) else None,
        **said,
    )
