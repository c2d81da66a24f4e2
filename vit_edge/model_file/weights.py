"""The file of weights next to a model file over 2 GiB: the manifest names it, and covers it by its hash."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vit_edge.errors import ModelRejected, NotTrusted
from vit_edge.files import sha256_hex
from vit_edge.model_file.paired_files import read_partner

__all__ = ["checked_weights", "is_plain_name", "weights_entry"]

_MAX_WEIGHTS_BYTES = 2**40


def weights_entry(file: str, weights: bytes) -> dict[str, Any]:
    """Return the manifest's entry for the file that holds the weights of a large model."""
    return {"file": file, "sha256": sha256_hex(weights), "size_bytes": len(weights)}


def checked_weights(
    entry: Mapping[str, Any], weights: bytes | None, name: str, *, place: Path | None, check: bool = True
) -> bytes:
    """Return the weights that the manifest names: those given, or the file next to the model file at `place`.

    A link is followed, as hub caches have them: the hash decides, not the place.
    """

    def belongs(data: bytes) -> bool:
        return not check or entry == weights_entry(entry["file"], data)

    if weights is not None:
        found = weights if belongs(weights) else None
    elif place is None:
        reason = f"the weights are in {entry['file']!r}, which was not given"
        remedy = "open the model by path, with that file in the same folder"
        raise ModelRejected("cannot use the model file", file=name, reason=reason, remedy=remedy)
    else:
        found = read_partner(
            place.parent / entry["file"],
            what="weights of the model file",
            max_bytes=_MAX_WEIGHTS_BYTES,
            error=ModelRejected,
            belongs=belongs,
        )
    if found is None:
        reason = f"{entry['file']} is not the file that was sealed with the model: it was changed, damaged or exchanged"
        raise NotTrusted("will not load the model file", file=name, reason=reason, remedy="copy both files again")
    return found


def is_plain_name(name: object) -> bool:
    """Return whether this names a file in the same folder on every system."""
    return isinstance(name, str) and re.fullmatch(r"[^/\\:*\x00-\x1f]{1,255}", name) is not None and name[0] != "."
