"""What a graph costs: multiplications per image, and bytes by kind of tensor."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx
from onnx import TensorProto, helper

__all__ = ["PRODUCTS", "Costs", "costs", "macs_by_node", "macs_per_image", "shapes_for_one_image", "without_weights"]

PRODUCTS = ("MatMul", "Gemm", "Conv", "MatMulInteger", "ConvInteger")
# Shapes and axes: small constants that shape inference reads.
_SMALL = 1024
_TYPES: dict[int, tuple[str, int]] = {
    TensorProto.FLOAT: ("float32", 4),
    TensorProto.FLOAT16: ("float16", 2),
    TensorProto.INT8: ("int8", 1),
    TensorProto.UINT8: ("uint8", 1),
    TensorProto.INT64: ("int64", 8),
    TensorProto.BOOL: ("bool", 1),
    TensorProto.DOUBLE: ("float64", 8),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """What one graph costs: numbers learned, multiply-accumulates for one image, bytes by kind of tensor."""

    parameters: int
    macs_per_image: int | None
    size_by_kind: Mapping[str, int]


def costs(model: onnx.ModelProto) -> Costs:
    """Return what a graph costs.

    Multiply-accumulates are those of all matrix products, attention's too, and convolutions; additions, norms and
    activations do not count, as is usual. They are None where a shape is not known.
    """
    kinds = _kinds(model.graph)
    sizes: Counter[str] = Counter()
    for tensor in model.graph.initializer:
        dtype, item_bytes = _TYPES.get(tensor.data_type, (TensorProto.DataType.Name(tensor.data_type).lower(), 4))
        sizes[f"{kinds[tensor.name]} {dtype}"] += math.prod(tensor.dims) * item_bytes
    learned = (t for t in model.graph.initializer if kinds[t.name] not in ("quantization", "shapes"))
    return Costs(
        parameters=sum(math.prod(tensor.dims) for tensor in learned),
        macs_per_image=macs_per_image(model),
        size_by_kind=dict(sizes.most_common()),
    )


def without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy whose large tensors are inputs, without values: small enough for any checker."""
    bare = onnx.ModelProto()
    bare.opset_import.extend(model.opset_import)
    bare.ir_version = model.ir_version
    graph = bare.graph
    graph.name = model.graph.name or "graph"
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) <= _SMALL and not tensor.external_data:
            graph.initializer.add().CopyFrom(tensor)
        else:
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    return bare


def macs_per_image(model: onnx.ModelProto) -> int | None:
    """Return the multiply-accumulates of all matrix products and convolutions for one image; None: not all known."""
    macs = macs_by_node(model)
    return None if macs is None else sum(macs.values())


def macs_by_node(model: onnx.ModelProto) -> dict[str, int] | None:
    """Return the multiply-accumulates for one image of each matrix product and convolution, by the name of its node.

    A node without a name goes by that of its first output. None where the shapes of any of them are not known.
    """
    batch = model.graph.input[0].type.tensor_type.shape.dim
    images = (batch[0].dim_value if batch else 0) or 1
    shapes = shapes_for_one_image(model)
    found = {node.name or node.output[0]: _macs(node, shapes) for node in model.graph.node if node.op_type in PRODUCTS}
    known = {name: macs // images for name, macs in found.items() if macs is not None}
    return known if len(known) == len(found) else None


def shapes_for_one_image(model: onnx.ModelProto) -> dict[str, list[int] | None]:
    """Return the shape of every tensor at the batch that the graph is fixed at, else 1; None: not known."""
    bare = without_weights(model)
    batch = bare.graph.input[0].type.tensor_type.shape.dim
    if batch:
        batch[0].dim_value = batch[0].dim_value or 1
    for value in bare.graph.output:
        value.type.tensor_type.shape.ClearField("dim")
        value.type.tensor_type.ClearField("shape")
    graph = onnx.shape_inference.infer_shapes(bare, data_prop=True).graph
    shapes = {value.name: _dims(value) for value in (*graph.value_info, *graph.input, *graph.output)}
    return shapes | {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}


def _macs(node: onnx.NodeProto, shapes: Mapping[str, Sequence[int] | None]) -> int | None:
    """Return how many products go into each value of the output, times how many values there are."""
    left, right, out = (shapes.get(name) for name in (node.input[0], node.input[1], node.output[0]))
    if not left or not right or not out:
        return None
    if node.op_type in ("Conv", "ConvInteger"):
        return math.prod(out) * math.prod(right[1:])
    transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
    return math.prod(out) * (left[0] if transposed else left[-1])


def _dims(value: onnx.ValueInfoProto) -> list[int] | None:
    dims = value.type.tensor_type.shape.dim
    return [d.dim_value for d in dims] if dims and all(d.HasField("dim_value") for d in dims) else None


def _kinds(graph: onnx.GraphProto) -> dict[str, str]:
    """Return what each constant is: by the operators that read it."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return {tensor.name: _kind(tensor, readers.get(tensor.name, ())) for tensor in graph.initializer}


def _kind(tensor: onnx.TensorProto, reading: Sequence[onnx.NodeProto]) -> str:
    operators = {node.op_type for node in reading}
    if operators & {"QuantizeLinear", "DequantizeLinear"}:
        return "weights" if any(node.input[0] == tensor.name for node in reading) else "quantization"
    if tensor.data_type == TensorProto.INT64:
        return "shapes"
    if operators & {"LayerNormalization", "BatchNormalization"}:
        return "norms"
    if operators & set(PRODUCTS) and len(tensor.dims) > 1:
        return "weights"
    return "biases" if len(tensor.dims) == 1 else "constants"
