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
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # a package of a version that does not fit may raise anything
        sys.exit(_cannot_start(error))
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)


def _cannot_start(error: Exception) -> int:
    from vit_edge.errors import misfit

    problem = misfit(error)
    sys.stderr.write(f"error: {problem}\n")
    return problem.exit_code


if __name__ == "__main__":
    run()
