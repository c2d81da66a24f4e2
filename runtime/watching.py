"""Whether a file is still the one it was: by what the system says of it, without reading it."""

from __future__ import annotations

import os
from typing import TypeAlias

__all__ = ["Signature", "signature_of"]

Signature: TypeAlias = tuple[int, int, int, int]


def signature_of(path: str | os.PathLike[str]) -> Signature | None:
    """Return device, inode, size and time of change of the file that `path` leads to; None where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
