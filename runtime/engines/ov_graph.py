"""The graph that OpenVINO is given: as it reads the file, with what the manifest says is for OpenVINO alone.

Where INT8 products are slower than float32 ones, OpenVINO computes them in float32, from the same rounded values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_edge.machine.int8_engines import lacks_int8_matmul, why_float32
from vit_edge.machine.telemetry import openvino_without_telemetry
from vit_edge.model_file.openvino_ir import IrModel
from vit_edge.runtime.engines.protocol import Model

with openvino_without_telemetry():
    from openvino import opset13
    from openvino.passes import ConstantFolding, Manager

__all__ = ["avoid_int8", "read_graph", "runs_slower_in_int8", "why_no_int8"]

# What the manifest's entry on quantization calls the list of roundings that are there for ONNX Runtime alone.
_SKIPS = "openvino_skips"
# ... and the largest values of the tensors that are int8 in OpenVINO alone, by their names.
_ROUNDS, _LARGEST_PEAK = "openvino_rounds", 1e30
_PRODUCTS = ("MatMul", "Convolution")
_RUNNING_PRODUCTS = (*_PRODUCTS, "FullyConnected")


def read_graph(core: Any, model: Model) -> Any:
    """Return the graph as OpenVINO reads it, with what the manifest says is for OpenVINO alone."""
    if isinstance(model, IrModel):
        return core.read_model(model.xml, model.weights)
    graph = core.read_model(model.data)
    recorded = model.manifest.quantization or {}
    _skip(graph, set(recorded.get(_SKIPS, ())))
    if not lacks_int8_matmul():  # where it is slow, attention's is too
        _round(graph, recorded.get(_ROUNDS, {}))
    return graph


def _skip(graph: Any, names: set[str]) -> None:
    """Take the roundings that end in the DequantizeLinear nodes `names` out of the graph.

    Integers at both sides of a convolution are what ONNX Runtime needs; OpenVINO computes the activation behind it in
    float before it rounds, at no cost (mobilenet_v3_small: 1.35 ms without these roundings, 2.3 ms with, float 2.1).
    """
    for end in graph.get_ordered_ops() if names else ():
        if end.get_friendly_name() in names and end.get_type_name() == "Multiply":
            start = end
            while start.get_type_name() in ("Convert", "Multiply", "Subtract"):
                start = start.input_value(0).get_node()
            if start.get_type_name() == "FakeQuantize":
                for reader in end.output(0).get_target_inputs():
                    reader.replace_source_output(start.input_value(0))


def _round(graph: Any, peaks: Mapping[str, float]) -> None:
    """Let what reads the tensors of `peaks` read them in int8, evenly around zero up to the peak.

    OpenVINO's attention is faster with queries and keys in integers, ONNX Runtime's is not: the file has them float.
    """
    if not all(isinstance(peak, int | float) and 0 < peak < _LARGEST_PEAK for peak in peaks.values()):
        raise ValueError(f"the manifest's {_ROUNDS} are not sizes of tensors")
    outputs = [output for node in graph.get_ordered_ops() for output in node.outputs()] if peaks else []
    for output in outputs:
        peak = next((peaks[name] for name in sorted(output.get_names()) if name in peaks), None)
        if peak is not None:
            readers = list(output.get_target_inputs())
            low, high = (opset13.constant(np.float32(end)) for end in (-peak * 128 / 127, peak))
            rounded = opset13.fake_quantize(output, low, high, low, high, 256)
            for reader in readers:
                reader.replace_source_output(rounded.output(0))


def runs_slower_in_int8(graph: Any) -> bool:
    """Return whether float32 is faster here for a graph with roundings: its weights are in MatMul rather than Conv."""
    if not lacks_int8_matmul():
        return False
    sizes = dict.fromkeys(_PRODUCTS, 0)
    rounds = False
    for node in graph.get_ordered_ops():
        kind = node.get_type_name()
        rounds = rounds or kind == "FakeQuantize"
        if kind in sizes and _is_constant(node.input_value(1).get_node()):
            sizes[kind] += math.prod(node.input_value(1).get_shape())
    return rounds and sizes["MatMul"] > sizes["Convolution"]


def avoid_int8(graph: Any) -> dict[str, str]:
    """Return the settings with which OpenVINO computes a graph in float32, its roundings included.

    Weights are turned to float32 here: left to OpenVINO they are turned in each run, by slower kernels.
    """
    manager = Manager()
    manager.register_pass(ConstantFolding())
    manager.run_passes(graph)
    return {"LP_TRANSFORMS_MODE": "NO"}


def why_no_int8(running: Any, precision: str) -> str | None:
    """Return why the ops of an INT8 file run in float32 in the graph `running` that was compiled; None if they do not.

    It is read back: no product's kernel is one for integers.
    """
    reason = why_float32("openvino", None)
    if not precision.startswith("int8") or reason is None:
        return None
    for node in running.get_ops():
        said = {key: str(getattr(value, "value", value)) for key, value in node.get_rt_info().items()}
        kernel = said.get("primitiveType", "").lower()
        if said.get("layerType") in _RUNNING_PRODUCTS and kernel.endswith(("i8", "u8")):
            return None
    return reason


def _is_constant(node: Any) -> bool:
    """Return whether a tensor is a constant, or integers of one turned to float."""
    while node.get_type_name() in ("Convert", "Subtract", "Multiply"):
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "Constant")
