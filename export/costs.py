"""What a graph costs: multiplications per image, and bytes by kind of tensor."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import onnx
from onnx import TensorProto, helper

__all__ = ["macs_per_image", "size_by_kind", "without_weights"]

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
    """Return the multiply-accumulates of all matrix products and convolutions for one image; None: shapes unknown.

    Those of attention's products count too; additions, norms and activations do not, as is usual.
    """
    bare = without_weights(model)
    batch = bare.graph.input[0].type.tensor_type.shape.dim[0]
    images = batch.dim_value or 1
    batch.dim_value = images
    for value in bare.graph.output:
        value.type.tensor_type.shape.ClearField("dim")
        value.type.tensor_type.ClearField("shape")
    graph = onnx.shape_inference.infer_shapes(bare, data_prop=True).graph
    shapes = {value.name: _dims(value) for value in (*graph.value_info, *graph.input, *graph.output)}
    shapes |= {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    total = 0
    for node in graph.node:
        if node.op_type in ("MatMul", "Gemm", "Conv"):
            macs = _macs(node, shapes)
            if macs is None:
                return None
            total += macs
    return total // images


def _macs(node: onnx.NodeProto, shapes: Mapping[str, Sequence[int] | None]) -> int | None:
    """Return how many products go into each value of the output, times how many values there are."""
    left, right, out = (shapes.get(name) for name in (node.input[0], node.input[1], node.output[0]))
    if not left or not right or not out:
        return None
    if node.op_type == "Conv":
        return math.prod(out) * math.prod(right[1:])
    transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
    return math.prod(out) * (left[0] if transposed else left[-1])


def _dims(value: onnx.ValueInfoProto) -> list[int] | None:
    dims = value.type.tensor_type.shape.dim
    return [d.dim_value for d in dims] if dims and all(d.HasField("dim_value") for d in dims) else None


def size_by_kind(model: onnx.ModelProto) -> dict[str, int]:
    """Return the bytes of the tensors of each kind, largest first: "weights int8", "biases float32" and so on."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    sizes: Counter[str] = Counter()
    for tensor in model.graph.initializer:
        dtype, item_bytes = _TYPES.get(tensor.data_type, (TensorProto.DataType.Name(tensor.data_type).lower(), 4))
        sizes[f"{_kind(tensor, readers)} {dtype}"] += math.prod(tensor.dims) * item_bytes
    return dict(sizes.most_common())


def _kind(tensor: onnx.TensorProto, readers: Mapping[str, Sequence[onnx.NodeProto]]) -> str:
    reading = readers.get(tensor.name, ())
    operators = {node.op_type for node in reading}
    if operators & {"QuantizeLinear", "DequantizeLinear"}:
        return "weights" if any(node.input[0] == tensor.name for node in reading) else "quantization"
    if tensor.data_type == TensorProto.INT64:
        return "shapes"
    if operators & {"LayerNormalization", "BatchNormalization"}:
        return "norms"
    if operators & {"MatMul", "Gemm", "Conv"} and len(tensor.dims) > 1:
        return "weights"
    return "biases" if len(tensor.dims) == 1 else "constants"
