"""Finish a traced graph: further outputs, a fixed batch size, the names of input and producer."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import vit_edge
from vit_edge.errors import UsageError
from vit_edge.export.tracing.options import ExportOptions
from vit_edge.model_file.artifact import PRODUCER
from vit_edge.model_file.tasks import Activation

__all__ = ["finish", "fix_batch"]

_TOP = 5


def finish(graph: onnx.ModelProto, options: ExportOptions, *, activation: Activation = "softmax") -> onnx.ModelProto:
    """Return the traced `graph` as `options` ask for it."""
    _add_outputs(graph.graph, options, activation)
    if options.format == "huggingface":
        _rename_input(graph.graph, "pixel_values")
    if options.batch_size is not None:
        fix_batch(graph.graph, options.batch_size)
    graph.producer_name, graph.producer_version = PRODUCER, vit_edge.__version__
    return graph


def fix_batch(graph: onnx.GraphProto, batch: int) -> None:
    """Fix the batch of inputs and outputs, in place."""
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.shape.dim:
            value.type.tensor_type.shape.dim[0].dim_value = batch


def _add_outputs(graph: onnx.GraphProto, options: ExportOptions, activation: Activation) -> None:
    """Add probabilities and the five likeliest classes; then put the outputs in their order."""
    num_classes = graph.output[0].type.tensor_type.shape.dim[1].dim_value
    if {"probabilities", "top5"} & set(options.outputs):
        graph.node.append(_probabilities(activation))
    if "top5" in options.outputs:
        top = min(_TOP, num_classes)
        graph.initializer.append(numpy_helper.from_array(np.array([top], np.int64), "top5.k"))
        outputs = ["top5_probabilities", "top5"]
        graph.node.append(helper.make_node("TopK", ["probabilities", "top5.k"], outputs, name="top5", axis=-1))
        graph.output.append(helper.make_tensor_value_info("top5", TensorProto.INT64, ["batch", top]))
        graph.output.append(helper.make_tensor_value_info("top5_probabilities", TensorProto.FLOAT, ["batch", top]))
    if "probabilities" in options.outputs:
        shape = ["batch", num_classes]
        graph.output.append(helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, shape))
    outputs_by_name = {value.name: value for value in graph.output}
    ordered = [onnx.ValueInfoProto.FromString(outputs_by_name[n].SerializeToString()) for n in options.output_names]
    del graph.output[:]
    graph.output.extend(ordered)


def _probabilities(activation: Activation) -> onnx.NodeProto:
    if activation == "softmax":
        return helper.make_node("Softmax", ["logits"], ["probabilities"], name="probabilities", axis=-1)
    if activation == "sigmoid":
        return helper.make_node("Sigmoid", ["logits"], ["probabilities"], name="probabilities")
    remedy = "leave probabilities and top5 out of --outputs"
    raise UsageError("cannot export", reason="no activation belongs behind the logits of this network", remedy=remedy)


def _rename_input(graph: onnx.GraphProto, name: str) -> None:
    old, graph.input[0].name = graph.input[0].name, name
    for node in graph.node:
        node.input[:] = [name if entry == old else entry for entry in node.input]
