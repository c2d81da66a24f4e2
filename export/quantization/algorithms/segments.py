"""A graph divided where all that it computes passes through one tensor, and its parts run on their own.

In a Transformer these are the residual sums: one segment is attention with its norm, the next the MLP with its own. An
algorithm that works on one segment at a time looks at each image's tensors there, and never runs the whole network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from vit_edge.export.quantization.calibration.observers import Range
from vit_edge.export.quantization.qdq.integers import Activation, activation_parameters
from vit_edge.machine.cpu import usable_threads

__all__ = ["Segment", "SegmentRunner", "Weights", "divide"]

Array: TypeAlias = npt.NDArray[Any]
Weights: TypeAlias = Mapping[str, npt.NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """Consecutive nodes between two tensors; nothing else goes in, and only `output` comes out."""

    input: str
    output: str
    nodes: tuple[onnx.NodeProto, ...]


def divide(model: onnx.ModelProto, ops: Set[str]) -> list[Segment]:
    """Return the graph's segments in order, each as short as it can be with at least one of the nodes `products`.

    A product's bias stays with it. Where the graph never narrows to one tensor it is one segment.
    """
    graph = model.graph
    constants = {tensor.name for tensor in graph.initializer}
    source = next(value.name for value in graph.input if value.name not in constants)
    segments: list[Segment] = []
    pending: list[onnx.NodeProto] = []
    for position, cut in enumerate(_cuts(graph, constants, source)):
        pending.append(graph.node[position])
        following = graph.node[position + 1] if position + 1 < len(graph.node) else None
        is_complete = any(node.name in ops for node in pending) and not _adds_constant(following, constants)
        if cut is not None and is_complete:
            segments.append(Segment(input=source, output=cut, nodes=tuple(pending)))
            source, pending = cut, []
    if pending:  # what follows the last product, and what cannot be divided
        last = segments.pop() if segments else Segment(input=source, output="", nodes=())
        segments.append(Segment(input=last.input, output=graph.output[0].name, nodes=(*last.nodes, *pending)))
    return segments


def _cuts(graph: onnx.GraphProto, constants: Set[str], source: str) -> Iterator[str | None]:
    """Yield for each node the one tensor that anything after it reads, None where there are more."""
    last_read = {name: position for position, node in enumerate(graph.node) for name in node.input}
    last_read[graph.output[0].name] = len(graph.node)
    live = {source}
    for position, node in enumerate(graph.node):
        live |= set(node.output)
        live = {name for name in live - constants if last_read.get(name, -1) > position}
        yield next(iter(live)) if len(live) == 1 else None


def _adds_constant(node: onnx.NodeProto | None, constants: Set[str]) -> bool:
    return node is not None and node.op_type == "Add" and bool(constants & set(node.input))


class SegmentRunner:
    """Runs one segment in ONNX Runtime in float32, `weights` in place of the graph's own.

    Each node of `rounded` reads its tensor rounded to 8-bit integers, over a range that each run names. `tensors` are
    what a run gives, the segment's output by default; `NAME.rounded` is a tensor as it is read.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        segment: Segment,
        *,
        tensors: Sequence[str] = (),
        rounded: Mapping[str, str] | None = None,
        activation: Activation = "uint8",
        weights: Weights | None = None,
    ) -> None:
        self._input, self._tensors = segment.input, list(tensors) or [segment.output]
        self._activation: Activation = activation
        readers = {node.name: rounded[node.name] for node in segment.nodes if rounded and node.name in rounded}
        self._rounded = sorted(set(readers.values()))
        part = _part(model, segment, self._tensors, readers, activation, weights or {})
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3
        settings.intra_op_num_threads = usable_threads()
        self._session: Any = onnxruntime.InferenceSession(
            part.SerializeToString(), settings, providers=["CPUExecutionProvider"]
        )

    def run(self, value: Array, ranges: Mapping[str, Range]) -> list[Array]:
        """Return the tensors for what goes in, what is rounded rounded over `ranges`."""
        feed: dict[str, Any] = {self._input: value}
        for name in self._rounded:
            scale, zero_point = activation_parameters(ranges[name], self._activation)
            feed |= {_scale(name): np.asarray(scale), _zero_point(name): np.asarray(zero_point)}
        found: list[Array] = self._session.run(self._tensors, feed)
        return found


def _part(
    model: onnx.ModelProto,
    segment: Segment,
    tensors: Sequence[str],
    readers: Mapping[str, str],
    activation: Activation,
    weights: Weights,
) -> onnx.ModelProto:
    """Return the segment as a graph of its own; the ranges of what `readers` read rounded are inputs of it."""
    inputs = [_input(model, segment.input)]
    pairs = {name: _pair(name) for name in sorted(set(readers.values()))}
    integer = TensorProto.UINT8 if activation == "uint8" else TensorProto.INT8
    for name in pairs:
        inputs.append(helper.make_tensor_value_info(_scale(name), TensorProto.FLOAT, []))
        inputs.append(helper.make_tensor_value_info(_zero_point(name), integer, []))
    nodes = list(pairs.get(segment.input, ()))
    for original in segment.nodes:
        node = onnx.NodeProto()
        node.CopyFrom(original)
        if node.name in readers:
            node.input[0] = f"{readers[node.name]}.rounded"
        nodes += [node, *(added for name in node.output for added in pairs.get(name, ()))]
    read = {name for node in nodes for name in node.input}
    constants = [
        numpy_helper.from_array(weights[tensor.name], tensor.name) if tensor.name in weights else tensor
        for tensor in model.graph.initializer
        if tensor.name in read
    ]
    graph = helper.make_graph(nodes, "segment", inputs, [onnx.ValueInfoProto(name=n) for n in tensors], constants)
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def _pair(name: str) -> list[onnx.NodeProto]:
    parameters = [_scale(name), _zero_point(name)]
    return [
        helper.make_node("QuantizeLinear", [name, *parameters], [f"{name}.integers"]),
        helper.make_node("DequantizeLinear", [f"{name}.integers", *parameters], [f"{name}.rounded"]),
    ]


def _input(model: onnx.ModelProto, name: str) -> onnx.ValueInfoProto:
    """Return the input of a segment: the graph's own at any batch, or float32 of any shape."""
    for value in model.graph.input:
        if value.name == name:
            own = onnx.ValueInfoProto()
            own.CopyFrom(value)
            own.type.tensor_type.shape.dim[0].dim_param = "batch"
            return own
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)


def _scale(name: str) -> str:
    return f"{name}.scale"


def _zero_point(name: str) -> str:
    return f"{name}.zero_point"
