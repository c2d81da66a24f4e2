"""What a process holds of the machine, as Linux tells it."""

from __future__ import annotations

import os
from pathlib import Path


def rss_bytes() -> int:
    """Return the resident memory of this process."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def num_threads() -> int:
    """Return the number of threads, those of engines included."""
    return len(os.listdir("/proc/self/task"))


def num_files() -> int:
    """Return the number of open file descriptors."""
    return len(os.listdir("/proc/self/fd"))
