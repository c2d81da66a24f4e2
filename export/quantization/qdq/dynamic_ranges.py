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
from vit_edge.export.graph.matmuls import QuantizableOp, find_quantizable_ops
from vit_edge.export.quantization.qdq.integers import QuantizedWeight, quantize_weight
from vit_edge.export.quantization.qdq.placement import Scheme, insert_qdq

__all__ = ["BATCH", "dynamic_ops", "insert_dynamic"]

BATCH = 1


def dynamic_ops(model: onnx.ModelProto) -> list[QuantizableOp]:
    """Return the ops that can run in INT8 with ranges computed at run time: MatMul and Gemm, not Conv.

    Raises UsageError if there is none.
    """
    ops = [op for op in find_quantizable_ops(model) if op.operator != "Conv"]
    if not ops:
        reason = "the graph has no MatMul or Gemm with constant float32 weights; Conv stays in float32"
        raise UsageError("cannot quantize", reason=reason, remedy="use --precision int8, with calibration images")
    return ops


def insert_dynamic(
    model: onnx.ModelProto, *, scheme: Scheme, weights: Mapping[str, QuantizedWeight] | None = None
) -> onnx.ModelProto:
    """Return a copy of a prepared `model` whose matrix products take integers, their ranges found at run time.

    Pixels enter the first product as they are: they are integers. `weights` holds by name what was rounded elsewhere;
    the others are rounded to the nearest. Raises UsageError where there is no such product.
    """
    chosen = [op for op in dynamic_ops(model) if op.node not in scheme.exclude]
    pixels = {op.node for op in chosen if op.takes_pixels}
    if pixels:
        left = frozenset(op.node for op in find_quantizable_ops(model)) - pixels
        model = insert_qdq(model, {}, scheme=Scheme(weight_bits=scheme.weight_bits, exclude=left), weights=weights)
    rewriting = Rewriting(model)
    others = [op for op in chosen if not op.takes_pixels]
    _measure(rewriting, others)
    for op in others:
        _multiply(rewriting, op, (weights or {}).get(op.weight), scheme.weight_bits)
    return rewriting.model()


def _measure(rewriting: Rewriting, ops: Sequence[QuantizableOp]) -> None:
    """Add once for each tensor that products read, before the first of them, what measures and rounds it."""
    reading = {op.node: op.input for op in ops}
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


def _multiply(rewriting: Rewriting, op: QuantizableOp, rounded: QuantizedWeight | None, bits: int) -> None:
    """Put the integer product, its scale and its bias in the place of the float one."""
    node = next(node for node in rewriting.nodes if node.name == op.node)
    integers, cast, scales = (f"{op.node}.{part}" for part in ("integers", "float", "scales"))
    scaled = op.output if op.bias is None else f"{op.node}.scaled"
    weight, weight_scales, weight_zero = _weight(rewriting, op, rounded, bits)
    inputs = [f"{op.input}.quantized", weight, f"{op.input}.zero_point", weight_zero]
    steps = [
        helper.make_node("MatMulInteger", inputs, [integers], name=op.node),
        helper.make_node("Cast", [integers], [cast], name=cast, to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{op.input}.scale", weight_scales], [scales], name=scales),
        helper.make_node("Mul", [cast, scales], [scaled], name=f"{op.node}.scaled"),
    ]
    if op.bias is not None:
        name = f"{op.node}.biased"
        steps.append(helper.make_node("Add", [scaled, op.bias], [op.output], name=name))
    rewriting.replace(node, steps)


def _weight(
    rewriting: Rewriting, op: QuantizableOp, rounded: QuantizedWeight | None, bits: int
) -> tuple[str, str, str]:
    """Add the weight as int8 [inputs, outputs], once for all products that share it; return it, scales and zeros."""
    integers, scales, zeros = (f"{op.weight}.{op.axis}.{part}" for part in ("quantized", "scale", "zero"))
    if integers not in rewriting.tensors:
        found = rounded or quantize_weight(rewriting.array(op.weight), axis=op.axis, bits=bits)
        rewriting.add_tensor(integers, found.integers if op.axis == 1 else found.integers.T)
        rewriting.add_tensor(scales, found.scales)
        rewriting.add_tensor(zeros, np.zeros(len(found.scales), np.int8))
    return integers, scales, zeros
