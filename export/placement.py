"""Where integers enter the graph: at the inputs of matrix products with constant weights, and nowhere else.

There lies nearly all the arithmetic of a ViT. Attention products, softmax, GELU, LayerNorm and residual sums stay
float: quantizing them costs accuracy and, with the extra nodes, time (DeiT-tiny in ONNX Runtime: 7.5 ms this way,
14.8 ms with `quantize_static` defaults, 15.1 ms in float).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from vit_edge.export.calibration import Range

__all__ = ["PIXELS", "Product", "find_products", "insert_qdq"]

# Scale and zero point of uint8 pixels: they are integers already, so quantizing them loses nothing.
PIXELS = "pixels"
_UINT8_LEVELS = 255
# A tensor that is constant has no range to divide by.
_SMALLEST_SCALE = 1e-8


@dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """One MatMul with a constant weight [in, out]: the names of its node, its input and its weight."""

    node: str
    input: str
    weight: str
    takes_pixels: bool


def find_products(model: onnx.ModelProto) -> list[Product]:
    """Return every matrix product with a constant weight, in graph order."""
    weights = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 2}
    makers = {output: node for node in model.graph.node for output in node.output}
    return [
        Product(
            node=node.name,
            input=node.input[0],
            weight=node.input[1],
            takes_pixels=_is_cast_of_uint8(makers.get(node.input[0]), makers, model),
        )
        for node in model.graph.node
        if node.op_type == "MatMul" and node.input[1] in weights and node.input[0] not in weights
    ]


def insert_qdq(model: onnx.ModelProto, ranges: Mapping[str, Range], *, weight_bits: int) -> onnx.ModelProto:
    """Return a copy of `model` whose products take uint8 inputs and int8 weights, a scale for each output channel.

    `ranges` holds the range of every product's input but the one that takes pixels. `weight_bits` 7 keeps a pair of
    uint8 x int8 products inside the 16-bit sums of CPUs without VNNI, which would saturate and answer differently.
    """
    quantized = onnx.ModelProto()
    quantized.CopyFrom(model)
    graph = quantized.graph
    products = {product.node: product for product in find_products(model)}
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    added: dict[str, onnx.TensorProto] = {}
    dequantized: dict[str, str] = {}
    for node in graph.node:
        product = products.get(node.name)
        if product is not None:
            node.input[0] = _quantize_input(product, ranges, model, nodes, added, dequantized)
            node.input[1] = _quantize_weight(product, tensors, nodes, added, dequantized, weight_bits)
        nodes.append(node)
    _replace_graph(graph, nodes, added)
    return quantized


def _quantize_input(
    product: Product,
    ranges: Mapping[str, Range],
    model: onnx.ModelProto,
    nodes: list[onnx.NodeProto],
    added: dict[str, onnx.TensorProto],
    dequantized: dict[str, str],
) -> str:
    """Add what turns the product's input into integers, once for each tensor; return the tensor to read instead."""
    name = product.input
    if name in dequantized:
        return dequantized[name]
    if product.takes_pixels:
        integers = next(node.input[0] for node in model.graph.node if name in node.output)
        parameters = _parameters(PIXELS, np.float32(1), np.uint8(0), added)
    else:
        integers = f"{name}.quantized"
        scale, zero_point = _affine(ranges[name])
        parameters = _parameters(name, scale, zero_point, added)
        nodes.append(helper.make_node("QuantizeLinear", [name, *parameters], [integers], name=integers))
    output = f"{name}.dequantized"
    nodes.append(helper.make_node("DequantizeLinear", [integers, *parameters], [output], name=output))
    dequantized[name] = output
    return output


def _quantize_weight(
    product: Product,
    tensors: Mapping[str, onnx.TensorProto],
    nodes: list[onnx.NodeProto],
    added: dict[str, onnx.TensorProto],
    dequantized: dict[str, str],
    bits: int,
) -> str:
    name = product.weight
    if name in dequantized:
        return dequantized[name]
    integers_IO, scales_O = _symmetric(numpy_helper.to_array(tensors[name]), bits)
    quantized = f"{name}.quantized"
    added[quantized] = numpy_helper.from_array(integers_IO, quantized)
    parameters = _parameters(name, scales_O, np.zeros(len(scales_O), np.int8), added)
    output = f"{name}.dequantized"
    nodes.append(helper.make_node("DequantizeLinear", [quantized, *parameters], [output], name=output, axis=1))
    dequantized[name] = output
    return output


def _affine(observed: Range) -> tuple[np.float32, np.uint8]:
    """Return scale and zero point of uint8 over a range: real = scale x (integer - zero point)."""
    scale = max((observed.high - observed.low) / _UINT8_LEVELS, _SMALLEST_SCALE)
    return np.float32(scale), np.uint8(np.clip(np.rint(-observed.low / scale), 0, _UINT8_LEVELS))


def _symmetric(weight_IO: npt.NDArray[np.float32], bits: int) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Return signed integers of `bits` bits and one scale for each output channel."""
    largest = 2 ** (bits - 1) - 1
    scales_O = np.maximum(np.abs(weight_IO).max(axis=0) / largest, _SMALLEST_SCALE).astype(np.float32)
    return np.clip(np.rint(weight_IO / scales_O), -largest, largest).astype(np.int8), scales_O


def _parameters(
    name: str,
    scale: np.float32 | npt.NDArray[np.float32],
    zero_point: np.uint8 | npt.NDArray[np.int8],
    added: dict[str, onnx.TensorProto],
) -> list[str]:
    names = [f"{name}.scale", f"{name}.zero_point"]
    for key, value in zip(names, (scale, zero_point), strict=True):
        added[key] = numpy_helper.from_array(np.asarray(value), key)
    return names


def _is_cast_of_uint8(
    node: onnx.NodeProto | None, makers: Mapping[str, onnx.NodeProto], model: onnx.ModelProto
) -> bool:
    """Return whether `node` casts pixels: the input image, only moved about since."""
    if node is None or node.op_type != "Cast":
        return False
    source = node.input[0]
    while source in makers:
        if makers[source].op_type not in ("Reshape", "Transpose"):
            return False
        source = makers[source].input[0]
    value = next((value for value in model.graph.input if value.name == source), None)
    return value is not None and value.type.tensor_type.elem_type == onnx.TensorProto.UINT8


def _replace_graph(graph: onnx.GraphProto, nodes: list[onnx.NodeProto], added: Mapping[str, onnx.TensorProto]) -> None:
    """Put the nodes in, and drop nodes and weights that nothing reads any more."""
    read = {name for node in nodes for name in node.input} | {value.name for value in graph.output}
    kept = [node for node in nodes if any(output in read for output in node.output)]
    constants = [tensor for tensor in (*graph.initializer, *added.values()) if tensor.name in read]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(kept)
    graph.initializer.extend(constants)
