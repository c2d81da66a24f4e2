"""`python -m vit_edge` is `vit-edge`."""

from __future__ import annotations

import signal
import sys

__all__ = ["run"]


def run() -> None:
    """Run the command line and exit with its code."""
    from vit_edge.cli import main

    # As Ctrl-C: what is unfinished is cleaned up, and the exit code is 130.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())


if __name__ == "__main__":
    run()
