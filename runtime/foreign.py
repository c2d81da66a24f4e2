"""An ONNX classifier made elsewhere, as a model file in memory: what it does not say is told by the caller.

`vit-edge export THEIRS.onnx` does more with such a file: it frees its batch, proves its answers, and gives it golden
vectors. This needs no onnx package, changes names and axes only, and promises nothing: every engine tries the file in a
process of its own first.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import vit_edge
from vit_edge.artifact import MODEL_BYTES, Manifest, ModelFile, open_model, pack, seal_state
from vit_edge.errors import ModelRejected, UsageError, printable
from vit_edge.files import kind_of, read_file, sha256_hex
from vit_edge.image import Preprocessing
from vit_edge.onnx_schema import FLOAT, INTS, UINT8, parse

__all__ = ["adopt", "is_foreign"]

_AXES = {"NCHW": 1, "NHWC": 3}
# From the axes a graph has to those a model file has.
_TURNS = {("NCHW", UINT8): [0, 3, 1, 2], ("NHWC", FLOAT): [0, 2, 3, 1]}
_EXPORT = "make a model file of it where torch and onnx are: vit-edge export {file} --labels ... --preprocessing ..."


def is_foreign(source: str | os.PathLike[str] | bytes) -> bool:
    """Return whether nothing in `source` looks like a model file of vit-edge; raises ModelRejected on no file."""
    return seal_state(_bytes_of(source)) == "foreign"


def adopt(source: str | os.PathLike[str] | bytes, *, preprocessing: Preprocessing, labels: Sequence[str]) -> ModelFile:
    """Return the ONNX classifier in `source` under the names and axes of a model file, without golden vectors.

    It takes one float32 input, normalised as `preprocessing` says, or uint8 pixels; channels first or last. Its first
    float32 output [batch, classes] is taken for the logits, a Softmax that makes it is left out. A fixed batch stays.
    Raises ModelRejected, or UsageError where what is told does not fit.
    """
    name = "the bytes given" if isinstance(source, bytes) else printable(source)
    try:
        return _adopted(_bytes_of(source), name, preprocessing, tuple(labels))
    except (ModelRejected, UsageError) as error:
        error.file = error.file or name
        error.remedy = error.remedy.replace("{file}", name)
        raise


def _bytes_of(source: str | os.PathLike[str] | bytes) -> bytes:
    if isinstance(source, bytes):
        return source
    return read_file(source, what="model file", max_bytes=MODEL_BYTES, error=ModelRejected)


def _adopted(data: bytes, name: str, preprocessing: Preprocessing, labels: tuple[str, ...]) -> ModelFile:
    try:
        proto = parse(data)
    except ValueError as error:
        kind = kind_of(data) or ("it is not an ONNX model", "give an ONNX file")
        raise _rejected(*kind) from error
    if not proto.graph.node:
        raise _rejected(*(kind_of(data) or ("it is not an ONNX model", "give an ONNX file")))
    graph = proto.graph
    if any(tensor.external_data for tensor in graph.initializer):
        raise _rejected("its weights lie in a file beside it, which is read only of files made by vit-edge", _EXPORT)
    producer = proto.producer_name
    entry = _set_input(graph, preprocessing)
    _set_output(graph, len(labels), entry.get("batch"))
    proto.producer_name, proto.producer_version = "vit-edge", vit_edge.__version__
    del graph.value_info[:]  # what was said of shapes between; engines find them again
    manifest = Manifest(
        name=printable(Path(name).stem),
        architecture={"family": "onnx", "producer": producer},
        preprocessing=preprocessing,
        labels=labels,
        precision="int8" if any(node.op_type == "DequantizeLinear" for node in graph.node) else "float32",
        input=entry,
        provenance={"form": "elsewhere", "source_sha256": sha256_hex(data), "vit_edge": vit_edge.__version__},
    )
    return replace(open_model(pack(proto.SerializeToString(deterministic=True), manifest), warn=False), source=name)


def _set_input(graph: Any, preprocessing: Preprocessing) -> dict[str, Any]:
    """Give the graph the input of a model file, its name kept; returns the manifest's entry."""
    constants = {tensor.name for tensor in graph.initializer}
    values = [value for value in graph.input if value.name not in constants]
    if len(values) != 1:
        names = ", ".join(repr(value.name) for value in values)
        raise _rejected(f"it has {len(values)} inputs ({names}); a classifier has one", _EXPORT)
    value = values[0]
    tensor = value.type.tensor_type
    sizes = [dim.dim_value for dim in tensor.shape.dim]
    if tensor.elem_type not in (FLOAT, UINT8) or len(sizes) != 4:
        reason = f"its input {value.name!r} has {len(sizes)} axes of type {tensor.elem_type}; float32 or uint8 pictures"
        raise _rejected(f"{reason} are read", _EXPORT)
    layout = _layout(sizes)
    height, width = preprocessing.crop
    found = sizes[2:] if layout == "NCHW" else sizes[1:3]
    if any(size not in (0, told) for size, told in zip(found, (height, width), strict=True)):
        shape = " x ".join(str(size or "?") for size in found)
        reason = f"it takes {shape} pixels; the preprocessing gives {height} x {width}"
        raise UsageError("cannot load", reason=reason, remedy="give the crop that it was trained with")
    _turn(graph, value.name, layout, tensor.elem_type)
    is_uint8 = tensor.elem_type == UINT8
    _set_shape(tensor, [sizes[0] or "batch", *([height, width, 3] if is_uint8 else [3, height, width])])
    entry = type(value).FromString(value.SerializeToString())  # what a list held is gone with it
    if entry.name == "logits":  # the output's name here
        entry.name = "logits.input"
        for node in graph.node:
            node.input[:] = [entry.name if read == "logits" else read for read in node.input]
    del graph.input[:]
    graph.input.append(entry)
    fixed = {"batch": sizes[0]} if sizes[0] else {}
    dtype, axes = ("uint8", "NHWC") if is_uint8 else ("float32", "NCHW")
    return {"name": entry.name, "dtype": dtype, "layout": axes, **fixed}


def _layout(sizes: Sequence[int]) -> str:
    sure = [name for name, axis in _AXES.items() if sizes[axis] == 3]
    if len(sure) != 1:
        shape = ", ".join(str(size or "?") for size in sizes)
        reason = f"its input [{shape}] does not show where its 3 channels are"
        raise _rejected(reason, f"{_EXPORT} --layout NCHW")
    return sure[0]


def _turn(graph: Any, name: str, layout: str, dtype: int) -> None:
    """Put a Transpose behind the input where its axes are in another order than a model file's."""
    order = _TURNS.get((layout, dtype))
    if order is None:
        return
    turned = f"{name}.{layout}"
    for node in graph.node:
        node.input[:] = [turned if read == name else read for read in node.input]
    first = type(graph.node[0])(input=[name], output=[turned], name=turned, op_type="Transpose")
    first.attribute.add(name="perm", ints=order, type=INTS)
    graph.node.insert(0, first)


def _set_output(graph: Any, num_labels: int, batch: int | None) -> None:
    """Leave the graph one output, `logits` [batch, classes]."""
    shapes = {value.name: _shape(value) for value in graph.output}
    fitting = [name for name, (dtype, sizes) in shapes.items() if dtype == FLOAT and len(sizes) == 2]
    fitting.sort(key=lambda name: shapes[name][1][1] != num_labels)  # several may have two axes
    if not fitting:
        raise _rejected(f"no output of {', '.join(shapes)} is float32 [batch, classes]", _EXPORT)
    name = fitting[0]
    num_classes = shapes[name][1][1]
    if num_classes not in (0, num_labels):
        reason = f"{num_labels} labels for {num_classes} classes"
        raise UsageError("cannot load", reason=reason, remedy="give one label for each class, in order")
    name = _before_softmax(graph, name)
    if name != "logits":
        _rename(graph, "logits", "logits.inner")
        _rename(graph, name, "logits")
    del graph.output[:]
    value = graph.output.add(name="logits")
    value.type.tensor_type.elem_type = FLOAT
    _set_shape(value.type.tensor_type, [batch or "batch", num_labels])
    _prune(graph)


def _before_softmax(graph: Any, name: str) -> str:
    maker = next((node for node in graph.node if name in node.output), None)
    if maker is None or maker.op_type != "Softmax":
        return name
    axis = next((attribute.i for attribute in maker.attribute if attribute.name == "axis"), -1)
    return str(maker.input[0]) if axis in (-1, 1) else name


def _rename(graph: Any, old: str, new: str) -> None:
    for node in graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]
    for tensor in graph.initializer:
        tensor.name = new if tensor.name == old else tensor.name


def _prune(graph: Any) -> None:
    """Drop the nodes that the logits do not need."""
    needed, kept = {"logits"}, []
    for node in reversed(graph.node):
        if needed & set(node.output):
            needed |= set(node.input)
            kept.append(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))


def _shape(value: Any) -> tuple[int, list[int]]:
    tensor = value.type.tensor_type
    return tensor.elem_type, [dim.dim_value for dim in tensor.shape.dim]


def _set_shape(tensor: Any, sizes: Sequence[int | str]) -> None:
    del tensor.shape.dim[:]
    for size in sizes:
        tensor.shape.dim.add(**({"dim_param": size} if isinstance(size, str) else {"dim_value": size}))


def _rejected(reason: str, remedy: str) -> ModelRejected:
    return ModelRejected("cannot load", reason=reason, remedy=remedy)
