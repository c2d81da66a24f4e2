"""Convert a graph to float16: half the file, with LayerNorm and softmax kept in float32.

float16 is for accelerators. On CPUs it saves storage, not time: engines convert back to float32 (on DeiT-tiny, ONNX
Runtime is slower with float16 than without).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from vit_edge.errors import VerificationFailed

__all__ = ["STORAGE_NOT_SPEED", "to_float16"]

STORAGE_NOT_SPEED = "float16 saves storage on CPUs, not time: engines compute in float32 there"

# Sums of many squares or exponentials: float16 ends at 65,504 and has 11 bits.
_KEPT_FLOAT32 = ("LayerNormalization", "Softmax")


def to_float16(graph: onnx.GraphProto) -> None:
    """Convert `graph` to float16 in place; its input and its outputs keep their types.

    Raises VerificationFailed if a weight is too large for float16.
    """
    kept = {name for node in graph.node if node.op_type in _KEPT_FLOAT32 for name in node.input}
    floats = {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}
    _separate(graph, kept & floats)
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and tensor.name not in kept:
            tensor.CopyFrom(_converted_tensor(tensor))
    outputs = {v.name for v in graph.output if v.type.tensor_type.elem_type == TensorProto.FLOAT}
    answering = _answering(graph, outputs)
    outputs -= {name for node in answering for name in node.output}
    computing = [node for node in graph.node if node not in answering]
    nodes = [*_inputs(graph), *(new for node in computing for new in _converted(node, floats, outputs))]
    nodes += [_cast(f"{name}.float16", name, TensorProto.FLOAT) for name in sorted(outputs)] + answering
    converted = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(converted)


def _answering(graph: onnx.GraphProto, outputs: set[str]) -> list[onnx.NodeProto]:
    """Return what makes probabilities and the likeliest classes of the logits: of these as they leave, in float32."""
    constants = {tensor.name for tensor in graph.initializer}
    found: list[onnx.NodeProto] = []
    for node in graph.node:
        read = set(node.input) - constants
        if node.op_type in ("Softmax", "TopK") and read <= outputs | {name for other in found for name in other.output}:
            found.append(node)
    return found


def _separate(graph: onnx.GraphProto, kept: set[str]) -> None:
    """Give what is no norm a copy of each constant that a norm reads too: equal ones were made one before."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type in _KEPT_FLOAT32:
            continue
        for position, name in enumerate(node.input):
            if name in kept:
                node.input[position] = copy = f"{name}.float16"
                if copy not in constants:
                    constants[copy] = graph.initializer.add()
                    constants[copy].CopyFrom(constants[name])
                    constants[copy].name = copy


def _inputs(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield a cast for a float32 input, and let the nodes that read it read that."""
    for value in graph.input:
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            _read_instead(graph.node, value.name, f"{value.name}.float16")
            yield _cast(value.name, f"{value.name}.float16", TensorProto.FLOAT16)


def _converted(node: onnx.NodeProto, floats: set[str], outputs: set[str]) -> Iterator[onnx.NodeProto]:
    """Yield the node in float16, or, where it stays float32, between two casts."""
    for position, name in enumerate(node.input):
        if name in outputs:
            node.input[position] = f"{name}.float16"
    for position, name in enumerate(node.output):
        if name in outputs:
            node.output[position] = f"{name}.float16"
    if node.op_type in _KEPT_FLOAT32:
        for position, name in enumerate(node.input):
            if name and name not in floats:
                node.input[position] = f"{node.name}.in"
                yield _cast(name, node.input[position], TensorProto.FLOAT)
        result, node.output[0] = node.output[0], f"{node.name}.out"
        yield node
        yield _cast(node.output[0], result, TensorProto.FLOAT16)
        return
    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
            attribute.i = TensorProto.FLOAT16
        if attribute.HasField("t") and attribute.t.data_type == TensorProto.FLOAT:
            attribute.t.CopyFrom(_converted_tensor(attribute.t))
    yield node


def _read_instead(nodes: Iterable[onnx.NodeProto], old: str, new: str) -> None:
    for node in nodes:
        node.input[:] = [new if name == old else name for name in node.input]


def _converted_tensor(tensor: onnx.TensorProto) -> onnx.TensorProto:
    with np.errstate(over="ignore"):
        values = numpy_helper.to_array(tensor).astype(np.float16)
    if not np.isfinite(values).all():
        reason = f"{tensor.name!r} has values over 65,504, the largest float16 number"
        raise VerificationFailed(
            "cannot convert to float16", reason=reason, remedy="keep the float32 file, or use int8"
        )
    return numpy_helper.from_array(values, tensor.name)


def _cast(source: str, result: str, to: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [result], name=f"{result}.cast", to=to)
