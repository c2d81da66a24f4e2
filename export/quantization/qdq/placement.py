"""Where integers enter the graph: at the inputs of products with constant weights; where convolutions rule, throughout.

In products lies nearly all the arithmetic. In a transformer everything else stays float, attention products, softmax,
GELU, LayerNorm and residual sums: quantizing them costs accuracy and, with the extra nodes, time (DeiT-tiny in ONNX
Runtime: 7.5 ms this way, 14.8 ms with `quantize_static` defaults, 15.1 ms in float). A convolutional network is fast
only where integers go from one convolution to the next (resnet18: 6.4 ms so, 17.1 with integer inputs alone, 17.6 in
float).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from vit_edge.errors import UsageError
from vit_edge.export.graph.matmuls import QuantizableOp, find_quantizable_ops, is_convolutional, is_padded
from vit_edge.export.quantization.calibration.observers import Range
from vit_edge.export.quantization.qdq.integer_chains import find_chains
from vit_edge.export.quantization.qdq.integers import (
    Activation,
    QuantizedWeight,
    activation_parameters,
    quantize_weight,
    rounded_bias,
    with_room,
)

__all__ = [
    "PIXELS",
    "QuantizableOp",
    "QuantizedWeight",
    "Scheme",
    "find_quantizable_ops",
    "insert_qdq",
    "quantize_weight",
    "range_names",
    "tensors_to_observe",
]

# Scale and zero point of uint8 pixels: they are integers already, so quantizing them loses nothing.
PIXELS = "pixels"
# What takes pixels to int8, as exactly.
_PIXELS_MIDDLE = 128
_LOWEST_OPSET = 13


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """Which integers: bits of the weights, what activations are, and the nodes whose products stay float.

    7 bits keep a pair of uint8 x int8 products inside the 16-bit sums of CPUs without VNNI, which would saturate and
    answer differently. "uint8" has a zero point, "int8" lies evenly around zero, as some accelerators want it.
    """

    weight_bits: int = 8
    activation: Activation = "uint8"
    exclude: frozenset[str] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        if self.weight_bits not in (7, 8):
            raise UsageError("cannot quantize", reason=f"weight_bits is {self.weight_bits}", remedy="give 7 or 8")
        if self.activation not in ("uint8", "int8"):
            raise UsageError("cannot quantize", reason=f"activation is {self.activation!r}", remedy="uint8 or int8")


def tensors_to_observe(model: onnx.ModelProto, scheme: Scheme = Scheme()) -> list[str]:
    """Return the tensors whose ranges `insert_qdq` asks for, in graph order."""
    return list(dict.fromkeys(range_names(model, scheme).values()))


def range_names(model: onnx.ModelProto, scheme: Scheme = Scheme()) -> dict[str, str]:
    """Return for each tensor that is rounded whose range that is over: its own, or that of the one it is moved from."""
    return {tensor: name for tensor, name in _Plan.of(model, scheme).ranges.items() if name != PIXELS}


def insert_qdq(
    model: onnx.ModelProto,
    ranges: Mapping[str, Range],
    *,
    scheme: Scheme = Scheme(),
    weights: Mapping[str, QuantizedWeight] | None = None,
) -> onnx.ModelProto:
    """Return a copy of a prepared `model` whose products take integers, int8 weights with a scale for each channel.

    `ranges` holds the range of each of `tensors_to_observe`. `weights` holds by name what was rounded elsewhere; the
    others are rounded to the nearest. Raises UsageError where nothing can be quantized, or `scheme` excludes what is no
    product.
    """
    plan = _Plan.of(model, scheme)
    if scheme.exclude:  # without its neighbours a tensor has to stand for itself: its range is still that of another
        whole = _Plan.of(model, replace(scheme, exclude=frozenset()))
        ranges = {name: ranges[source] for name, source in whole.ranges.items() if source in ranges} | dict(ranges)
    quantized = onnx.ModelProto()
    quantized.CopyFrom(model)
    writer = _Writer(quantized.graph, plan, ranges, scheme, weights or {})
    for node in quantized.graph.node:
        writer.add(node)
    _replace_graph(quantized.graph, writer.nodes, writer.added)
    return quantized


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """Which tensors become integers: `ranges` says whose range each has, `chained` those that all readers take so."""

    ops: Mapping[str, QuantizableOp]
    ranges: Mapping[str, str]
    chained: frozenset[str]

    @classmethod
    def of(cls, model: onnx.ModelProto, scheme: Scheme) -> _Plan:
        found = find_quantizable_ops(model)
        _check(model, scheme, found)
        ops = [op for op in found if op.node not in scheme.exclude]
        chained = find_chains(model, ops, joins=is_convolutional(model))
        nodes = {node.name: node for node in model.graph.node}
        ranges: dict[str, str] = {}
        for op in ops:
            exact = op.takes_pixels and (scheme.activation == "uint8" or not is_padded(nodes[op.node]))
            ranges[op.input] = PIXELS if exact else chained.get(op.input, op.input)
        return cls(
            ops={op.output: op for op in ops},
            ranges={**ranges, **chained},
            chained=frozenset(chained),
        )


def _check(model: onnx.ModelProto, scheme: Scheme, found: list[QuantizableOp]) -> None:
    unknown = sorted(scheme.exclude - {op.node for op in found})
    if unknown:
        reason = f"no quantizable op has the name {', '.join(unknown)}"
        raise UsageError("cannot quantize", reason=reason, remedy="exclude nodes that the coverage report names")
    if not found:
        reason = "the graph has no MatMul, Gemm or Conv with constant float32 weights"
        raise UsageError("cannot quantize", reason=reason, remedy="give a float32 model file with its weights inside")
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if opset < _LOWEST_OPSET:
        reason = f"the file has opset {opset}; per-channel scales need {_LOWEST_OPSET}"
        raise UsageError("cannot quantize", reason=reason, remedy="export it with a newer opset")


class _Writer:
    """The nodes and constants of the quantized graph, in the order in which the float graph's nodes are added."""

    def __init__(
        self,
        graph: onnx.GraphProto,
        plan: _Plan,
        ranges: Mapping[str, Range],
        scheme: Scheme,
        weights: Mapping[str, QuantizedWeight],
    ) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.added: dict[str, onnx.TensorProto] = {}
        self._plan, self._ranges, self._scheme, self._weights = plan, ranges, scheme, weights
        self._tensors = {tensor.name: tensor for tensor in graph.initializer}
        self._makers = {output: node for node in graph.node for output in node.output}
        self._dequantized: dict[str, str] = {}
        self._scales: dict[str, np.float32] = {}
        self._made: dict[str, QuantizedWeight] = {}
        self._axes: dict[str, int] = {}

    def add(self, node: onnx.NodeProto) -> None:
        """Add a node of the float graph, behind what turns its inputs into integers."""
        op = self._plan.ops.get(node.output[0])
        for position, name in enumerate(node.input):
            if name in self._plan.chained or (op is not None and position == 0):
                node.input[position] = self._integers(name)
        if op is None:
            self.nodes.append(node)
        else:
            self._add_op(node, op)

    def _add_op(self, node: onnx.NodeProto, op: QuantizableOp) -> None:
        scale = self._scales[self._plan.ranges[op.input]]
        biases_O = None if op.bias is None else numpy_helper.to_array(self._tensors[op.bias])
        node.input[1] = self._weight(op, biases_O, scale)
        weight = self._made[node.input[1]]
        moved_O = self._pixels_moved(op, weight)
        if op.operator == "MatMul":
            self.nodes.append(node)
            if moved_O is not None:
                self._add_moved(node, moved_O)
            return
        if biases_O is not None or moved_O is not None:
            scales_O = (weight.scales * scale).astype(np.float32)
            integers_O = np.zeros(len(scales_O), np.int32) if biases_O is None else rounded_bias(biases_O, scales_O)
            if moved_O is not None:
                integers_O = integers_O + moved_O
            del node.input[2:]
            node.input.append(self._bias(op, integers_O, scales_O))
        self.nodes.append(node)

    def _integers(self, name: str) -> str:
        """Add what turns a tensor into integers, once; return the tensor to read instead."""
        if name in self._dequantized:
            return self._dequantized[name]
        source = self._plan.ranges[name]
        if source == PIXELS:
            integers, parameters = self._pixels(name)
        else:
            integers = f"{name}.quantized"
            parameters = self._activation(source)
            self._node("QuantizeLinear", [name, *parameters], integers)
        self._dequantized[name] = self._node("DequantizeLinear", [integers, *parameters], f"{name}.dequantized")
        return self._dequantized[name]

    def _pixels(self, name: str) -> tuple[str, list[str]]:
        """Return the integers that pixels are already, or for int8 the same less 128."""
        self._scales[PIXELS] = np.float32(1)
        if self._scheme.activation == "uint8":
            return self._makers[name].input[0], self._parameters(PIXELS, np.float32(1), np.uint8(0))
        parameters = self._parameters(PIXELS, np.float32(1), np.int8(0))
        middle = f"{PIXELS}.middle"
        self.added[middle] = numpy_helper.from_array(np.array(_PIXELS_MIDDLE, np.float32), middle)
        moved = self._node("Sub", [name, middle], f"{name}.moved")
        return self._node("QuantizeLinear", [moved, *parameters], f"{name}.quantized"), parameters

    def _activation(self, source: str) -> list[str]:
        observed = self._ranges[source]
        maker = self._makers.get(source)
        if maker is not None and maker.op_type == "Relu":  # which vanishes only in a range that begins at zero
            observed = Range(low=0.0, high=max(observed.high, 0.0))
        scale, zero_point = activation_parameters(observed, self._scheme.activation)
        self._scales[source] = scale
        return self._parameters(source, scale, zero_point)

    def _weight(self, op: QuantizableOp, biases_O: npt.NDArray[np.float32] | None, scale: np.float32) -> str:
        """Add the integers of a weight, once for all products that can share them; return the tensor to read."""
        weight = self._weights.get(op.weight)
        if weight is None:
            array = numpy_helper.to_array(self._tensors[op.weight])
            weight = quantize_weight(array, axis=op.axis, bits=self._scheme.weight_bits)
        roomy = weight if biases_O is None else with_room(weight, biases_O, input_scale=scale, axis=op.axis)
        shared = roomy is weight and self._axes.setdefault(op.weight, op.axis) == op.axis
        name = op.weight if shared else f"{op.weight}.{op.node}"
        output = f"{name}.dequantized"
        if output not in self._made:
            self._made[output] = roomy
            integers = f"{name}.quantized"
            self.added[integers] = numpy_helper.from_array(roomy.integers, integers)
            parameters = self._parameters(name, roomy.scales, np.zeros(len(roomy.scales), np.int8))
            self._node("DequantizeLinear", [integers, *parameters], output, axis=op.axis)
        return output

    def _bias(self, op: QuantizableOp, integers_O: npt.NDArray[np.int32], scales_O: npt.NDArray[np.float32]) -> str:
        """Add the int32 bias of one product, in steps of its input's scale times its weight's."""
        name = f"{op.node}.sum"
        self.added[f"{name}.quantized"] = numpy_helper.from_array(integers_O, f"{name}.quantized")
        parameters = self._parameters(name, scales_O, np.zeros(len(scales_O), np.int32))
        return self._node("DequantizeLinear", [f"{name}.quantized", *parameters], f"{name}.dequantized", axis=0)

    def _pixels_moved(self, op: QuantizableOp, weight: QuantizedWeight) -> npt.NDArray[np.int32] | None:
        """Return what is missing in each output where 128 was taken from every pixel; None where nothing is."""
        if self._plan.ranges[op.input] != PIXELS or self._scheme.activation == "uint8":
            return None
        others = tuple(axis for axis in range(weight.integers.ndim) if axis != op.axis)
        moved_O: npt.NDArray[np.int32] = _PIXELS_MIDDLE * weight.integers.sum(axis=others, dtype=np.int32)
        return moved_O

    def _add_moved(self, node: onnx.NodeProto, moved_O: npt.NDArray[np.int32]) -> None:
        """Add behind a MatMul what is missing in its outputs."""
        name, output = f"{node.name}.missing", node.output[0]
        values_O = (moved_O * self._made[node.input[1]].scales.astype(np.float64)).astype(np.float32)
        self.added[name] = numpy_helper.from_array(values_O, name)
        node.output[0] = f"{output}.moved"
        self._node("Add", [node.output[0], name], output, name=f"{output}.moved.add")

    def _node(self, operator: str, inputs: list[str], output: str, *, name: str = "", axis: int | None = None) -> str:
        node = helper.make_node(operator, inputs, [output], name=name or output)
        if axis is not None:
            node.attribute.append(helper.make_attribute("axis", axis))
        self.nodes.append(node)
        return output

    def _parameters(
        self,
        name: str,
        scale: np.float32 | npt.NDArray[np.float32],
        zero_point: np.uint8 | np.int8 | npt.NDArray[np.int8] | npt.NDArray[np.int32],
    ) -> list[str]:
        names = [f"{name}.scale", f"{name}.zero_point"]
        for key, value in zip(names, (scale, zero_point), strict=True):
            self.added[key] = numpy_helper.from_array(np.asarray(value), key)
        return names


def _replace_graph(graph: onnx.GraphProto, nodes: list[onnx.NodeProto], added: Mapping[str, onnx.TensorProto]) -> None:
    """Put the nodes in, and drop nodes and weights that nothing reads any more."""
    read = {name for node in nodes for name in node.input} | {value.name for value in graph.output}
    kept = [node for node in nodes if any(output in read for output in node.output)]
    constants = [tensor for tensor in (*graph.initializer, *added.values()) if tensor.name in read]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(kept)
    graph.initializer.extend(constants)
