"""`python -m ivfast` is `ivfast info`; with arguments it is `ivfast`, as in `torchrun -m ivfast train`."""

import sys

COMMAND = ("typer", "rich")  # what the extra `train` brings for the command line


def main() -> None:
    """Entry point of `ivfast`. Without the packages of the extra `train` it says so in one line, with exit code 2."""
    try:
        from .cli import app
    except ModuleNotFoundError as error:
        if error.name not in COMMAND:
            raise
        print(f'error: ivfast needs {error.name}: pip install "ivfast[train]"', file=sys.stderr)
        raise SystemExit(2) from None
    app()


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.argv.append("info")
    main()
