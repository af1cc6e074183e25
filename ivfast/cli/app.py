"""The application, its consoles, the options that commands share, and how errors look."""

import contextlib
import functools
import io
import signal
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from .._extra import PACKAGES, PackageNotFound, check, not_found
from ..train.declare import LARGEST

NEEDED = ("torchvision", "sklearn", "safetensors", "matplotlib", "tensorboard")  # by every command but info

THREADS = 4096  # more than any machine runs, and few enough to be created

app = typer.Typer(
    name="ivfast",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
UsageError = typer.BadParameter.__base__  # of the click that typer brings
console, errors = Console(highlight=False), Console(stderr=True, highlight=False)


def option(*names: str, panel: str | None = None, **keywords):
    """An option without "[default: None]"; what happens without it stands in its help."""
    return typer.Option(*names, show_default=False, rich_help_panel=panel, **keywords)


def integer(*names: str, least: int, most: int = LARGEST, metavar: str = "N", panel: str | None = None, **keywords):
    """An option for an integer of that range."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:  # also for thousands of digits
            value = None
        if value is None or not least <= value <= most:
            limit = "2^63 - 1" if most == LARGEST else most
            raise typer.BadParameter(f"it must be an integer from {least} to {limit}, got {text!s:.80}")
        return value

    bounded = f"{metavar} [x>={least}]"
    return typer.Option(*names, parser=parse, metavar=bounded, rich_help_panel=panel, **keywords)


Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run of [b]ivfast train[/b].", show_default=False)]
Debug = Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")]
Device = Annotated[str | None, option(metavar="NAME", help="cpu, cuda or cuda:N; default: a GPU if there is one.")]
Root = Annotated[Path | None, option(metavar="DIR", help="Folder that holds the data set; default: the run's.")]
Download = Annotated[bool, typer.Option("--download", help="Download what is missing. Nothing else is downloaded.")]


def listed(entries: dict[str, str]) -> str:
    wide = max(map(len, entries))
    return "\n".join(f"  [cyan]{name:{wide}}[/cyan]  {about}" for name, about in entries.items())


def say(to: Console, text: str) -> None:
    """Print a line, where the stream is still there: a terminal may have been closed."""
    with contextlib.suppress(OSError):
        to.print(text, soft_wrap=True)


def fail(error: object) -> NoReturn:
    """Print an error as one line and exit with code 2."""
    text = str(error).partition("\nException raised from ")[0]  # PyTorch's C++ frames
    say(errors, f"[bold red]error:[/bold red] {escape(' '.join(text.split()))}")
    raise typer.Exit(2) from None


def explain(error: Exception, debug: bool) -> NoReturn:
    """End a command by an exception: one line, or under --debug the exception itself with its traceback."""
    if debug or isinstance(error, (typer.Exit, typer.Abort)):
        raise error
    if isinstance(error, UsageError):
        fail(error.format_message())
    text = str(error) or type(error).__name__
    if type(error).__name__ == "OutOfMemoryError":
        fail(f"the GPU ran out of memory: use a smaller --batch-size ({text.splitlines()[0]})")
    if text.startswith("operator torchvision::"):  # one is built for CUDA, the other for the CPU
        fail(
            f"torchvision {version('torchvision')} does not fit torch {version('torch')}: install both from one index, "
            f"pip install --force-reinstall torch torchvision ({text})"
        )
    if not isinstance(error, (TypeError, ValueError, OSError, ArithmeticError, RuntimeError, PackageNotFound)):
        text = f"{type(error).__name__}: {text}; --debug shows where it comes from"
    fail(text)


def friendly(command: Callable, name: str = "") -> Callable:
    """Errors in one line and exit code 2, Ctrl-C in one line and 130 (SIGTERM: 143); under --debug with a traceback."""
    name = name or command.__name__

    @functools.wraps(command)
    def wrapped(*args, debug: bool = False, **options):
        try:
            if name != "info":  # before an hour of training rather than after it
                check(f"ivfast {name}", *NEEDED)
            return command(*args, debug=debug, **options)
        except KeyboardInterrupt as stop:
            say(errors, f"\n[yellow]stopped[/yellow] {escape(str(stop).removeprefix('stopped '))}".rstrip())
            raise typer.Exit(128 + getattr(stop, "signal", signal.SIGINT)) from None
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            wanted = package in PACKAGES and not isinstance(error, PackageNotFound)
            explain(not_found(f"ivfast {name}", package) if wanted and not debug else error, debug)
        except Exception as error:
            explain(error, debug)

    return wrapped


def set_streams() -> None:
    """Output that a stream's encoding does not have is replaced there, rather than ending the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            utf8 = stream.encoding.lower().replace("-", "") == "utf8"
            stream.reconfigure(errors="surrogateescape" if utf8 else "replace")  # names of files may be any bytes


@app.callback()
def ivfast() -> None:
    """Train the generative models of the intervention / adversarial auto-encoder family, on fast kernels.

    \b[green]ivfast train[/green]         trains IVAAE on handwritten digits, a minute on a CPU
    [green]ivfast train --help[/green]  lists the systems and the data sets
    """
