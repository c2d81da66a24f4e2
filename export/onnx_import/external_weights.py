"""Weights that lie beside an ONNX file made elsewhere, taken into it: exporters put them there, even small ones.

Read are one file with a plain name in the same folder, and of that the bytes that each tensor's shape asks for.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from vit_edge.errors import ModelRejected
from vit_edge.files import read_file

__all__ = ["with_weights"]

_MAX_BYTES = 2**31 - 1
_PLAIN_NAME = re.compile(r"[^/\\:*\x00-\x1f]{1,255}")


def with_weights(data: bytes, path: str | os.PathLike[str]) -> tuple[bytes, bytes | None]:
    """Return an ONNX model with the weights of the file beside `path` inside, and that file; None where there is none.

    What lies anywhere else stays as it is. Raises ModelRejected where the file does not hold what the model says.
    """
    model = onnx.load_model_from_string(data)
    outside = [tensor for tensor in model.graph.initializer if tensor.data_location == TensorProto.EXTERNAL]
    places = {entry.value for tensor in outside for entry in tensor.external_data if entry.key == "location"}
    name = next(iter(places), "")
    if len(places) != 1 or _PLAIN_NAME.fullmatch(name) is None or name.startswith("."):
        return data, None
    beside = Path(path).parent / name
    weights = read_file(beside, what="weights beside the model file", max_bytes=_MAX_BYTES, error=ModelRejected)
    if len(data) + len(weights) > _MAX_BYTES:
        reason = f"with {name} beside it it has {len(data) + len(weights):,} bytes; one file holds {_MAX_BYTES:,}"
        raise ModelRejected("cannot take the network", reason=reason, remedy="take a smaller network")
    # Before any copy: many tensors may name the same bytes of the file.
    total = len(data) + sum(max(0, math.prod(tensor.dims)) for tensor in outside)
    if total > _MAX_BYTES:
        reason = f"the tensors in {name} have {total:,} values; one file holds {_MAX_BYTES:,} bytes"
        raise ModelRejected("cannot take the network", reason=reason, remedy="take a smaller network")
    for tensor in outside:
        _take_in(tensor, weights, name)
    return model.SerializeToString(deterministic=True), weights


def _take_in(tensor: onnx.TensorProto, weights: bytes, name: str) -> None:
    told = {entry.key: entry.value for entry in tensor.external_data}
    try:
        start = int(told.get("offset", 0))
        size = math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        fits = min(start, size, *tensor.dims) >= 0 and start + size <= len(weights)
        fits = fits and int(told.get("length", size)) == size
    except (KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        reason = f"{name} beside it does not hold its tensor {tensor.name!r}"
        raise ModelRejected("cannot take the network", reason=reason, remedy="copy both files again")
    tensor.raw_data = weights[start : start + size]
    tensor.ClearField("data_location")
    tensor.ClearField("external_data")
