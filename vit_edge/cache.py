"""What is remembered between runs: small JSON files by kind and key in the user's cache folder.

Each entry is authenticated under a key that only this user can read. An entry that cannot be read, that somebody else
wrote, or whose name is not its own key counts as absent. Losing an entry costs time only.
"""

from __future__ import annotations

import hmac
import json
from pathlib import Path
from typing import Any, Literal, TypeAlias

from vit_edge.errors import VitEdgeError
from vit_edge.files import read_file, write_atomic
from vit_edge.machine.user_key import signature, user_folder

__all__ = ["Kind", "cache_folder", "recall", "remember"]

Kind: TypeAlias = Literal["accepted", "refused", "tuning"]
_MAX_BYTES = 100_000


def cache_folder() -> Path:
    """Return the folder: $VIT_EDGE_CACHE, else $XDG_CACHE_HOME/vit-edge, else ~/.cache/vit-edge."""
    return user_folder("CACHE", ".cache")


def recall(kind: Kind, key: str) -> dict[str, Any] | None:
    """Return what was remembered, or None."""
    try:
        data = read_file(_place(kind, key), what="cache", max_bytes=_MAX_BYTES)
        entry = json.loads(data)
    except (VitEdgeError, OSError, RuntimeError, ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or entry.get("key") != key or not isinstance(entry.get("value"), dict):
        return None
    value: dict[str, Any] = entry["value"]
    expected, found = _authenticated(kind, key, value), entry.get("hmac")
    if expected is None or not isinstance(found, str) or not found.isascii():
        return None
    return value if hmac.compare_digest(expected, found) else None


def remember(kind: Kind, key: str, value: dict[str, Any]) -> bool:
    """Keep `value`; returns whether that was possible: a full or read-only disk is no reason to fail."""
    authenticated = _authenticated(kind, key, value)
    if authenticated is None:
        return False
    entry = {"key": key, "value": value, "hmac": authenticated}
    try:
        place = _place(kind, key)
        place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomic(place, (json.dumps(entry, sort_keys=True) + "\n").encode())
    except (VitEdgeError, OSError, RuntimeError):  # RuntimeError: no home folder is known
        return False
    return True


def _authenticated(kind: Kind, key: str, value: dict[str, Any]) -> str | None:
    return signature(json.dumps([kind, key, value], sort_keys=True).encode())


def _place(kind: Kind, key: str) -> Path:
    return cache_folder() / kind / f"{key}.json"
