"""What a graph may hold before an engine sees it: the operators of image classifiers, nothing that loops or reads.

Such lists refuse the hangs, memory bombs and crashes that engines and checkers fall for.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import Any

from vit_edge.errors import ModelRejected
from vit_edge.model_file.artifact import MOST_OUTPUTS, ModelFile
from vit_edge.model_file.onnx_schema import FLOAT, FLOAT16, UINT8
from vit_edge.runtime.engines.protocol import Model

__all__ = ["MAX_NODES", "MAX_RANK", "MAX_TENSOR_VALUES", "check_contents", "check_graph", "check_sizes"]

_ITEM_BYTES = {FLOAT: 4, FLOAT16: 2}
# ViT-g/14 in QDQ form has 1,900 nodes; a chain of 20,000 takes OpenVINO over 12 s.
MAX_NODES = 5_000
# Over all nodes: a Concat of an unrolled attention has some hundred; optimisers are quadratic in them.
_MAX_NODE_INPUTS = 50_000
# ViT-g/14 in QDQ form has 3,500; each costs an engine an allocation and a look-up by name.
_MAX_INITIALIZERS = 20_000
# Other domains that exporters list without using them.
_MAX_OPSET_ENTRIES, _MAX_DOMAIN_VERSION = 16, 100
MAX_RANK = 8
# ViT-B/16 on 896 x 896 pixels has attention maps of 118 million values an image; 2^27 float32 values are 512 MiB.
MAX_TENSOR_VALUES = 2**27
_MAX_IR, _MAX_OPSET = 13, 26
_DOMAINS = ("", "ai.onnx")
# One list for every file: what classifiers of vit-edge and of the common exporters hold.
_OPERATORS = frozenset(
    [
        "Abs", "Add", "And", "ArgMax", "AveragePool", "BatchNormalization", "Cast", "Ceil", "Celu", "Clip", "Concat",
        "Constant", "ConstantOfShape", "Conv", "ConvInteger", "Cos", "DequantizeLinear", "Div", "Dropout",
        "DynamicQuantizeLinear", "Einsum", "Elu", "Equal", "Erf", "Exp", "Expand", "Flatten", "Floor", "Gather", "Gelu",
        "Gemm", "GlobalAveragePool", "GlobalMaxPool", "Greater", "GreaterOrEqual", "GroupNormalization", "HardSigmoid",
        "HardSwish", "Identity", "InstanceNormalization", "IsNaN", "LRN", "LayerNormalization", "LeakyRelu", "Less",
        "LessOrEqual", "Log", "LogSoftmax", "LpNormalization", "MatMul", "MatMulInteger", "Max", "MaxPool", "Min",
        "Mish", "Mod", "Mul", "Neg", "Not", "Or", "PRelu", "Pad", "Pow", "QLinearConv", "QLinearMatMul",
        "QuantizeLinear", "Range", "Reciprocal", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
        "ReduceSum", "ReduceSumSquare", "Relu", "Reshape", "Resize", "Round", "ScatterND", "Selu", "Shape", "Sigmoid",
        "Sign", "Sin", "Size", "Slice", "Softmax", "Softplus", "Softsign", "Split", "Sqrt", "Squeeze", "Sub", "Sum",
        "Tanh", "Tile", "TopK", "Transpose", "Trilu", "Unsqueeze", "Where",
    ]
)  # fmt: skip
# Inputs that an operator may leave out in the middle, by an empty name; an engine may read any other as if it were
# there: ONNX Runtime crashes on a LayerNormalization with an empty bias.
_MAY_BE_EMPTY = {
    "Clip": {1, 2}, "Conv": {2}, "ConvInteger": {2, 3}, "DequantizeLinear": {2}, "Dropout": {1, 2}, "Gemm": {2},
    "MatMulInteger": {2, 3}, "Pad": {2, 3}, "QLinearConv": {8}, "QuantizeLinear": {1, 2}, "ReduceL2": {1},
    "ReduceMax": {1}, "ReduceMean": {1}, "ReduceMin": {1}, "ReduceProd": {1}, "ReduceSum": {1}, "ReduceSumSquare": {1},
    "Resize": {1, 2, 3}, "Slice": {3, 4}, "Split": {1}, "Squeeze": {1}, "Trilu": {1},
}  # fmt: skip
_FEWEST_INPUTS = {"LayerNormalization": 3}  # ONNX Runtime 1.17 aborts on two


def check_contents(model: Model, *, allow_ops: Collection[str] = ()) -> None:
    """Raise ModelRejected if a model file of either format holds anything that no classifier needs."""
    if isinstance(model, ModelFile):
        check_graph(model, allow_ops=allow_ops)
        return
    from vit_edge.runtime.checks.ir_layers import check_ir  # ONNX files do not pay for it

    check_ir(model)


def check_graph(model: ModelFile, *, allow_ops: Collection[str] = ()) -> None:
    """Raise ModelRejected if the graph holds anything that no classifier needs, or contradicts its manifest.

    `allow_ops` are operators that the user allows besides: of ONNX by name, of another domain as "domain.Name".
    """
    for problem in _problems(model.proto, model, _OPERATORS | set(allow_ops)):
        raise _rejected(model, problem)


def check_sizes(model: Model) -> None:
    """Raise ModelRejected if a tensor of the graph would be too large for one image, before an engine allocates it."""
    if isinstance(model, ModelFile):
        from vit_edge.runtime.checks.tensor_sizes import size_problems  # a known file does not pay for it

        for problem in size_problems(model.proto.graph):
            raise _rejected(model, problem)


def _rejected(model: ModelFile, reason: str) -> ModelRejected:
    remedy = "export the network again as a plain classifier; --allow-op allows an operator that you trust"
    if "is not allowed" not in reason:
        remedy = "export the network again as a plain classifier"
    return ModelRejected("cannot load the model", file=model.source, reason=reason, remedy=remedy)


def _problems(proto: Any, model: ModelFile, allowed: Collection[str]) -> Iterator[str]:
    graph = proto.graph
    yield from _count_problems(proto)
    versions = {entry.domain or "ai.onnx": entry.version for entry in proto.opset_import}
    if not 3 <= proto.ir_version <= _MAX_IR:
        yield f"the IR version is {proto.ir_version}; 3 to {_MAX_IR} are read"
    if not 7 <= versions.get("ai.onnx", 0) <= _MAX_OPSET:
        yield f"the opset is {versions.get('ai.onnx', 'not given')}; 7 to {_MAX_OPSET} are read"
    if proto.functions or proto.training_info or graph.sparse_initializer:
        yield "the model holds functions, training steps or sparse weights"
    known = {tensor.name for tensor in graph.initializer} | {value.name for value in graph.input}
    for node in graph.node:
        if not known >= {name for name in node.input if name}:
            yield f"node {node.name!r} reads what no node before it makes"
        known |= set(node.output)
        kind = node.op_type if node.domain in _DOMAINS else f"{node.domain}.{node.op_type}"
        if kind not in allowed:
            yield f"node {node.name!r} is {node.domain or 'ai.onnx'}.{node.op_type}, which is not allowed"
        yield from _input_problems(node)
        for attribute in node.attribute:
            if attribute.HasField("g") or attribute.graphs:
                yield f"node {node.name!r} holds a graph of its own"
            if attribute.HasField("t"):
                yield from _tensor_problems(attribute.t, f"a constant of node {node.name!r}")
    for tensor in graph.initializer:
        external = model.weights is not None and _lies_beside(tensor, model)
        yield from _tensor_problems(tensor, f"tensor {tensor.name!r}", external=external)
    yield from _interface_problems(graph, model)


def _count_problems(proto: Any) -> Iterator[str]:
    """Yield what is too many, before anything walks over it."""
    graph = proto.graph
    counts = (
        ("opset entries", len(proto.opset_import), _MAX_OPSET_ENTRIES),
        ("nodes", len(graph.node), MAX_NODES),
        ("initializers", len(graph.initializer), _MAX_INITIALIZERS),
        ("inputs", len(graph.input), 1),
        ("outputs", len(graph.output), MOST_OUTPUTS),
        ("inputs of nodes", sum(len(node.input) + len(node.output) for node in graph.node), _MAX_NODE_INPUTS),
    )
    for name, count, most in counts:
        if count > most:
            yield f"the graph has {count:,} {name}; at most {most:,} are read"
    domains = [entry.domain or "ai.onnx" for entry in proto.opset_import]
    if len(set(domains)) < len(domains):  # the engines disagree on which counts
        yield "an operator set is listed twice"
    for entry in proto.opset_import:
        if entry.domain not in _DOMAINS and not 1 <= entry.version <= _MAX_DOMAIN_VERSION:
            yield f"the operator set {entry.domain!r} has the version {entry.version}"


def _input_problems(node: Any) -> Iterator[str]:
    empty = {position for position, name in enumerate(node.input) if not name}
    if empty - _MAY_BE_EMPTY.get(node.op_type, set()):
        yield f"node {node.name!r} ({node.op_type}) has no input {min(empty)}, which is required"
    if len(node.input) < _FEWEST_INPUTS.get(node.op_type, 0):
        fewest = _FEWEST_INPUTS[node.op_type]
        yield f"node {node.name!r} ({node.op_type}) has {len(node.input)} inputs; at least {fewest} are needed"


def _lies_beside(tensor: Any, model: ModelFile) -> bool:
    """Return whether the tensor is a part of the verified weights next to the file, as long as its shape says."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if entries.keys() != {"location", "offset", "length"} or not model.weights or not model.manifest.weights:
        return False
    if not (entries["offset"].isdecimal() and entries["length"].isdecimal()):
        return False
    first, length = int(entries["offset"]), int(entries["length"])
    fits = length == math.prod(tensor.dims) * _ITEM_BYTES.get(tensor.data_type, 0)
    return fits and entries["location"] == model.manifest.weights["file"] and first + length <= len(model.weights)


def _tensor_problems(tensor: Any, name: str, *, external: bool = False) -> Iterator[str]:
    if not external and (tensor.data_location or tensor.external_data):
        yield f"{name} lies in another file"
    if len(tensor.dims) > MAX_RANK or any(not 0 <= size < 2**31 for size in tensor.dims):
        yield f"{name} has the shape {list(tensor.dims)}"


def _interface_problems(graph: Any, model: ModelFile) -> Iterator[str]:
    manifest = model.manifest
    names = tuple(value.name for value in graph.output)
    if len(graph.input) != 1 or names != manifest.outputs:
        yield f"the graph has {len(graph.input)} inputs and the outputs {', '.join(names)}; the manifest says otherwise"
        return
    name, dtype, shape = _signature(graph.input[0])
    if not shape or any(len(value.type.tensor_type.shape.dim) == 0 for value in graph.output):
        yield "the input or an output has no shape"
        return
    if manifest.batch is None and not isinstance(shape[0], str):
        yield f"the batch is fixed at {shape[0]}"
    elif manifest.batch is not None and shape[0] != manifest.batch:
        yield f"the batch is {shape[0]}; the manifest says {manifest.batch}"
    rows_columns = list(manifest.preprocessing.crop)
    is_uint8 = manifest.input["dtype"] == "uint8"
    expected = (UINT8, [*rows_columns, 3]) if is_uint8 else (FLOAT, [3, *rows_columns])
    if name != manifest.input.get("name") or (dtype, shape[1:]) != expected:
        yield f"the input {name!r} has shape {shape}; the manifest says {manifest.input} of {rows_columns}"
    name, dtype, shape = _signature(graph.output[0])
    if (dtype, shape[1:]) != (FLOAT, [manifest.num_values]):
        expected_values = (
            f"an embedding of {manifest.num_values}" if manifest.is_encoder else f"{manifest.num_values} labels"
        )
        yield f"the output {name!r} has shape {shape}; the manifest has {expected_values}"


def _signature(value: Any) -> tuple[str, int, list[int | str]]:
    tensor = value.type.tensor_type
    return value.name, tensor.elem_type, [d.dim_param or d.dim_value for d in tensor.shape.dim]
