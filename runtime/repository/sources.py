"""The source of a module of vit-edge that a repository holds as a script."""

from __future__ import annotations

import importlib.util
from pathlib import Path

__all__ = ["source_of"]


def source_of(module: str) -> bytes:
    """Return the source of an installed module, without importing it."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_bytes()
