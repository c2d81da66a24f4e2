"""How idle OpenMP threads wait; must be set before torch or an engine loads OpenMP."""

from __future__ import annotations

import os

__all__ = ["rest_idle_threads"]

# By default idle threads spin for milliseconds, and take that time from the thread that has work if another process
# uses the CPU. A user who set any of these has chosen.
_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def rest_idle_threads() -> None:
    """Let idle OpenMP threads sleep at once, in this process and those it starts, unless the user chose otherwise."""
    if not any(name in os.environ for name in _SETTINGS):
        os.environ["OMP_WAIT_POLICY"] = "passive"
