"""What a graph may hold before an engine sees it: the operators of image classifiers, nothing that loops or reads.

Such lists refuse the hangs, memory bombs and crashes that engines and checkers fall for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

from vit_edge.errors import ModelRejected
from vit_edge.model_file.artifact import ModelFile
from vit_edge.model_file.onnx_schema import FLOAT, FLOAT16, UINT8
from vit_edge.model_file.openvino_ir import IrModel

__all__ = ["check_graph", "check_ir"]

_ITEM_BYTES = {FLOAT: 4, FLOAT16: 2}
_MAX_NODES = 5_000
_MAX_RANK = 8
_MAX_IR, _MAX_OPSET = 13, 26
_DOMAINS = ("", "ai.onnx")
_OPERATORS = frozenset(
    [
        "Abs",
        "Add",
        "AveragePool",
        "BatchNormalization",
        "Cast",
        "Celu",
        "Clip",
        "Concat",
        "Constant",
        "Conv",
        "DequantizeLinear",
        "Div",
        "DynamicQuantizeLinear",
        "Elu",
        "Erf",
        "Exp",
        "Flatten",
        "Gather",
        "Gelu",
        "Gemm",
        "GlobalAveragePool",
        "GlobalMaxPool",
        "HardSigmoid",
        "HardSwish",
        "Identity",
        "InstanceNormalization",
        "LayerNormalization",
        "LeakyRelu",
        "Log",
        "LogSoftmax",
        "MatMul",
        "MatMulInteger",
        "Max",
        "MaxPool",
        "Min",
        "Mish",
        "Mul",
        "Neg",
        "PRelu",
        "Pad",
        "Pow",
        "QuantizeLinear",
        "Reciprocal",
        "ReduceL2",
        "ReduceMax",
        "ReduceMean",
        "ReduceMin",
        "ReduceSum",
        "Relu",
        "Reshape",
        "Selu",
        "Sigmoid",
        "Slice",
        "Softmax",
        "Softplus",
        "Softsign",
        "Split",
        "Sqrt",
        "Squeeze",
        "Sub",
        "Tanh",
        "TopK",
        "Transpose",
        "Unsqueeze",
    ]
)
# A network traced as it is (`--no-deploy-form`) asks for its batch; nothing else does.
_PLAIN_OPERATORS = frozenset(["Expand", "Shape"])
# What exporters of others leave in, arithmetic on shapes for the most part; such files are tried in a process apart.
_THIRD_PARTY_OPERATORS = _PLAIN_OPERATORS | frozenset(
    [
        "And", "ArgMax", "Ceil", "ConstantOfShape", "ConvInteger", "Cos", "Dropout", "Einsum", "Equal", "Floor",
        "Greater", "GreaterOrEqual", "GroupNormalization", "LRN", "Less", "LessOrEqual", "LpNormalization", "Mod",
        "Not", "Or", "QLinearConv", "QLinearMatMul", "Range", "ReduceProd", "ReduceSumSquare", "Resize", "Round",
        "ScatterND", "Sign", "Sin", "Size", "Sum", "Tile", "Trilu", "Where",
    ]
)  # fmt: skip
# OpenVINO's names of what its importer makes of these operators; all of its own sets ("opset1" ...), no extensions.
_IR_TYPES = frozenset(
    [
        "Abs", "Add", "AvgPool", "BatchNormInference", "Broadcast", "Ceiling", "Clamp", "Concat", "Const", "Convert",
        "ConvertLike", "Convolution", "Divide", "Elu", "Equal", "Erf", "Exp", "FakeQuantize", "Floor", "Gather", "Gelu",
        "Greater", "GroupConvolution", "HSigmoid", "HSwish", "HardSigmoid", "LRN", "Less", "Log", "LogSoftmax", "MVN",
        "MatMul", "MaxPool", "Maximum", "Minimum", "Mish", "Mod", "Multiply", "Negative", "NormalizeL2", "PReLU", "Pad",
        "Parameter", "Power", "Range", "ReLU", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum",
        "Reshape", "Result", "Round", "ScaledDotProductAttention", "Select", "Selu", "ShapeOf", "Sigmoid", "Sign",
        "Slice", "SoftMax", "Softmax", "SoftPlus", "SoftSign", "Split", "Sqrt", "SquaredDifference", "Squeeze",
        "StridedSlice", "Subtract", "Swish", "Tanh", "TopK", "Transpose", "Unsqueeze", "VariadicSplit",
    ]
)  # fmt: skip
_MORE = {"plain": _PLAIN_OPERATORS, "third-party": _THIRD_PARTY_OPERATORS}
_IR_SETS = re.compile(r"opset\d{1,2}")


def check_graph(model: ModelFile) -> None:
    """Raise ModelRejected where the graph holds anything a classifier has no need of, or contradicts its manifest."""
    is_ours = model.manifest.provenance.get("form") != "third-party"
    for problem in _problems(model.proto, model):
        again = "make the model file again with `vit-edge export`"
        reason, remedy = problem, again if is_ours else "export it again where it was made, as a plain classifier"
        raise ModelRejected("will not load the model", file=model.source, reason=reason, remedy=remedy)


def check_ir(model: IrModel) -> None:
    """Raise ModelRejected where OpenVINO's IR holds another operator than a classifier has need of."""
    layers = ElementTree.fromstring(model.xml).findall("layers/layer")  # declares nothing: looked at when it was opened
    problems = [] if len(layers) <= 4 * _MAX_NODES else [f"it has {len(layers):,} layers"]
    for layer in layers:
        kind, version = layer.get("type", ""), layer.get("version", "")
        if kind not in _IR_TYPES or not _IR_SETS.fullmatch(version) or layer.find("body") is not None:
            problems.append(f"layer {layer.get('name')!r} is {version or 'nowhere'}.{kind}, which is not allowed")
    for problem in problems:
        remedy = "make it again with `vit-edge export --format openvino`"
        raise ModelRejected("will not load the model", file=model.source, reason=problem, remedy=remedy)


def _problems(proto: Any, model: ModelFile) -> Iterator[str]:
    graph = proto.graph
    versions = {entry.domain: entry.version for entry in proto.opset_import}
    if not 3 <= proto.ir_version <= _MAX_IR:
        yield f"its IR version is {proto.ir_version}; 3 to {_MAX_IR} are read"
    if not 7 <= versions.get("", versions.get("ai.onnx", 0)) <= _MAX_OPSET:
        yield f"its opset is {versions.get('', 'not given')}; 7 to {_MAX_OPSET} are read"
    if proto.functions or proto.training_info or graph.sparse_initializer:
        yield "it holds functions, training steps or sparse weights"
    if len(graph.node) > _MAX_NODES:
        yield f"it has {len(graph.node):,} nodes; at most {_MAX_NODES:,} are read"
    allowed = _OPERATORS | _MORE.get(str(model.manifest.provenance.get("form")), frozenset())
    known = {tensor.name for tensor in graph.initializer} | {value.name for value in graph.input}
    for node in graph.node:
        if not known >= {name for name in node.input if name}:
            yield f"node {node.name!r} reads what no node before it makes"
        known |= set(node.output)
        if node.domain not in _DOMAINS or node.op_type not in allowed:
            yield f"node {node.name!r} is {node.domain or 'ai.onnx'}.{node.op_type}, which is not allowed"
        for attribute in node.attribute:
            if attribute.HasField("g") or attribute.graphs:
                yield f"node {node.name!r} holds a graph of its own"
            if attribute.HasField("t"):
                yield from _tensor_problems(attribute.t, f"a constant of node {node.name!r}")
    for tensor in graph.initializer:
        beside = model.weights is not None and _lies_beside(tensor, model)
        yield from _tensor_problems(tensor, f"tensor {tensor.name!r}", beside=beside)
    yield from _interface_problems(graph, model)


def _lies_beside(tensor: Any, model: ModelFile) -> bool:
    """Return whether the tensor is a part of the verified weights beside the file, as long as its shape says."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if entries.keys() != {"location", "offset", "length"} or not model.weights or not model.manifest.weights:
        return False
    if not (entries["offset"].isdecimal() and entries["length"].isdecimal()):
        return False
    first, length = int(entries["offset"]), int(entries["length"])
    fits = length == math.prod(tensor.dims) * _ITEM_BYTES.get(tensor.data_type, 0)
    return fits and entries["location"] == model.manifest.weights["file"] and first + length <= len(model.weights)


def _tensor_problems(tensor: Any, name: str, *, beside: bool = False) -> Iterator[str]:
    if not beside and (tensor.data_location or tensor.external_data):
        yield f"{name} lies in another file"
    if len(tensor.dims) > _MAX_RANK or any(not 0 <= size < 2**31 for size in tensor.dims):
        yield f"{name} has the shape {list(tensor.dims)}"


def _interface_problems(graph: Any, model: ModelFile) -> Iterator[str]:
    manifest = model.manifest
    names = tuple(value.name for value in graph.output)
    if len(graph.input) != 1 or names != manifest.outputs:
        yield f"it has {len(graph.input)} inputs and the outputs {', '.join(names)}; the manifest says otherwise"
        return
    name, dtype, shape = _signature(graph.input[0])
    if not shape or any(len(value.type.tensor_type.shape.dim) == 0 for value in graph.output):
        yield "its input or an output has no shape"
        return
    if manifest.batch is None and not isinstance(shape[0], str):
        yield f"its batch is fixed at {shape[0]}"
    elif manifest.batch is not None and shape[0] != manifest.batch:
        yield f"its batch is {shape[0]}; the manifest says {manifest.batch}"
    rows_columns = list(manifest.preprocessing.crop)
    is_uint8 = manifest.input["dtype"] == "uint8"
    expected = (UINT8, [*rows_columns, 3]) if is_uint8 else (FLOAT, [3, *rows_columns])
    if name != manifest.input.get("name") or (dtype, shape[1:]) != expected:
        yield f"its input {name!r} has shape {shape}; the manifest says {manifest.input} of {rows_columns}"
    name, dtype, shape = _signature(graph.output[0])
    if (dtype, shape[1:]) != (FLOAT, [len(manifest.labels)]):
        yield f"its output {name!r} has shape {shape}; the manifest has {len(manifest.labels)} labels"


def _signature(value: Any) -> tuple[str, int, list[int | str]]:
    tensor = value.type.tensor_type
    return value.name, tensor.elem_type, [d.dim_param or d.dim_value for d in tensor.shape.dim]
