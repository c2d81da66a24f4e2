"""Whether a model file is still the one it was: by what the system says of it and its weights, without reading them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeAlias

__all__ = ["Signature", "signature_of"]

Signature: TypeAlias = tuple[tuple[int, int, int, int] | None, ...]


def signature_of(path: str | os.PathLike[str]) -> Signature | None:
    """Return device, inode, size and time of change of the file that `path` leads to, and of what may lie next to it.

    That is the `.bin` of an IR, and the `.data` of a network over 2 GiB. None where there is no such file.
    """
    place = Path(path)
    found = _status(place)
    beside = place.with_suffix(".bin") if place.suffix.lower() == ".xml" else place.with_name(f"{place.name}.data")
    return None if found is None else (found, _status(beside))


def _status(path: Path) -> tuple[int, int, int, int] | None:
    try:
        status = path.stat()  # a link is followed, to a new release perhaps
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
