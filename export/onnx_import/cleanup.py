"""Clean up a third-party graph: find what no engine may get, then put weights, names and opset in one form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, version_converter

from vit_edge.errors import ModelRejected
from vit_edge.runtime.checks.operators import MAX_NODES
from vit_edge.runtime.onnx_import.editing import prune

__all__ = ["dangers", "free_batch", "tidy"]

# Per-channel DequantizeLinear begins at 13. IR 8 is read by ONNX Runtime 1.17; opsets above 20 belong to a later one.
_LOWEST_OPSET, _IR_VERSION, _LAST_OPSET_OF_IR = 13, 8, 20
_MOST_ELEMENTS = 2**29


def dangers(proto: Any) -> Iterator[str]:
    """Yield each reason why no engine may get a ModelProto, as `vit_edge.model_file.onnx_schema` parses it."""
    graph = proto.graph
    if not graph.node:
        yield "the file holds no graph"
    if len(graph.node) > MAX_NODES:
        yield f"the model has {len(graph.node):,} nodes; at most {MAX_NODES:,} are read"
    if proto.functions or proto.training_info or graph.sparse_initializer:
        yield "the model holds functions, training steps or sparse weights"
    for node in graph.node:
        if node.domain not in ("", "ai.onnx"):
            yield f"node {node.name!r} is {node.domain}.{node.op_type}, which is not allowed"
        for attribute in node.attribute:
            if attribute.HasField("g") or attribute.graphs:
                yield f"node {node.name!r} is {node.op_type} and holds a subgraph"
            if attribute.HasField("t") and _is_outside(attribute.t):
                yield f"a constant of node {node.name!r} is in another file, or has no possible shape"
        if node.op_type.startswith(("Random", "Bernoulli", "Multinomial")):
            yield f"node {node.name!r} is {node.op_type}: the logits would not repeat"
        if node.op_type in ("QuantizeLinear", "DequantizeLinear", "QLinearMatMul", "QLinearConv", "MatMulInteger"):
            yield f"node {node.name!r} is {node.op_type}: the model is quantized already; import takes float32"
    for tensor in graph.initializer:
        if _is_outside(tensor):
            yield f"tensor {tensor.name!r} is in another file, or has no possible shape"


def _is_outside(tensor: Any) -> bool:
    sizes = [int(size) for size in tensor.dims]
    op = 1
    for size in sizes:
        op *= size
    return bool(tensor.data_location or tensor.external_data) or min(sizes, default=0) < 0 or op > _MOST_ELEMENTS


def tidy(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph with all weights as initializers, unique node names and opset 13 or later; raises ModelRejected.

    Parts that engines do not need are dropped: documentation, metadata, hints of shapes, Identity, Dropout.
    """
    graph = model.graph
    del model.metadata_props[:], graph.value_info[:], graph.quantization_annotation[:]
    constants = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in constants]
    del graph.input[:]
    graph.input.extend(inputs)
    model.doc_string = graph.doc_string = ""
    _move_constants(graph)
    _bypass(graph)
    _set_versions(model)
    if model.opset_import[0].version < _LOWEST_OPSET:
        model = _raised(model)
    _name_nodes(model.graph)
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    for tensor in model.graph.initializer:
        tensor.doc_string = ""
        _check_weight(tensor)
    prune(model.graph)
    return model


def free_batch(model: onnx.ModelProto, *, fixed: int | None = None) -> onnx.ModelProto:
    """Return a copy whose batch is dynamic, or `fixed`; the declared shapes of outputs are dropped."""
    freed = onnx.ModelProto()
    freed.CopyFrom(model)
    batch = freed.graph.input[0].type.tensor_type.shape.dim[0]
    if fixed is None:
        batch.dim_param = "batch"
    else:
        batch.dim_value = fixed
    for value in freed.graph.output:
        value.ClearField("type")
    return freed


def _move_constants(graph: onnx.GraphProto) -> None:
    """Make initializers of Constant nodes."""
    kept = []
    for node in graph.node:
        if node.op_type != "Constant":
            kept.append(onnx.NodeProto.FromString(node.SerializeToString()))
            continue
        attribute = node.attribute[0]
        value = helper.get_attribute_value(attribute)
        if attribute.name == "value":
            tensor = graph.initializer.add()
            tensor.CopyFrom(value)
            tensor.name = node.output[0]
            continue
        if attribute.name not in ("value_float", "value_floats", "value_int", "value_ints"):
            raise _rejected(f"node {node.name!r} is a Constant of {attribute.name}, which is not a number")
        dtype = np.float32 if "float" in attribute.name else np.int64
        graph.initializer.append(numpy_helper.from_array(np.array(value, dtype), node.output[0]))
    del graph.node[:]
    graph.node.extend(kept)


def _bypass(graph: onnx.GraphProto) -> None:
    """Let readers of an Identity, or of a Dropout, read what it reads; those that make an output stay."""
    outputs = {value.name for value in graph.output}
    sources: dict[str, str] = {}
    for node in graph.node:
        node.input[:] = [sources.get(name, name) for name in node.input]
        if node.op_type == "Dropout":
            node.op_type = "Identity"
            del node.attribute[:], node.input[1:], node.output[1:]
        if node.op_type == "Identity" and node.output[0] not in outputs:
            sources[node.output[0]] = node.input[0]


def _set_versions(model: onnx.ModelProto) -> None:
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), None)
    if opset is None:
        raise _rejected("the model declares no opset")
    del model.opset_import[:]
    model.opset_import.append(helper.make_opsetid("", opset))
    for node in model.graph.node:
        node.domain = ""
    model.ir_version = _IR_VERSION if opset <= _LAST_OPSET_OF_IR else max(model.ir_version, _IR_VERSION)


def _raised(model: onnx.ModelProto) -> onnx.ModelProto:
    version = model.opset_import[0].version
    try:
        raised = version_converter.convert_version(model, _LOWEST_OPSET)
    except Exception as error:  # its exceptions share no base but this
        reason = (
            f"the model has opset {version} and cannot be raised to {_LOWEST_OPSET}: {' '.join(str(error).split())}"
        )
        raise _rejected(reason[:400]) from error
    raised.ir_version = _IR_VERSION
    del raised.graph.value_info[:]
    _move_constants(raised.graph)
    return raised


def _name_nodes(graph: onnx.GraphProto) -> None:
    """Give each node a unique name: every stage identifies nodes by name."""
    taken = {node.name for node in graph.node}
    seen: set[str] = set()
    for number, node in enumerate(graph.node):
        if not node.name or node.name in seen:
            wanted = f"{node.op_type}_{number}"
            node.name = wanted if wanted not in taken else f"{wanted}.{len(taken)}"
            taken.add(node.name)
        seen.add(node.name)


def _check_weight(tensor: onnx.TensorProto) -> None:
    if tensor.data_type in (TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE):
        kind = TensorProto.DataType.Name(tensor.data_type).lower()
        raise _rejected(f"the weight {tensor.name!r} is {kind}; import starts from float32")
    values = numpy_helper.to_array(tensor)  # raises ValueError if the bytes do not fit the shape
    if tensor.data_type == TensorProto.FLOAT and not np.isfinite(values).all():
        raise _rejected(f"the weight {tensor.name!r} is not finite")


def _rejected(reason: str) -> ModelRejected:
    remedy = "export the model again, as a float32 image classifier with the weights inside the file"
    return ModelRejected("cannot import", reason=reason, remedy=remedy)
