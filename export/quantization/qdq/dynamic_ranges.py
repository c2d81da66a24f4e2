"""INT8 with ranges found at run time: each product's input is measured for each image; calibration is optional.

One range goes over a whole tensor, so the images of a batch would share it, and no answer may depend on what else is
in its batch: the batch is fixed at 1 in the file, and the runtime gives it image after image. A range for each row
would need no such thing, but no engine has that in its fast kernels (DeiT-tiny in ONNX Runtime: 22.7 ms with it at fc2
alone, 13.3 ms in float). ONNX Runtime makes one kernel of what stands here for each product (7.2 ms, 7.4 ms with static
ranges); OpenVINO has none and multiplies in float (17.8 ms, 12.6 ms in float).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper

from vit_edge.errors import UsageError
from vit_edge.export.graph.editing import Rewriting
from vit_edge.export.graph.matmuls import Product, find_products
from vit_edge.export.quantization.qdq.integers import QuantizedWeight, quantize_weight
from vit_edge.export.quantization.qdq.placement import Scheme, insert_qdq

__all__ = ["BATCH", "dynamic_products", "insert_dynamic"]

BATCH = 1


def dynamic_products(model: onnx.ModelProto) -> list[Product]:
    """Return the products that can take integers of ranges found at run time: matrix products, no convolutions.

    Raises UsageError where there is none.
    """
    products = [product for product in find_products(model) if product.operator != "Conv"]
    if not products:
        reason = "the graph has no matrix product with constant float32 weights, and convolutions stay float"
        raise UsageError("cannot quantize", reason=reason, remedy="take --precision int8, with calibration images")
    return products


def insert_dynamic(
    model: onnx.ModelProto, *, scheme: Scheme, weights: Mapping[str, QuantizedWeight] | None = None
) -> onnx.ModelProto:
    """Return a copy of a prepared `model` whose matrix products take integers, their ranges found at run time.

    Pixels enter the first product as they are: they are integers. `weights` holds by name what was rounded elsewhere;
    the others are rounded to the nearest. Raises UsageError where there is no such product.
    """
    chosen = [product for product in dynamic_products(model) if product.node not in scheme.exclude]
    pixels = {product.node for product in chosen if product.takes_pixels}
    if pixels:
        left = frozenset(product.node for product in find_products(model)) - pixels
        model = insert_qdq(model, {}, scheme=Scheme(weight_bits=scheme.weight_bits, exclude=left), weights=weights)
    rewriting = Rewriting(model)
    others = [product for product in chosen if not product.takes_pixels]
    _measure(rewriting, others)
    for product in others:
        _multiply(rewriting, product, (weights or {}).get(product.weight), scheme.weight_bits)
    return rewriting.model()


def _measure(rewriting: Rewriting, products: Sequence[Product]) -> None:
    """Add once for each tensor that products read, before the first of them, what measures and rounds it."""
    reading = {product.node: product.input for product in products}
    nodes: list[onnx.NodeProto] = []
    done: set[str] = set()
    for node in rewriting.nodes:
        name = reading.get(node.name)
        if name is not None and name not in done:
            done.add(name)
            outputs = [f"{name}.quantized", f"{name}.scale", f"{name}.zero_point"]
            nodes.append(helper.make_node("DynamicQuantizeLinear", [name], outputs, name=outputs[0]))
        nodes.append(node)
    rewriting.nodes = nodes


def _multiply(rewriting: Rewriting, product: Product, rounded: QuantizedWeight | None, bits: int) -> None:
    """Put the integer product, its scale and its bias in the place of the float one."""
    node = next(node for node in rewriting.nodes if node.name == product.node)
    integers, cast, scales = (f"{product.node}.{part}" for part in ("integers", "float", "scales"))
    scaled = product.output if product.bias is None else f"{product.node}.scaled"
    weight, weight_scales, weight_zero = _weight(rewriting, product, rounded, bits)
    inputs = [f"{product.input}.quantized", weight, f"{product.input}.zero_point", weight_zero]
    steps = [
        helper.make_node("MatMulInteger", inputs, [integers], name=product.node),
        helper.make_node("Cast", [integers], [cast], name=cast, to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{product.input}.scale", weight_scales], [scales], name=scales),
        helper.make_node("Mul", [cast, scales], [scaled], name=f"{product.node}.scaled"),
    ]
    if product.bias is not None:
        name = f"{product.node}.biased"
        steps.append(helper.make_node("Add", [scaled, product.bias], [product.output], name=name))
    rewriting.replace(node, steps)


def _weight(rewriting: Rewriting, product: Product, rounded: QuantizedWeight | None, bits: int) -> tuple[str, str, str]:
    """Add the weight as int8 [inputs, outputs], once for all products that share it; return it, scales and zeros."""
    integers, scales, zeros = (f"{product.weight}.{product.axis}.{part}" for part in ("quantized", "scale", "zero"))
    if integers not in rewriting.tensors:
        found = rounded or quantize_weight(rewriting.array(product.weight), axis=product.axis, bits=bits)
        rewriting.add_tensor(integers, found.integers if product.axis == 1 else found.integers.T)
        rewriting.add_tensor(scales, found.scales)
        rewriting.add_tensor(zeros, np.zeros(len(found.scales), np.int8))
    return integers, scales, zeros
