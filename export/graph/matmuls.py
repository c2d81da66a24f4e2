"""The products of a graph that can run in integers: MatMul, Gemm and Conv with constant weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import TensorProto

from vit_edge.export.graph.macs import macs_by_node

__all__ = [
    "QuantizableOp",
    "attribute",
    "find_quantizable_ops",
    "is_convolutional",
    "is_depthwise",
    "is_padded",
    "pixels_before",
]

_MOVES = ("Reshape", "Transpose")


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizableOp:
    """One product with a constant weight: the names of its node and tensors.

    `axis` is that of the weight's output channels; a bias added by a node of its own is not `bias`.
    """

    node: str
    operator: str
    input: str
    weight: str
    bias: str | None
    output: str
    axis: int
    takes_pixels: bool


def find_quantizable_ops(model: onnx.ModelProto) -> list[QuantizableOp]:
    """Return every product with a constant float32 weight, in graph order, of a graph that `prepare` has seen."""
    weights = {t.name: len(t.dims) for t in model.graph.initializer if t.data_type == TensorProto.FLOAT}
    makers = {output: node for node in model.graph.node for output in node.output}
    inputs = {value.name: value for value in model.graph.input}
    return list(_quantizable_ops(model.graph, weights, makers, inputs))


def _quantizable_ops(
    graph: onnx.GraphProto,
    weights: Mapping[str, int],
    makers: Mapping[str, onnx.NodeProto],
    inputs: Mapping[str, onnx.ValueInfoProto],
) -> Iterator[QuantizableOp]:
    for node in graph.node:
        axis = _output_axis(node)
        if axis is None or node.input[0] in weights or node.input[1] not in weights:
            continue
        bias = node.input[2] if len(node.input) > 2 and node.input[2] else None
        if weights[node.input[1]] < (3 if node.op_type == "Conv" else 2) or (bias and weights.get(bias) != 1):
            continue
        if node.op_type != "Conv" and weights[node.input[1]] != 2:
            continue
        yield QuantizableOp(
            node=node.name,
            operator=node.op_type,
            input=node.input[0],
            weight=node.input[1],
            bias=bias,
            output=node.output[0],
            axis=axis,
            takes_pixels=pixels_before(makers.get(node.input[0]), makers, inputs),
        )


def _output_axis(node: onnx.NodeProto) -> int | None:
    """Return the axis of output channels in the weight of a product that engines have in integers; None: it is none."""
    if node.op_type == "MatMul":
        return 1
    if node.op_type == "Conv":
        return 0
    plain = node.op_type == "Gemm" and not attribute(node, "transA", 0)
    if not plain or attribute(node, "alpha", 1.0) != 1 or attribute(node, "beta", 1.0) != 1:
        return None
    return 0 if attribute(node, "transB", 0) else 1


def pixels_before(
    node: onnx.NodeProto | None, makers: Mapping[str, onnx.NodeProto], inputs: Mapping[str, onnx.ValueInfoProto]
) -> bool:
    """Return whether `node` casts pixels: the uint8 input of the graph, only moved about since."""
    if node is None or node.op_type != "Cast":
        return False
    source = node.input[0]
    while source in makers:
        if makers[source].op_type not in _MOVES:
            return False
        source = makers[source].input[0]
    return source in inputs and inputs[source].type.tensor_type.elem_type == TensorProto.UINT8


def is_convolutional(model: onnx.ModelProto) -> bool:
    """Return whether convolutions do most of the multiplications with constant weights.

    Where shapes are not known, every product counts as much as its weight is large.
    """
    macs = macs_by_node(model)
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in model.graph.initializer}
    totals = {"Conv": 0, "MatMul": 0, "Gemm": 0}
    for op in find_quantizable_ops(model):
        totals[op.operator] += sizes[op.weight] if macs is None else macs[op.node or op.output]
    return totals["Conv"] > totals["MatMul"] + totals["Gemm"]


def is_depthwise(node: onnx.NodeProto) -> bool:
    """Return whether a convolution has groups."""
    return node.op_type == "Conv" and int(attribute(node, "group", 1)) > 1


def is_padded(node: onnx.NodeProto) -> bool:
    """Return whether a convolution reads zeros around its input."""
    auto_pad = attribute(node, "auto_pad", b"NOTSET")
    return any(attribute(node, "pads", ())) or auto_pad not in (b"NOTSET", b"VALID", b"")


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """Return the value of an attribute of a node."""
    found = next((entry for entry in node.attribute if entry.name == name), None)
    return default if found is None else onnx.helper.get_attribute_value(found)
