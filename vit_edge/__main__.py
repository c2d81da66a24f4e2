"""`python -m vit_edge` is `vit-edge`."""

from __future__ import annotations

import signal
import sys

__all__ = ["run"]


def run() -> None:
    """Run the command line and exit with its code."""
    # As Ctrl-C: what is unfinished is cleaned up, and the exit code is 130.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        from vit_edge.cli import main

        sys.exit(main())
    except KeyboardInterrupt:  # while importing
        sys.exit(130)


if __name__ == "__main__":
    run()
