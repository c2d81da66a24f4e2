"""An ONNX classifier made elsewhere, as a model file in memory: what it does not say is told by the caller.

`vit-edge export THEIRS.onnx` does more with such a file: it frees its batch, proves its answers, and gives it golden
vectors. This needs no onnx package, changes names, types and axes at both ends only, and promises nothing: every engine
tries the file in a process of its own first.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import vit_edge
from vit_edge.errors import ModelRejected, UsageError, printable
from vit_edge.files import kind_of, read_file, sha256_hex
from vit_edge.image import Preprocessing
from vit_edge.model_file.artifact import MODEL_BYTES, Manifest, ModelFile, seal_state
from vit_edge.model_file.onnx_schema import FLOAT, FLOAT16, INT, parse
from vit_edge.runtime.onnx_import.external_weights import take_in_weights
from vit_edge.runtime.onnx_import.interface import EXPORT, rejected, set_input, set_shape

__all__ = ["adopt", "is_third_party"]

_INTEGERS = ("ConvInteger", "DequantizeLinear", "MatMulInteger", "QLinearConv", "QLinearMatMul")


def is_third_party(source: str | os.PathLike[str] | bytes) -> bool:
    """Return whether nothing in `source` looks like a model file of vit-edge; raises ModelRejected on no file."""
    return seal_state(_bytes_of(source)) == "third-party"


def adopt(source: str | os.PathLike[str] | bytes, *, preprocessing: Preprocessing, labels: Sequence[str]) -> ModelFile:
    """Return the ONNX classifier in `source` under the names and axes of a model file, without golden vectors.

    It takes one input, float32 or float16 normalised as `preprocessing` says, or uint8 pixels; channels first or last.
    Its first output [batch, classes] of floats, of as many classes as there are labels, is taken for the logits, a
    Softmax that makes it is left out. A fixed batch stays. Weights in files beside it are read. Raises ModelRejected,
    or UsageError where what is told does not fit.
    """
    name = "the bytes given" if isinstance(source, bytes) else printable(source)
    try:
        return _adopted(source, name, preprocessing, tuple(labels))
    except (ModelRejected, UsageError) as error:
        error.file = error.file or name
        error.remedy = error.remedy.replace("{file}", name)
        raise


def _bytes_of(source: str | os.PathLike[str] | bytes) -> bytes:
    if isinstance(source, bytes):
        return source
    return read_file(source, what="model file", max_bytes=MODEL_BYTES, error=ModelRejected)


def _adopted(
    source: str | os.PathLike[str] | bytes, name: str, preprocessing: Preprocessing, labels: tuple[str, ...]
) -> ModelFile:
    data = _bytes_of(source)
    proto = _parsed(data)
    graph = proto.graph
    beside = take_in_weights(proto, source)
    producer, precision = proto.producer_name, _precision(graph)
    entry = set_input(graph, preprocessing)
    _set_output(graph, len(labels), entry.get("batch"))
    proto.producer_name, proto.producer_version = "vit-edge", vit_edge.__version__
    del graph.value_info[:]  # what was said of shapes between; engines find them again
    more = {"source_weights_sha256": beside} if beside else {}
    manifest = Manifest(
        name=printable(Path(name).stem),
        architecture={"family": "onnx", "producer": producer},
        preprocessing=preprocessing,
        labels=labels,
        precision=precision,
        input=entry,
        provenance={
            "form": "elsewhere",
            "source_sha256": sha256_hex(data),
            "vit_edge": vit_edge.__version__,
            **more,
        },
    )
    return replace(ModelFile.from_graph(proto, manifest), source=name, is_third_party=True)


def _parsed(data: bytes) -> Any:
    kind = kind_of(data) or ("it is not an ONNX model", "give an ONNX file")
    try:
        proto = parse(data)
    except ValueError as error:
        raise rejected(*kind) from error
    if not proto.graph.node:
        raise rejected(*kind)
    return proto


def _precision(graph: Any) -> Literal["float32", "float16", "int8"]:
    if any(node.op_type in _INTEGERS for node in graph.node):
        return "int8"
    return "float16" if any(tensor.data_type == FLOAT16 for tensor in graph.initializer) else "float32"


def _set_output(graph: Any, num_labels: int, batch: int | None) -> None:
    """Leave the graph one output, `logits` [batch, classes]."""
    shapes = {value.name: _shape(value) for value in graph.output}
    floats = {name: sizes for name, (dtype, sizes) in shapes.items() if dtype in (FLOAT, FLOAT16)}
    fitting = [name for name, sizes in floats.items() if len(sizes) == 2]
    fitting.sort(key=lambda name: floats[name][1] != num_labels)  # several may have two axes
    if len(shapes) == 1 and [] in floats.values():  # no shape is said: the process that tries the file will see it
        fitting = list(floats)
    if not fitting:
        raise rejected(f"no output of {', '.join(shapes)} is float32 or float16 [batch, classes]", EXPORT)
    name = fitting[0]
    dtype, sizes = shapes[name]
    num_classes = sizes[1] if sizes else 0
    if num_classes not in (0, num_labels):
        reason = f"{num_labels} labels for {num_classes} classes"
        raise UsageError("cannot load", reason=reason, remedy="give one label for each class, in order")
    name = _before_softmax(graph, name)
    if dtype == FLOAT16:
        name = _widened(graph, name)
    if name != "logits":
        _rename(graph, "logits", "logits.inner")
        _rename(graph, name, "logits")
    del graph.output[:]
    value = graph.output.add(name="logits")
    value.type.tensor_type.elem_type = FLOAT
    set_shape(value.type.tensor_type, [batch or "batch", num_labels])
    _prune(graph)


def _widened(graph: Any, name: str) -> str:
    """Put a Cast to float32 behind a tensor; returns the name of what it makes."""
    node = graph.node.add(input=[name], output=[f"{name}.float32"], name=f"{name}.float32", op_type="Cast")
    node.attribute.add(name="to", i=FLOAT, type=INT)
    return f"{name}.float32"


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
