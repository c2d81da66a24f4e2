"""Which tensors stay integers from one node to the next, and whose range each takes."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import onnx

from vit_edge.export.graph.matmuls import QuantizableOp

__all__ = ["find_chains", "only_for_onnxruntime"]

# Sums, products and means of integers that engines compute in integers; the functions in ONNX Runtime alone.
_JOINS = ("Add", "AveragePool", "Concat", "GlobalAveragePool", "Mul")
_TABLES = ("LeakyRelu", "Sigmoid")
# Computed in float between integers: what follows takes integers again.
_FUNCTIONS = (
    "Celu",
    "Clip",
    "Elu",
    "Gelu",
    "HardSigmoid",
    "HardSwish",
    "Mish",
    "PRelu",
    "Relu",
    "Selu",
    "Softplus",
    "Tanh",
)
# What gives the values it takes: the range stays, and so do scale and zero point.
_MOVES = ("Flatten", "MaxPool", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")
# What rounding to uint8 does by itself, where the range ends at their bounds.
_CLIPS = ("Clip", "Relu")
_PRODUCTS = ("Conv", "Gemm", "MatMul")


def find_chains(model: onnx.ModelProto, ops: Collection[QuantizableOp], *, joins: bool) -> dict[str, str]:
    """Return every tensor that all its readers take as integers, with the tensor whose range it has.

    Those are the outputs of convolutions, which ONNX Runtime computes in integers only where integers come out too, and
    with `joins` those of sums, poolings and functions between them. Where only a Relu or Clip follows, it is what that
    gives: uint8 cuts there by itself, and accelerators fuse it.
    """
    graph = model.graph
    constants = {tensor.name for tensor in graph.initializer}
    outputs = {value.name for value in graph.output}
    convolutions = {op.output for op in ops if op.operator == "Conv"}
    readers = _readers(graph)
    chained: dict[str, str] = {}
    for node in graph.node:
        moving = [name for name in node.input if name and name not in constants]
        end = node.output[0]
        clip = readers.get(end, [])
        if end not in outputs and len(clip) == 1 and clip[0].op_type in _CLIPS:
            end = clip[0].output[0]
        if end in outputs:
            continue
        if node.output[0] in convolutions:
            chained[end] = end
        elif (
            joins
            and node.op_type in (*_JOINS, *_TABLES)
            and len(moving) == len(node.input)
            and chained.keys() & set(moving)
        ):
            chained |= {name: chained.get(name, name) for name in [*moving, end]}
        elif joins and node.op_type in _FUNCTIONS and moving[0] in chained:
            chained[end] = end
        elif node.op_type in _MOVES and moving[:1] and moving[0] in chained:
            chained |= dict.fromkeys((name for name in node.output if name not in outputs), chained[moving[0]])
    return chained


def only_for_onnxruntime(model: onnx.ModelProto) -> list[str]:
    """Return the DequantizeLinear nodes of a quantized `model` that OpenVINO is faster and more exact without.

    ONNX Runtime needs integers at both sides of a convolution. OpenVINO computes what follows one in float before it
    rounds, which is free: integers in between only cost, unless the whole network stays in them, as one does whose only
    activation is Relu (mobilenet_v3_small: 1.35 ms without them, 2.3 ms with, float 2.1; resnet18: 5.5 and 5.1 ms).
    """
    graph = model.graph
    constants = {tensor.name for tensor in graph.initializer}
    readers = _readers(graph)
    rounded = [node for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] not in constants]
    kinds = {node.name: _fed_by(node.output[0], readers) for node in rounded}
    if not any(found - {*_PRODUCTS, *_JOINS, *_CLIPS} for found in kinds.values()):
        return []
    return [name for name, found in kinds.items() if not found & {*_PRODUCTS}]


def _fed_by(tensor: str, readers: Mapping[str, list[onnx.NodeProto]]) -> set[str]:
    """Return the operators that compute with a tensor, behind what only moves or rounds it."""
    found: set[str] = set()
    for node in readers.get(tensor, []):
        if node.op_type in (*_MOVES, "QuantizeLinear", "DequantizeLinear"):
            for output in node.output:
                found |= _fed_by(output, readers)
        else:
            found.add(node.op_type)
    return found


def _readers(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return readers
