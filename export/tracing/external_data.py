"""Weights in one file next to the model file: one protobuf message holds at most 2 GiB."""

from __future__ import annotations

import onnx
from onnx import TensorProto

__all__ = ["move_weights_in", "move_weights_out"]

# Room for the graph and the manifest in the 2 GiB of the file itself.
_MOST_INSIDE_BYTES = 2**31 - 2**27
# Smaller tensors stay: shapes and axes that engines read before they load weights.
_SMALLEST_BYTES = 1024
_ALIGNMENT = 64


def move_weights_out(graph: onnx.GraphProto, *, file: str) -> bytes | None:
    """Move the weights of a graph that is too large into the bytes returned, to be kept as `file`; None: it fits."""
    if sum(len(tensor.raw_data) for tensor in graph.initializer) <= _MOST_INSIDE_BYTES:
        return None
    parts: list[bytes] = []
    offset = 0
    for tensor in graph.initializer:
        values = tensor.raw_data
        if len(values) < _SMALLEST_BYTES:
            continue
        padding = -offset % _ALIGNMENT
        parts += [bytes(padding), values]
        offset += padding
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", file), ("offset", str(offset)), ("length", str(len(values)))):
            tensor.external_data.add(key=key, value=value)
        offset += len(values)
    return b"".join(parts)


def move_weights_in(graph: onnx.GraphProto, weights: bytes | None) -> None:
    """Move weights that `move_weights_out` moved out back into the graph; None: nothing was moved."""
    for tensor in graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place and weights is not None:
            start = int(place["offset"])
            tensor.raw_data = weights[start : start + int(place["length"])]
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
