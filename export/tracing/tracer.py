"""From a torch module to ONNX: traced with a dynamic batch, cleaned, and named so that a person can read the graph."""

from __future__ import annotations

import ast
import logging
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import onnxscript
import torch
from onnx import numpy_helper
from onnxscript import optimizer
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from vit_edge.errors import VerificationFailed
from vit_edge.export.graph.macs import without_weights

__all__ = ["IR_VERSION", "OPSET", "trace"]

# Opset 20 has GELU as one operator (five in 18); 18 is the lowest that the exporter writes. It stamps IR 10 on every
# file, whether its graph needs it or not, and ONNX Runtime 1.17 reads 9 at most: nothing here needs more than 8.
OPSET, _LOWEST_OPSET, IR_VERSION = 20, 18, 8
# Traced with a batch that is not among those that parity runs.
_TRACED_BATCH = 5
# Values of a constant that is computed once: larger ones would only make the file larger.
_MOST_FOLDED = 2**22
_SCOPES = "pkg.torch.onnx.name_scopes"
# The network that `PlainNetwork` puts behind its pixels, and what the exporter calls that itself.
_WRAPPED, _OUTERMOST = "network.", "_empty_nn_module_stack"


def trace(
    module: nn.Module,
    *,
    height: int,
    width: int,
    pixels: bool = True,
    outputs: Sequence[str] = ("logits",),
    highest_opset: int = OPSET,
) -> onnx.ModelProto:
    """Return the ONNX graph of `module`: images uint8 [batch, height, width, 3] to logits [batch, classes].

    Without `pixels` images are float32 [batch, 3, height, width]. The opset is the lowest that the graph needs. Raises
    VerificationFailed where the module cannot be traced with a dynamic batch.
    """
    for name in ("torch.onnx", "torch.export", "onnxscript"):  # what went wrong is in the exception
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with torch.no_grad(), warnings.catch_warnings(), _PlainPooling(), _no_mask_without_padding():
        warnings.simplefilter("ignore")  # the exporter's own deprecations: nothing that a user could act on
        try:
            program = torch.onnx.export(
                module.eval(),
                (_example(height, width, pixels),),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
                input_names=["images"],
                output_names=list(outputs),
                opset_version=OPSET if highest_opset >= OPSET else _LOWEST_OPSET,
                verbose=False,
            )
        except Exception as error:  # the exporter's exceptions share no base but this
            raise _cannot_trace(_readable(error)) from error
    assert program is not None
    _fold_constants(program.model)
    model: onnx.ModelProto = program.model_proto
    _check_batch_is_free(model.graph)
    _complete_norms(model.graph)
    _rename(model.graph)
    _strip(model)
    model.ir_version = IR_VERSION
    _lower_opset(model)
    return model


class _PlainPooling(TorchFunctionMode):
    """Adaptive average pooling as the mean or the pooling it is: the exporter gathers over computed indices instead."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _POOLINGS:
            images, size = (*args, *(kwargs or {}).values())
            pool, num_axes = _POOLINGS[func]
            sides = images.shape[-num_axes:]
            sizes = [size] * num_axes if isinstance(size, int) else list(size)
            if all(each == 1 for each in sizes):
                return images.mean(tuple(range(-num_axes, 0)), keepdim=True)
            if all(isinstance(n, int) and each and n % each == 0 for n, each in zip(sides, sizes, strict=True)):
                return pool(images, [n // each for n, each in zip(sides, sizes, strict=True)])
        return func(*args, **(kwargs or {}))


_POOLINGS: dict[Any, tuple[Any, int]] = {
    functional.adaptive_avg_pool1d: (functional.avg_pool1d, 1),
    functional.adaptive_avg_pool2d: (functional.avg_pool2d, 2),
}


@contextmanager
def _no_mask_without_padding() -> Iterator[None]:
    """Let transformers leave out the attention mask of images while it is traced, as it does when it runs.

    It makes an all-true mask for text, whose padding a graph gets as an input; parity holds it against the run.
    """
    masking = sys.modules.get("transformers.masking_utils")
    name = "is_torchdynamo_exporting"
    before = getattr(masking, name, None)
    if masking is None or before is None:
        yield
        return
    setattr(masking, name, lambda: False)
    try:
        yield
    finally:
        setattr(masking, name, before)


def _fold_constants(model: onnxscript.ir.Model) -> None:
    """Compute what depends on no input, such as the masks of shifted windows: the exporter leaves some of it in."""
    optimizer.fold_constants(
        model,
        onnx_shape_inference=True,
        input_size_limit=_MOST_FOLDED,
        output_size_limit=_MOST_FOLDED,
        should_fold=lambda _node: True,
    )
    optimizer.remove_unused_nodes(model)


def _example(height: int, width: int, pixels: bool) -> torch.Tensor:
    if pixels:
        return torch.zeros(_TRACED_BATCH, height, width, 3, dtype=torch.uint8)
    return torch.zeros(_TRACED_BATCH, 3, height, width)


def _readable(error: Exception) -> str:
    """Return what the exporter says went wrong, without its report of every strategy tried and its colours."""
    text = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error.__cause__ or error)).split())
    range_left = re.search(rf"{_TRACED_BATCH} not in VR\[(\w+), (\w+)\]", text)  # what a dimension may be, torch found
    if range_left:
        low, high = range_left.groups()
        return f"it runs only at a batch of {low if low == high else f'{low} to {high}'}, not at {_TRACED_BATCH}"
    return text[:400]


def _lower_opset(model: onnx.ModelProto) -> None:
    """Stamp the lowest opset at which every operator of the graph is what it is now.

    An operator may have a newer version only because it takes more types there (Reshape 19: float8); the checker
    knows. Two versions that differ in what they compute are in none of the operators that classifiers use.
    """
    bare = without_weights(model)
    stamped = model.opset_import[0].version
    for opset in range(_LOWEST_OPSET, stamped):
        bare.opset_import[0].version = opset
        try:
            onnx.checker.check_model(bare, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
            continue
        model.opset_import[0].version = opset
        return


def _check_batch_is_free(graph: onnx.GraphProto) -> None:
    for value in (*graph.input, *graph.output):
        batch = value.type.tensor_type.shape.dim[0]
        if not batch.dim_param:
            raise _cannot_trace(f"the batch of {value.name!r} was frozen at {batch.dim_value}")


def _cannot_trace(reason: str) -> VerificationFailed:
    remedy = "the batch must stay free: no shape of the forward pass may depend on it"
    return VerificationFailed("cannot trace the network", reason=reason, remedy=remedy)


def _complete_norms(graph: onnx.GraphProto) -> None:
    """Give every LayerNormalization its third input, zeros: without it ONNX Runtime 1.17 ends the process."""
    sizes = {tensor.name: tensor.dims for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "LayerNormalization" and len(node.input) == 2 and node.input[1] in sizes:
            zeros = np.zeros(sizes[node.input[1]], np.float32)
            node.input.append(f"{node.input[1]}.no_shift")
            if node.input[2] not in sizes:
                sizes[node.input[2]] = zeros.shape
                graph.initializer.append(numpy_helper.from_array(zeros, node.input[2]))


def _rename(graph: onnx.GraphProto) -> None:
    """Name every node, and the tensors it makes, after the module that computes it: `block.3.attention.qkv`."""
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    constants = {tensor.name for tensor in graph.initializer}
    interface = {value.name for value in (*graph.input, *graph.output)}
    fixed, taken = interface | constants, set(interface)
    renamed: dict[str, str] = {}
    for tensor in graph.initializer:
        renamed[tensor.name] = tensor.name = _free(tensor.name.removeprefix(_WRAPPED), taken)
    scope = ""
    for node in graph.node:
        scope = _scope(node) or scope  # a node that the optimizer put in belongs where the one before it does
        node.name = _free(_node_name(node, scope, constants), taken)
        for position, output in enumerate(node.output):
            if output not in fixed:
                renamed[output] = node.name if len(node.output) == 1 else f"{node.name}.{position}"
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    del graph.value_info[:]


def _node_name(node: onnx.NodeProto, scope: str, constants: set[str]) -> str:
    weight = next((name for name in node.input if name in constants and name.endswith(".weight")), None)
    if node.op_type in ("MatMul", "Gemm", "Conv") and weight is not None:
        return str(weight.removesuffix(".weight").removeprefix(_WRAPPED))
    return ".".join(part for part in (scope, node.op_type.lower()) if part)


def _free(name: str, taken: set[str]) -> str:
    """Return `name`, numbered where another node or tensor has it, and take it."""
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name}_{number}"
    taken.add(free)
    return free


def _scope(node: onnx.NodeProto) -> str:
    """Return the path of the module a node was traced in, as the exporter noted it."""
    text = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), "[]")
    scopes = ast.literal_eval(text)
    scope = f"{scopes[-2]}." if len(scopes) >= 2 else ""
    return "" if scope.startswith(_OUTERMOST) else scope.removeprefix(_WRAPPED).removesuffix(".")


def _strip(model: onnx.ModelProto) -> None:
    """Remove what tells of the machine that made the file: source paths, stack traces, names of its classes."""
    graph = model.graph
    model.doc_string = graph.doc_string = ""
    graph.name = "vit-edge"
    del model.metadata_props[:], graph.metadata_props[:]
    for part in (*graph.node, *graph.initializer, *graph.input, *graph.output):
        part.doc_string = ""
        del part.metadata_props[:]
