"""The options of `ivfast train`, made from the declared settings of the system that its arguments name."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from ..train.declare import PANELS, About, did_you_mean
from ..train.settings import Settings, refusal
from .app import app, explain, friendly, option
from .names import SYSTEMS

HELP = ("-h", "--help")
# Their defaults are the same for every system and data set: what no preset changes.
COMMON = ("data", "root", "flip", "data_share", "data_memory", "precision", "compile", "capture", "seed", "tensorboard")


def declared(train: Callable, kind: type[Settings], defaults: Mapping[str, object]) -> Callable:
    """`train` with an option for each setting of a class in place of its `**given`, and `defaults` in their help."""

    def command(**values):
        given = {name: values.pop(name) for name in settings if name in values}
        texts = {name: value for name, value in given.items() if value is not None}
        return train(**values, **{name: _parsed(settings[name], value) for name, value in texts.items()})

    settings = {name: entry for name, entry in kind.declared().items() if entry.option != ""}
    own = [
        p.replace(kind=p.KEYWORD_ONLY)
        for p in inspect.signature(train).parameters.values()
        if p.kind is not p.VAR_KEYWORD
    ]
    made = [_parameter(entry, *([defaults[name]] if name in defaults else [])) for name, entry in settings.items()]
    parameters = sorted([*made, *own], key=_panel)
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__name__, command.__doc__ = train.__name__, train.__doc__
    return command


def _parsed(entry: About, value: str | bool) -> object:
    return entry.parse(value) if isinstance(value, str) else value


def _parameter(entry: About, *default: object) -> inspect.Parameter:
    """A keyword that is None where the option is not given; text, but for switches."""
    switch = entry.kind is bool
    about = escape(entry.help)
    if default:
        about += f" [dim]{escape(f'[default: {entry.shown(*default)}]')}[/dim]"
    words = {} if switch else {"metavar": f"{entry.metavar} [{entry.bounds}]" if entry.bounds else entry.metavar}
    name = f"{entry.flag}/--no-{entry.flag[2:]}" if switch else entry.flag
    kind = bool if switch else str
    annotation = Annotated[kind | None, option(name, panel=entry.panel, help=about, **words)]
    return inspect.Parameter(entry.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _panel(parameter: inspect.Parameter) -> int:
    panel = parameter.annotation.__metadata__[0].rich_help_panel
    return PANELS.index(panel) if panel in PANELS else -1


class PerSystem(typer.core.TyperCommand):
    """A command with the options of the system that its arguments name; its help without one is of all systems."""

    train: Callable  # takes a system's settings as keywords

    def make_context(self, info_name, args, parent=None, **extra):
        try:
            switches = {name for entry in self.params if getattr(entry, "is_flag", False) for name in _names(entry)}
            asked = any(name in args for name in HELP)
            if asked and not split(args, switches)[0]:
                return super().make_context(info_name, args, parent, **extra)
            command = self.of_system(args, switches)
            return command.make_context(info_name, args, parent, **extra)
        except Exception as error:
            explain(error, "--debug" in args)

    def of_system(self, args: Sequence[str], switches: set[str]) -> typer.core.TyperCommand:
        from .. import models

        kinds = [system.Settings for system in models.SYSTEMS.values()]
        switches = switches | {name for kind in kinds for entry in kind.declared().values() for name in _switch(entry)}
        words, given = split(args, switches)
        system = _system(words, given)
        kind = models.find(system)[1].Settings
        command = _command(self.train, system, given.get("--data") or str(kind.declared()["data"].default))
        _refuse(given, command, system, kind, kinds)
        return command


def split(args: Sequence[str], switches: set[str]) -> tuple[list[str], dict[str, str | None]]:
    """The words among arguments, and the options by their names, with their values; `switches` take none."""
    words, given, rest = [], {}, iter(args)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if argument == "--":
            words += rest
        elif not argument.startswith("-"):
            words.append(argument)
        elif name in switches or name in HELP:
            given[name] = None
        else:
            given[name] = value if equals else next(rest, None)
    return words, given


def _system(words: list[str], given: Mapping[str, str | None]) -> str:
    """The system that is named, else that of the run to go on with, else the default."""
    from .. import runs

    if len(words) > 1:
        raise ValueError(f"train takes one system, got {' and '.join(words)}")
    if words:
        return runs.system_name(words[0])
    out = given.get("--out")
    if "--resume" in given and out and (Path(out) / "config.json").is_file():
        return runs.config(Path(out)).system
    return str(Settings.declared()["system"].default)


def _command(train: Callable, system: str, data: str) -> typer.core.TyperCommand:
    """The command for one system, whose help has the defaults for one data set."""
    from .. import models, runs

    runs.known_data(data)
    preset = models.preset(system, data)
    about = f"""
Train {system}: {escape(SYSTEMS.get(system, "a system of your own"))}.

The defaults are those for {data}; add --data NAME to see those for another data set.

\b[bold]Example[/bold]
  [green]ivfast train {system} --data {data} --epochs 50 --seed 1[/green]
"""
    alone = typer.Typer(context_settings=app.info.context_settings, rich_markup_mode="rich", add_completion=False)
    options = declared(train, type(preset), {name: getattr(preset, name) for name in preset.declared()})
    alone.command("train", help=about)(friendly(options))
    return typer.main.get_command(alone)


def _names(parameter) -> list[str]:
    return [*parameter.opts, *parameter.secondary_opts]


def _switch(entry: About) -> Iterator[str]:
    if entry.kind is bool:
        yield from (entry.flag, f"--no-{entry.flag[2:]}")


def _refuse(given: Mapping[str, object], command, system: str, kind: type[Settings], kinds: list) -> None:
    """Raises ValueError for an option that the system does not have: who has it, or what it may have meant."""
    known = [name for parameter in command.params for name in _names(parameter)]
    for name in given:
        if name in known or name in HELP:
            continue
        for other in kinds:
            for entry in other.declared().values():
                if entry.option != "" and name in (entry.flag, *_switch(entry)):
                    raise refusal([entry.name], system, kind)
        hint = did_you_mean(name, known) or f"ivfast train {system} --help lists its options"
        raise ValueError(f"{system} has no option {name}; {hint}")
