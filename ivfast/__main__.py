"""`python -m ivfast` is `ivfast info`; with arguments it is `ivfast`, as in `torchrun -m ivfast train`."""

import sys

from ._extra import command


def main() -> None:
    """Entry point of `ivfast`. Without the packages of the extra `train` it says so in one line, with exit code 2."""
    with command("ivfast"):
        from .cli import main as run

        run()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main()
    else:
        with command("ivfast"):
            from .cli.app import set_streams
            from .cli.info import report

            set_streams()
            report()
