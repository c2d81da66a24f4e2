"""Tensors on disk: safetensors with one JSON header and a SHA-256 over both, and nothing that could run code."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from vit_edge.errors import CheckpointRejected, printable
from vit_edge.files import kind_of, read_file, sha256_hex, write_atomic

__all__ = ["SCHEMA", "read_tensors", "rejected", "tensor_digest", "write_tensors"]

SCHEMA = 1
_MAX_BYTES = 2**40


def write_tensors(
    path: str | os.PathLike[str], *, key: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write `tensors` and, under `key`, `header` with its digest; atomic, and the same in gives the same bytes."""
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    complete = {"schema": SCHEMA, **header}
    complete["sha256"] = tensor_digest(complete, stored)
    # One key only: safetensors writes several in an order that changes from run to run.
    write_atomic(path, save(stored, metadata={key: json.dumps(complete, sort_keys=True)}))


def read_tensors(path: str | os.PathLike[str], *, key: str) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """Return header, tensors and the file's SHA-256 of what `write_tensors` wrote; raises CheckpointRejected."""
    data = read_file(path, what="checkpoint", max_bytes=_MAX_BYTES, error=CheckpointRejected)
    kind = kind_of(data)
    if kind is not None:
        raise rejected(path, kind[0], kind[1])
    try:
        tensors = load(data)
        # The library has checked the header by now; it gives the metadata only of a file, read a second time.
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
    except (SafetensorError, ValueError) as error:
        reason = f"the file is not a whole safetensors file ({error})"
        remedy = f"copy it again, or save the weights as safetensors where it was made{_others(path)}"
        raise rejected(path, reason, remedy) from error
    header = _header(metadata.get(key), path)
    if header.get("schema") != SCHEMA:
        reason = f"the file has schema {header.get('schema')!r}; this vit-edge reads {SCHEMA}"
        raise rejected(path, reason, "install the vit-edge that wrote it")
    if header.pop("sha256", None) != tensor_digest(header, tensors):
        reason = "the file's SHA-256 is not the one it was saved with: it was changed or damaged"
        raise rejected(path, reason, f"take an earlier copy{_others(path)}")
    return header, tensors, sha256_hex(data)


def tensor_digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over a header and every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def rejected(path: str | os.PathLike[str], reason: str, remedy: str) -> CheckpointRejected:
    """Return the error for a checkpoint that cannot be used."""
    return CheckpointRejected("cannot use the checkpoint", file=printable(path), reason=reason, remedy=remedy)


def _header(text: str | None, path: str | os.PathLike[str]) -> dict[str, Any]:
    if text is None:
        reason = "the file is safetensors, but not a checkpoint of vit-edge: it has no configuration in it"
        raise rejected(path, reason, "make one with `vit-edge convert` or `vit-edge train`")
    try:
        header = json.loads(text)
        if not isinstance(header, dict):
            raise ValueError("not a JSON object")
    except ValueError as error:
        raise rejected(
            path, f"the file's header cannot be read ({error})", f"take an earlier copy{_others(path)}"
        ) from error
    return header


def _others(path: str | os.PathLike[str]) -> str:
    """Return the names of the other checkpoints in the folder of `path`, as the end of a sentence."""
    others = sorted(p.name for p in Path(path).parent.glob("*.safetensors") if p.name != Path(path).name)
    return f"; next to it: {', '.join(map(printable, others[:5]))}" if others else ""
