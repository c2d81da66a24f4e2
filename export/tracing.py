"""From a torch module to ONNX: traced with a dynamic batch, cleaned, and named so that a person can read the graph."""

from __future__ import annotations

import ast
import logging
import warnings
from collections import Counter

import onnx
import torch
from torch import nn

from vit_edge.errors import VerificationFailed

__all__ = ["IR_VERSION", "OPSET", "trace"]

# Opset 20 has GELU as one operator (five in 18), and ONNX Runtime 1.17 reads it with IR 8: the exporter
# stamps IR 10 on every file, whether its graph needs it or not.
OPSET, IR_VERSION = 20, 8
# Traced with a batch that is not among those that parity runs.
_TRACED_BATCH = 5
_SCOPES = "pkg.torch.onnx.name_scopes"


def trace(module: nn.Module, *, height: int, width: int) -> onnx.ModelProto:
    """Return the ONNX graph of `module`: images uint8 [batch, height, width, 3] to logits [batch, classes].

    Raises VerificationFailed where the module cannot be traced with a dynamic batch.
    """
    example = torch.zeros(_TRACED_BATCH, height, width, 3, dtype=torch.uint8)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations: nothing that a user could act on
        try:
            program = torch.onnx.export(
                module.eval(),
                (example,),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
                input_names=["images"],
                output_names=["logits"],
                opset_version=OPSET,
                verbose=False,
            )
        except Exception as error:  # the exporter's exceptions share no base but this
            raise _cannot_trace(" ".join(str(error).split())[:400]) from error
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    _check_batch_is_free(model.graph)
    _rename(model.graph)
    _strip(model)
    model.ir_version = IR_VERSION
    return model


def _check_batch_is_free(graph: onnx.GraphProto) -> None:
    for value in (*graph.input, *graph.output):
        batch = value.type.tensor_type.shape.dim[0]
        if not batch.dim_param:
            raise _cannot_trace(f"the batch of {value.name!r} was frozen at {batch.dim_value}")


def _cannot_trace(reason: str) -> VerificationFailed:
    remedy = "the batch must stay free: no shape of the forward pass may depend on it"
    return VerificationFailed("cannot trace the network", reason=reason, remedy=remedy)


def _rename(graph: onnx.GraphProto) -> None:
    """Name every node, and the tensors it makes, after the module that computes it: `block.3.attention.qkv`."""
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    constants = {tensor.name for tensor in graph.initializer}
    fixed = {value.name for value in (*graph.input, *graph.output)} | constants
    renamed: dict[str, str] = {}
    taken: Counter[str] = Counter()
    scope = ""
    for node in graph.node:
        scope = _scope(node) or scope  # a node that the optimizer put in belongs where the one before it does
        node.name = _node_name(node, scope, constants, taken)
        for position, output in enumerate(node.output):
            if output not in fixed:
                renamed[output] = node.name if len(node.output) == 1 else f"{node.name}.{position}"
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    del graph.value_info[:]


def _node_name(node: onnx.NodeProto, scope: str, constants: set[str], taken: Counter[str]) -> str:
    weight = next((name for name in node.input if name in constants and name.endswith(".weight")), None)
    if node.op_type in ("MatMul", "Gemm", "Conv") and weight is not None:
        name = weight.removesuffix(".weight")
    else:
        name = ".".join(part for part in (scope, node.op_type.lower()) if part)
    taken[name] += 1
    return name if taken[name] == 1 else f"{name}_{taken[name]}"


def _scope(node: onnx.NodeProto) -> str:
    """Return the path of the module a node was traced in, as the exporter noted it."""
    text = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), "[]")
    scopes = ast.literal_eval(text)
    return str(scopes[-2]) if len(scopes) >= 2 else ""


def _strip(model: onnx.ModelProto) -> None:
    """Remove what tells of the machine that made the file: source paths, stack traces, names of its classes."""
    graph = model.graph
    model.doc_string = graph.doc_string = ""
    graph.name = "vit-edge"
    del model.metadata_props[:], graph.metadata_props[:]
    for part in (*graph.node, *graph.initializer, *graph.input, *graph.output):
        part.doc_string = ""
        del part.metadata_props[:]
