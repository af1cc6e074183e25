"""`python -m ivfast` is `ivfast info`; with arguments it is `ivfast`, as in `torchrun -m ivfast train`."""

import sys

if __name__ == "__main__":
    if len(sys.argv) > 1:
        from .cli import main

        main()
    else:
        from .cli.info import report

        report()
