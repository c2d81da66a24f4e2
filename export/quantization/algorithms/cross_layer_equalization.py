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

__all__ = ["Mixing", "count_attentions", "equalize", "find_mixings"]

Array = npt.NDArray[Any]

_MOVES = ("Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")
_EXPONENT = 0.5
_SMALLEST_RATIO = 1e-2


@dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """The constants of a MatMul or Gemm, each used once; the weight is [in, out], or `transposed`."""

    weight: str
    bias: str | None
    transposed: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixing:
    """One attention: what its projection reads, the products before and after, and whose output each channel is."""

    input: str
    projection: Product
    value: Product
    columns_D: npt.NDArray[np.int64]


def find_mixings(model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]]) -> list[Mixing]:
    """Return every attention whose values come from a constant product and go to one.

    `shapes` are those of the tensors for one image. One product may give queries and keys as well, in columns of their
    own. Left alone are those whose constants are shared, whose weights do not come from a softmax over the last axis,
    or whose channels are not each one column of the value product.
    """
    graph = _Graph(model)
    found = []
    for node in model.graph.node:
        mixing = _mixing(node, graph, shapes)
        if mixing is not None:
            found.append(mixing)
    return found


def count_attentions(model: onnx.ModelProto) -> int:
    """Return how many products of two activations mix values by the weights of a softmax."""
    graph = _Graph(model)
    softmaxes = {name for name, node in graph.makers.items() if node.op_type == "Softmax"}
    return sum(node.op_type == "MatMul" and node.input[0] in softmaxes for node in model.graph.node)


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
        ratio_D, columns_D, value, projection = whole_D**_EXPONENT, mixing.columns_D, mixing.value, mixing.projection
        value_IO, projection_IO = (
            values[product.weight].T if product.transposed else values[product.weight]
            for product in (value, projection)
        )
        value_IO[:, columns_D] /= ratio_D
        if value.bias is not None and projection.bias is not None:
            values[value.bias][columns_D] -= middle_D
            values[projection.bias] += middle_D @ projection_IO
        if value.bias is not None:
            values[value.bias][columns_D] /= ratio_D
        projection_IO *= ratio_D[:, None]
        for name in (value.weight, value.bias, projection.weight, projection.bias):
            if name is not None:
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
        self.position = {name: place for place, node in enumerate(model.graph.node) for name in node.output}

    def once(self, name: str) -> bool:
        return len(self.readers.get(name, ())) == 1 and name not in self.outputs

    def is_move(self, node: onnx.NodeProto) -> bool:
        """Return whether a node only moves what its first input holds, in a way that is known."""
        return node.op_type in _MOVES and {*node.input[1:]} <= self.constants.keys() | {""}

    def product(self, node: onnx.NodeProto | None) -> Product | None:
        """Return the product whose result, bias included, `node` gives; None if its constants are shared."""
        if node is None:
            return None
        if node.op_type == "Gemm":
            attributes = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
            is_plain = all(attributes.get(name, 1) == 1 for name in ("alpha", "beta")) and not attributes.get("transA")
            bias = node.input[2] if len(node.input) > 2 else None
            return self._own(node.input[1], bias, transposed=bool(attributes.get("transB"))) if is_plain else None
        if node.op_type == "MatMul":
            return self._own(node.input[1], None)
        bias = next((name for name in node.input if self._rank(name) == 1), None)
        maker = next((self.makers[name] for name in node.input if name in self.makers), None)
        if node.op_type != "Add" or bias is None or maker is None or maker.op_type != "MatMul":
            return None
        return self._own(maker.input[1], bias) if self.once(maker.output[0]) else None

    def product_after(self, node: onnx.NodeProto) -> Product | None:
        """Return the product that begins with `node`."""
        readers = self.readers.get(node.output[0], [])
        if node.op_type == "MatMul" and self.once(node.output[0]) and readers[0].op_type == "Add":
            return self.product(readers[0]) or self.product(node)
        return self.product(node) if node.op_type in ("Gemm", "MatMul") else None

    def _own(self, weight: str, bias: str | None, *, transposed: bool = False) -> Product | None:
        is_own = self._rank(weight) == 2 and self.once(weight)
        is_own &= bias is None or (self._rank(bias) == 1 and self.once(bias))
        return Product(weight=weight, bias=bias, transposed=transposed) if is_own else None

    def _rank(self, name: str) -> int | None:
        return len(self.constants[name].dims) if name in self.constants else None


def _mixing(projection: onnx.NodeProto, graph: _Graph, shapes: Mapping[str, Sequence[int]]) -> Mixing | None:
    """Return the attention that ends in the product `projection`, or None where there is none to scale."""
    after = graph.product_after(projection)
    if after is None or not graph.once(projection.input[0]):
        return None
    attention, moved_after = _back(projection.input[0], graph)
    if attention is None or attention.op_type != "MatMul" or not _moved_once(attention, moved_after, graph):
        return None
    softmax = graph.makers.get(attention.input[0])
    if (
        softmax is None
        or softmax.op_type != "Softmax"
        or not _over_last_axis(softmax, len(shapes.get(attention.output[0], ())))
    ):
        return None
    source, _ = _back(attention.input[1], graph)
    value = graph.product(source)
    if source is None or value is None:
        return None
    columns_TD = _columns(graph, source.output[0], attention, moved_after, projection.input[0], shapes)
    if columns_TD is None or (columns_TD != columns_TD[0]).any() or len(set(columns_TD[0])) != len(columns_TD[0]):
        return None
    return Mixing(input=projection.input[0], projection=after, value=value, columns_D=columns_TD[0])


def _back(name: str, graph: _Graph) -> tuple[onnx.NodeProto | None, list[onnx.NodeProto]]:
    """Return the node that computes what `name` holds, and the nodes that only moved it since, in order."""
    moves: list[onnx.NodeProto] = []
    node = graph.makers.get(name)
    while node is not None and graph.is_move(node):
        moves.insert(0, node)
        node = graph.makers.get(node.input[0])
    return node, moves


def _moved_once(attention: onnx.NodeProto, moves: Sequence[onnx.NodeProto], graph: _Graph) -> bool:
    """Return whether nothing but the moves reads what the attention gives."""
    return all(len(node.output) == 1 and graph.once(node.output[0]) for node in (attention, *moves))


def _over_last_axis(softmax: onnx.NodeProto, rank: int) -> bool:
    axis = next((attribute.i for attribute in softmax.attribute if attribute.name == "axis"), -1)
    return axis in (-1, rank - 1)


def _columns(
    graph: _Graph,
    source: str,
    attention: onnx.NodeProto,
    after: Sequence[onnx.NodeProto],
    end: str,
    shapes: Mapping[str, Sequence[int]],
) -> npt.NDArray[np.int64] | None:
    """Return [tokens, channels]: which column of the value product each channel of the projection's input is.

    The moves themselves tell: they are run on the columns' numbers. Mixing replaces tokens and keeps the rest. None if
    a column of the values is read by anything but the attention.
    """
    if source not in shapes or attention.output[0] not in shapes:
        return None
    numbers = np.broadcast_to(np.arange(shapes[source][-1], dtype=np.float32), shapes[source])
    moves, ends = _spread(graph, source)
    found = _moved(graph, moves, source, ends, numbers)
    values = found.pop(attention.input[1])
    others = {number for each in found.values() for number in np.unique(each)}
    readers = [node for node in graph.readers[attention.input[1]] if node.op_type != "Shape"]
    asked = shapes[attention.output[0]][-2]
    if values.ndim < 3 or values.shape[-2] < asked or others & {*np.unique(values)} or len(readers) != 1:
        return None
    start = np.ascontiguousarray(values[..., :asked, :])
    mixed = _moved(graph, after, attention.output[0], [end], start)[end]
    return mixed.reshape(-1, mixed.shape[-1]).astype(np.int64)


def _spread(graph: _Graph, source: str) -> tuple[list[onnx.NodeProto], list[str]]:
    """Return all nodes that only move what `source` holds, in order, and the tensors that anything else reads."""
    moves: list[onnx.NodeProto] = []
    ends, waiting = list[str](), [source]
    while waiting:
        name = waiting.pop()
        for node in graph.readers.get(name, ()):
            if graph.is_move(node) and node.input[0] == name:
                moves.append(node)
                waiting += node.output
            elif node.op_type != "Shape" and name not in ends:
                ends.append(name)
        if name in graph.outputs and name not in ends:
            ends.append(name)
    return sorted(moves, key=lambda node: graph.position[node.output[0]]), ends


def _moved(
    graph: _Graph, nodes: Sequence[onnx.NodeProto], start: str, ends: Sequence[str], values: Array
) -> dict[str, Array]:
    """Return the tensors `ends` if `start` holds these values; no node computes with them."""
    found = {start: values} if start in ends else {}
    wanted = [name for name in ends if name != start]
    if not wanted:
        return found
    read = {name for node in nodes for name in node.input}
    constants = [tensor for name, tensor in graph.constants.items() if name in read]
    source = helper.make_tensor_value_info(start, TensorProto.FLOAT, None)
    outputs = [onnx.ValueInfoProto(name=name) for name in wanted]
    part = helper.make_graph(list(nodes), "moves", [source], outputs, constants)
    model = helper.make_model(part, opset_imports=graph.opset_imports, ir_version=graph.ir_version)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return {**found, **dict(zip(wanted, session.run(wanted, {start: values}), strict=True))}
