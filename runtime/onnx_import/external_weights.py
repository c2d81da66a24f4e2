"""Read the weights that a third-party ONNX model keeps in files next to it: exporters do that, even for small ones.

Read are regular files with a plain name in the folder of the model, and of those the bytes that each shape asks for.
Nothing of them is sealed, so a link that leads to another folder is refused, and so is a second name of another file.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from vit_edge.errors import ModelRejected
from vit_edge.files import read_file, sha256_hex
from vit_edge.model_file.artifact import MODEL_BYTES
from vit_edge.model_file.weights import is_plain_name

__all__ = ["take_in_weights"]

# TensorProto.DataType: bytes of one value (onnx.proto); those of less than a byte are not read.
_ITEM_BYTES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}
_COPY = "copy the model and its weights again, into one folder"


def take_in_weights(proto: Any, source: str | os.PathLike[str] | bytes) -> dict[str, str]:
    """Put the weights next to `source` into its graph; return the SHA-256 of each file that was read.

    Raises ModelRejected if a file is missing, is in another folder, or does not hold what the model declares.
    """
    outside = [tensor for tensor in proto.graph.initializer if tensor.data_location or tensor.external_data]
    sizes = (math.prod(tensor.dims) * _ITEM_BYTES.get(tensor.data_type, 0) for tensor in outside)
    total = proto.ByteSize() + sum(size for size in sizes if size > 0)
    if outside and total > MODEL_BYTES:  # before any copy: many tensors may name the same bytes of one file
        reason = f"the model has {total:,} bytes with its weights; at most {MODEL_BYTES:,} are read"
        raise _rejected(reason, "take a smaller network")
    files: dict[str, bytes] = {}
    for tensor in outside:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        name = entries.get("location", "")
        if not is_plain_name(name):
            raise _rejected(f"the tensor {tensor.name!r} is in {name!r}, not in a file next to the model", _COPY)
        if isinstance(source, bytes):
            raise _rejected(
                f"the weights are in the file {name!r}, which bytes cannot name", "give the path of the model"
            )
        if name not in files:
            files[name] = _read(Path(source), name)
        _take_in(tensor, entries, files[name], name)
    return {name: sha256_hex(data) for name, data in files.items()}


def _read(model: Path, name: str) -> bytes:
    beside = model.parent / name
    # Hub caches hold links to one folder of blobs, for the model as for its weights.
    if beside.resolve().parent != model.resolve().parent:
        raise _rejected(f"{name} is a link to another folder", _COPY)
    data = read_file(beside, what="weights of the model", max_bytes=MODEL_BYTES, error=ModelRejected)
    if beside.stat().st_nlink > 1:
        raise _rejected(f"{name} is a second name of another file (a hard link)", _COPY)
    return data


def _take_in(tensor: Any, entries: dict[str, str], weights: bytes, name: str) -> None:
    offset, length = entries.get("offset", "0"), entries.get("length")
    size = math.prod(tensor.dims) * _ITEM_BYTES.get(tensor.data_type, 0)
    fits = offset.isdecimal() and len(offset) < 20 and min(tensor.dims, default=0) >= 0
    fits = fits and tensor.data_type in _ITEM_BYTES and length in (None, str(size))
    start = int(offset) if fits else 0
    if not fits or start + size > len(weights):
        raise _rejected(f"{name} does not hold the tensor {tensor.name!r}", _COPY)
    tensor.raw_data = weights[start : start + size]
    tensor.ClearField("data_location")
    tensor.ClearField("external_data")


def _rejected(reason: str, remedy: str) -> ModelRejected:
    return ModelRejected("cannot load", reason=reason, remedy=remedy)
