"""How many multiplications a graph takes for one image, in integers and in float, counted without the onnx package.

The engine is asked for the shapes: it runs the graph once, its optimisations off, with the inputs and outputs of every
product as outputs of the graph.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vit_edge.model_file.artifact import ModelFile
from vit_edge.runtime.checks.golden import golden_images
from vit_edge.runtime.engines.protocol import Model

__all__ = ["MacCounts", "count_macs"]

_PRODUCTS = ("Conv", "ConvInteger", "Gemm", "MatMul", "MatMulInteger")
_INTEGER = ("ConvInteger", "MatMulInteger")


@dataclass(frozen=True, kw_only=True, slots=True)
class MacCounts:
    """Billions of multiply-accumulates for one image: those that the file has in integers, and the others."""

    integer_gmac: float
    float_gmac: float


def count_macs(model: Model) -> MacCounts | None:
    """Return what a file multiplies for one image; None where no engine here tells its shapes.

    A product is one in integers where both of its factors come from DequantizeLinear, or it is an operator of integers;
    whether the engine takes it so is for `vit-edge quantize` to say, which reads the engine's own graph.
    """
    if not isinstance(model, ModelFile) or model.weights is not None:
        return None
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    graph = model.proto.graph
    makers = {name: node for node in graph.node for name in node.output}
    constants = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    ops = [node for node in graph.node if node.op_type in _PRODUCTS]
    wanted = {name for node in ops for name in (node.input[0], node.output[0])} - constants.keys()
    shapes = _shapes(model, wanted) | constants
    totals = {True: 0, False: 0}
    for node in ops:
        totals[_is_integer(node, makers)] += _macs(node, shapes, _dims_of_weight(node, makers, constants))
    images = model.manifest.batch or 1
    return MacCounts(integer_gmac=totals[True] / images / 1e9, float_gmac=totals[False] / images / 1e9)


def _shapes(model: ModelFile, names: set[str]) -> dict[str, list[int]]:
    """Return the shapes of tensors for one image, or for the batch that the graph is fixed at."""
    onnxruntime = importlib.import_module("onnxruntime")
    proto = type(model.proto)()
    proto.CopyFrom(model.proto)
    present = {value.name for value in (*proto.graph.output, *proto.graph.input)}
    for name in sorted(names - present):
        proto.graph.output.add(name=name)
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    settings.intra_op_num_threads, settings.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), settings, providers=["CPUExecutionProvider"], enable_fallback=0
    )
    height, width = model.manifest.preprocessing.crop
    images = golden_images(range(model.manifest.batch or 1), height=height, width=width)
    given = {model.manifest.input["name"]: model.manifest.network_input(images)}
    shapes = {name: list(array.shape) for name, array in given.items()}
    asked = [value.name for value in session.get_outputs()]
    return shapes | {name: list(found.shape) for name, found in zip(asked, session.run(asked, given), strict=True)}


def _is_integer(node: Any, makers: Mapping[str, Any]) -> bool:
    sources = [makers.get(name) for name in node.input[:2]]
    return node.op_type in _INTEGER or all(s is not None and s.op_type == "DequantizeLinear" for s in sources)


def _dims_of_weight(node: Any, makers: Mapping[str, Any], constants: Mapping[str, list[int]]) -> list[int]:
    """Return the shape of a convolution's weight, which is a constant or made of one."""
    name = node.input[1]
    while name not in constants and name in makers and makers[name].input:
        name = makers[name].input[0]
    return constants.get(name, [])


def _macs(node: Any, shapes: Mapping[str, list[int]], weight: list[int]) -> int:
    """Return how many products go into each value of the output, times how many values there are."""
    out, left = shapes[node.output[0]], shapes[node.input[0]]
    if node.op_type in ("Conv", "ConvInteger"):
        return math.prod(out) * math.prod(weight[1:])
    transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
    return math.prod(out) * (left[0] if transposed else left[-1])
