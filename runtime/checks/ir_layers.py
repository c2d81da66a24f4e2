"""What OpenVINO's IR may hold before the engine sees it: the layers of image classifiers, and only so much of each.

The sizes are those that the file declares. If a file declares other sizes than OpenVINO infers, the limits of the
sandbox hold for it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from xml.etree import ElementTree

from vit_edge.errors import ModelRejected
from vit_edge.model_file.artifact import MOST_OUTPUTS
from vit_edge.model_file.openvino_ir import IrModel
from vit_edge.runtime.checks.operators import MAX_NODES, MAX_RANK, MAX_TENSOR_VALUES

__all__ = ["check_ir"]

# A node of ONNX becomes up to four layers: constants and conversions are layers too.
_MAX_LAYERS = 4 * MAX_NODES
# A network of two blocks has 140 layers and 161 edges: most layers have one or two inputs.
_MAX_EDGES = 2 * _MAX_LAYERS
# A Concat or Split of an unrolled attention has some hundred.
_MAX_PORTS = 1_000
# OpenVINO's names of what its importer makes of the allowed operators; all of its own sets, no extensions.
_TYPES = frozenset(
    [
        "Abs", "Add", "AvgPool", "BatchNormInference", "Broadcast", "Ceiling", "Clamp", "Concat", "Const", "Convert",
        "ConvertLike", "Convolution", "Divide", "Elu", "Equal", "Erf", "Exp", "FakeQuantize", "Floor", "Gather", "Gelu",
        "Greater", "GroupConvolution", "HSigmoid", "HSwish", "HardSigmoid", "IsNaN", "LRN", "Less", "Log", "LogSoftmax",
        "MVN", "MatMul", "MaxPool", "Maximum", "Minimum", "Mish", "Mod", "Multiply", "Negative", "NormalizeL2", "PReLU",
        "Pad", "Parameter", "Power", "Range", "ReLU", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum",
        "Reshape", "Result", "Round", "ScaledDotProductAttention", "Select", "Selu", "ShapeOf", "Sigmoid", "Sign",
        "Slice", "SoftMax", "Softmax", "SoftPlus", "SoftSign", "Split", "Sqrt", "SquaredDifference", "Squeeze",
        "StridedSlice", "Subtract", "Swish", "Tanh", "TopK", "Transpose", "Unsqueeze", "VariadicSplit",
    ]
)  # fmt: skip
_SETS = re.compile(r"opset\d{1,2}")
# Bits of one value of a constant, by OpenVINO's name of the type.
_BITS = {
    "boolean": 8, "u1": 1, "u4": 4, "i4": 4, "u8": 8, "i8": 8, "u16": 16, "i16": 16, "f16": 16, "bf16": 16, "u32": 32,
    "i32": 32, "f32": 32, "u64": 64, "i64": 64, "f64": 64,
}  # fmt: skip
# Longer texts are no numbers of a shape or an offset; int() is slow on them.
_NUMBER = re.compile(r"-?\d{1,18}")


def check_ir(model: IrModel) -> None:
    """Raise ModelRejected if OpenVINO's IR holds another layer than a classifier needs, or too much of anything."""
    for problem in _problems(model):
        remedy = "make it again with `vit-edge export --format openvino`"
        raise ModelRejected("cannot load the model", file=model.source, reason=problem, remedy=remedy)


def _problems(model: IrModel) -> Iterator[str]:
    network = ElementTree.fromstring(model.xml)  # declares nothing: looked at when it was opened
    layers = network.findall("layers/layer")
    kinds = [layer.get("type", "") for layer in layers]
    counts = (
        ("layers", len(layers), _MAX_LAYERS),
        ("edges", len(network.findall("edges/edge")), _MAX_EDGES),
        ("inputs", kinds.count("Parameter"), 1),
        ("outputs", kinds.count("Result"), MOST_OUTPUTS),
    )
    for what, count, most in counts:
        if count > most:
            yield f"the IR has {count:,} {what}; at most {most:,} are read"
    for layer, kind in zip(layers, kinds, strict=True):
        version = layer.get("version", "")
        if kind not in _TYPES or not _SETS.fullmatch(version) or layer.find("body") is not None:
            yield f"layer {layer.get('name')!r} is {version or 'nowhere'}.{kind}, which is not allowed"
        yield from _port_problems(layer)
        if kind == "Const":
            yield from _constant_problems(layer, len(model.weights))


def _port_problems(layer: ElementTree.Element) -> Iterator[str]:
    name, ports = layer.get("name"), [*layer.findall("input/port"), *layer.findall("output/port")]
    if len(ports) > _MAX_PORTS:
        yield f"layer {name!r} has {len(ports):,} ports; at most {_MAX_PORTS:,} are read"
    for port in ports:
        texts = [(entry.text or "").strip() for entry in port.findall("dim")]
        if len(texts) > MAX_RANK or not all(_NUMBER.fullmatch(text) for text in texts):
            yield f"layer {name!r} has a port of the shape {texts}"
            continue
        # One image: -1 is the batch.
        values = math.prod(max(int(text), 1) for text in texts)
        if values > MAX_TENSOR_VALUES:
            yield (
                f"layer {name!r} ({layer.get('type')}) has a port of {values:,} values for one image; "
                f"at most {MAX_TENSOR_VALUES:,} are allowed"
            )


def _constant_problems(layer: ElementTree.Element, num_bytes: int) -> Iterator[str]:
    """Yield what is wrong with the place of a constant in the weights: engines read it without a copy."""
    data = layer.find("data")
    fields = {} if data is None else data.attrib
    shape = [text.strip() for text in fields.get("shape", "").split(",") if text.strip()]
    texts = [fields.get("offset", ""), fields.get("size", ""), *shape]
    bits = _BITS.get(fields.get("element_type", ""))
    if bits is None or not all(_NUMBER.fullmatch(text) for text in texts):
        yield f"the constant {layer.get('name')!r} is of no known type, place or shape"
        return
    offset, size, *sizes = map(int, texts)
    if min(offset, size, *sizes) < 0 or offset + size > num_bytes or size != -(-math.prod(sizes) * bits // 8):
        yield f"the constant {layer.get('name')!r} has {size} bytes at {offset} for the shape {sizes}, in {num_bytes}"
