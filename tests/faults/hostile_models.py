"""Generators of model files that are sealed as if they were ours and must never hurt the process that loads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from vit_edge.model_file.artifact import MANIFEST_KEY, open_model, seal
from vit_edge.model_file.openvino_ir import NO_SEAL, seal_ir

__all__ = ["appended", "breaks_in_a_batch", "resealed", "resealed_ir"]


def resealed(path: Path, change: Callable[[onnx.ModelProto], object]) -> bytes:
    """Return the model file at `path` with a change to its graph, under the same manifest and a new seal."""
    model = onnx.load(path)
    manifest = next(entry.value for entry in model.metadata_props if entry.key == MANIFEST_KEY)
    del model.metadata_props[:]
    model.metadata_props.add(key=MANIFEST_KEY, value=manifest)
    change(model)
    data = seal(model.SerializeToString())
    open_model(data, warn=False)  # what is tested is what comes after the seal
    return data


def resealed_ir(xml: bytes, weights: bytes) -> bytes:
    """Return the `.xml` of an IR under a new seal over it and these weights."""
    old = xml.split(b'<seal value="')[1][:64]
    return seal_ir(xml.replace(old, NO_SEAL.encode()), weights)


def breaks_in_a_batch(model: onnx.ModelProto) -> None:
    """Fix the batch of a Reshape at 3: the graph loads, fails on the golden inputs, and leaves OpenVINO broken."""
    shapes = {node.input[1] for node in model.graph.node if node.op_type == "Reshape"}
    for tensor in reversed(model.graph.initializer):
        values = numpy_helper.to_array(tensor)
        if tensor.name in shapes and len(values) == 3 and values[0] == -1:
            tensor.CopyFrom(numpy_helper.from_array(np.array([3, *values[1:]], np.int64), tensor.name))
            return
    raise AssertionError("no Reshape keeps the batch free")


def appended(
    operator: str, *inputs: str, output: str = "planted", **constants: np.ndarray
) -> Callable[[onnx.ModelProto], None]:
    """Return a change that appends one node; the constants become initializers and its last inputs."""

    def change(model: onnx.ModelProto) -> None:
        model.graph.initializer.extend(
            numpy_helper.from_array(np.asarray(value, np.int64), f"{output}.{name}")
            for name, value in constants.items()
        )
        names = [*inputs, *(f"{output}.{name}" for name in constants)]
        model.graph.node.append(onnx.helper.make_node(operator, names, [output], name=output))

    return change
