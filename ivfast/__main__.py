"""`python -m ivfast` is `ivfast info`; with arguments it is `ivfast`, as in `torchrun -m ivfast train`."""

import io
import sys

from ._extra import command


def main() -> None:
    """Entry point of `ivfast`. Without the packages of the extra `train` it says so in one line, with exit code 2."""
    _replace_unknown_characters()
    with command("ivfast"):
        from .cli import main as run

        run()


def _replace_unknown_characters() -> None:
    """A stream that is not UTF-8, such as a pipe on Windows, gets question marks for what it cannot hold."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main()
    else:
        _replace_unknown_characters()
        with command("ivfast"):
            from .cli.app import set_streams
            from .cli.info import report

            set_streams()
            report()
