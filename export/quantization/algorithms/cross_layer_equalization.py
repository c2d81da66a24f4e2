"""Channel scaling at the input of an attention's output projection: exact, and free at run time.

What the projection reads are the values mixed by weights that add up to 1. So a scale and a shift of a value's channel
go through the mixing unchanged: they fold into the product that makes the values, and out of it again in the
projection. Half the ratio (its square root) evens the ranges without making the projection's weights uneven. DeiT-tiny,
50 photographs: the noise of these inputs falls from -29.1 to -31.6 dB; with the whole ratio it is -29.3 dB and that of
the weights rises from -39 to -36 dB.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from vit_edge.export.quantization.algorithms.reparameterisation import alignment
from vit_edge.export.quantization.calibration.observers import ChannelRange

__all__ = ["Mixing", "equalize", "find_mixings"]

Array = npt.NDArray[Any]

_MOVES = ("Reshape", "Transpose", "Split", "Identity", "Squeeze", "Unsqueeze")
_EXPONENT = 0.5
_SMALLEST_RATIO = 1e-2


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixing:
    """One attention: what its projection reads, the constants before and after, and whose output each channel is."""

    input: str
    projection_weight: str
    projection_bias: str
    value_weight: str
    value_bias: str
    columns_D: npt.NDArray[np.int64]


def find_mixings(model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]]) -> list[Mixing]:
    """Return every attention whose values come from a constant product and go to one.

    `shapes` are those of the tensors for one image. Left alone are those whose constants are shared, whose weights do
    not come from a softmax over the last axis, or whose channels are not each one column of the value product.
    """
    graph = _Graph(model)
    found = []
    for node in model.graph.node:
        mixing = _mixing(node, graph, shapes)
        if mixing is not None:
            found.append(mixing)
    return found


def equalize(model: onnx.ModelProto, mixings: Sequence[Mixing], ranges: Mapping[str, ChannelRange]) -> onnx.ModelProto:
    """Return a copy of `model` in which the channels of each projection's input have nearer ranges, around zero.

    `ranges` are those of the inputs of `mixings`. The function stays the same up to float32 rounding.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    tensors = {tensor.name: tensor for tensor in changed.graph.initializer}
    values = {
        name: numpy_helper.to_array(tensor).astype(np.float64)
        for name, tensor in tensors.items()
        if tensor.data_type == TensorProto.FLOAT
    }
    for mixing in mixings:
        whole_D, middle_D = alignment(ranges[mixing.input], smallest_ratio=_SMALLEST_RATIO)
        ratio_D, columns_D = whole_D**_EXPONENT, mixing.columns_D
        values[mixing.value_weight][:, columns_D] /= ratio_D
        values[mixing.value_bias][columns_D] = (values[mixing.value_bias][columns_D] - middle_D) / ratio_D
        values[mixing.projection_bias] += middle_D @ values[mixing.projection_weight]
        values[mixing.projection_weight] *= ratio_D[:, None]
        for name in (mixing.value_weight, mixing.value_bias, mixing.projection_weight, mixing.projection_bias):
            tensors[name].CopyFrom(numpy_helper.from_array(values[name].astype(np.float32), name))
    return changed


class _Graph:
    """Who makes and who reads each tensor, and which are constant."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.opset_imports, self.ir_version = model.opset_import, model.ir_version
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.makers = {name: node for node in model.graph.node for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.outputs = {value.name for value in model.graph.output}

    def once(self, name: str) -> bool:
        return len(self.readers.get(name, ())) == 1 and name not in self.outputs

    def op(self, node: onnx.NodeProto | None) -> tuple[str, str] | None:
        """Return weight and bias of a product whose Add `node` is, each used once, or None."""
        if node is None or node.op_type != "Add":
            return None
        bias = next(
            (name for name in node.input if name in self.constants and len(self.constants[name].dims) == 1), None
        )
        maker = next((self.makers[name] for name in node.input if name in self.makers), None)
        if bias is None or maker is None or maker.op_type != "MatMul" or not self.once(maker.output[0]):
            return None
        weight = maker.input[1]
        plain = (
            weight in self.constants and len(self.constants[weight].dims) == 2 and self.once(weight) and self.once(bias)
        )
        return (weight, bias) if plain else None


def _mixing(projection: onnx.NodeProto, graph: _Graph, shapes: Mapping[str, Sequence[int]]) -> Mixing | None:
    """Return the attention that ends in the product `projection`, or None where there is none to scale."""
    if projection.op_type != "MatMul" or not graph.once(projection.output[0]):
        return None
    after = graph.op(graph.readers[projection.output[0]][0])
    if after is None or after[0] != projection.input[1]:
        return None
    attention, moved_after = _back(projection.input[0], graph)
    if attention is None or attention.op_type != "MatMul" or not graph.once(projection.input[0]):
        return None
    softmax = graph.makers.get(attention.input[0])
    if (
        softmax is None
        or softmax.op_type != "Softmax"
        or not _over_last_axis(softmax, len(shapes.get(attention.output[0], ())))
    ):
        return None
    source, moved_before = _back(attention.input[1], graph)
    before = graph.op(source)
    if source is None or before is None:
        return None
    columns_TD = _columns(graph, source.output[0], [*moved_before], attention, moved_after, projection.input[0], shapes)
    if columns_TD is None or (columns_TD != columns_TD[0]).any() or len(set(columns_TD[0])) != len(columns_TD[0]):
        return None
    return Mixing(
        input=projection.input[0],
        projection_weight=after[0],
        projection_bias=after[1],
        value_weight=before[0],
        value_bias=before[1],
        columns_D=columns_TD[0],
    )


def _back(name: str, graph: _Graph) -> tuple[onnx.NodeProto | None, list[onnx.NodeProto]]:
    """Return the node that computes what `name` holds, and the nodes that only moved it since, in order."""
    moves: list[onnx.NodeProto] = []
    node = graph.makers.get(name)
    while node is not None and node.op_type in _MOVES:
        # One reader each, or a part of the columns would be scaled for somebody else too.
        if not graph.once(name):
            return None, []
        moves.insert(0, node)
        name = node.input[0]
        node = graph.makers.get(name)
    return (node if graph.once(name) or not moves else None), moves


def _over_last_axis(softmax: onnx.NodeProto, rank: int) -> bool:
    axis = next((attribute.i for attribute in softmax.attribute if attribute.name == "axis"), -1)
    return axis in (-1, rank - 1)


def _columns(
    graph: _Graph,
    source: str,
    before: Sequence[onnx.NodeProto],
    attention: onnx.NodeProto,
    after: Sequence[onnx.NodeProto],
    end: str,
    shapes: Mapping[str, Sequence[int]],
) -> npt.NDArray[np.int64] | None:
    """Return [tokens, channels]: which column of the value product each channel of the projection's input is.

    The moves themselves tell: they are run on the columns' numbers. Mixing replaces tokens and keeps the rest.
    """
    shape = shapes[source]
    numbers = np.broadcast_to(np.arange(shape[-1], dtype=np.float32), shape)
    values = _moved(graph, before, source, attention.input[1], numbers)
    asked = shapes[attention.output[0]][-2]
    if values.ndim < 3 or values.shape[-2] < asked:
        return None
    mixed = _moved(graph, after, attention.output[0], end, np.ascontiguousarray(values[..., :asked, :]))
    return mixed.reshape(-1, mixed.shape[-1]).astype(np.int64)


def _moved(graph: _Graph, nodes: Sequence[onnx.NodeProto], start: str, end: str, values: Array) -> Array:
    if not nodes:
        return values
    read = {name for node in nodes for name in node.input}
    constants = [tensor for name, tensor in graph.constants.items() if name in read]
    source = helper.make_tensor_value_info(start, TensorProto.FLOAT, None)
    part = helper.make_graph(list(nodes), "moves", [source], [onnx.ValueInfoProto(name=end)], constants)
    model = helper.make_model(part, opset_imports=graph.opset_imports, ir_version=graph.ir_version)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: Array = session.run([end], {start: values})[0]
    return found
