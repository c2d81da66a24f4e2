"""`python -m vit_edge` is `vit-edge`."""

from __future__ import annotations

import sys

__all__ = ["run"]


def run() -> None:
    """Run the command line and exit with its code."""
    from vit_edge.cli import main

    sys.exit(main())


if __name__ == "__main__":
    run()
