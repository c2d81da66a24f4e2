"""Read a third-party ONNX classifier as a model file in memory; the caller gives its preprocessing and labels.

`vit-edge export` does more with such a file: it makes the batch dynamic, compares the logits and adds golden vectors.
The runtime has no onnx package, changes names, types and axes at both ends only, and runs the file in a sandbox first.
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
from vit_edge.model_file.onnx_schema import FLOAT, FLOAT16, parse
from vit_edge.model_file.tasks import binary_labels, settled_task
from vit_edge.runtime.onnx_import.external_weights import take_in_weights
from vit_edge.runtime.onnx_import.head import (
    Output,
    add_zero_logit,
    check_labels,
    drop_activation,
    one_value,
    set_output,
    settled_activation,
)
from vit_edge.runtime.onnx_import.interface import IMPORT, read_input, rejected, set_input

__all__ = ["is_third_party", "parsed", "read_third_party"]

_INTEGERS = ("ConvInteger", "DequantizeLinear", "MatMulInteger", "QLinearConv", "QLinearMatMul")


def is_third_party(source: str | os.PathLike[str] | bytes) -> bool:
    """Return whether nothing in `source` looks like a model file of vit-edge; raises ModelRejected on no file."""
    return seal_state(_bytes_of(source)) == "third-party"


def read_third_party(
    source: str | os.PathLike[str] | bytes, *, preprocessing: Preprocessing, labels: Sequence[str]
) -> ModelFile:
    """Return the ONNX classifier in `source` with the names and axes of a model file, without golden vectors.

    The input is float32 or float16, normalised as `preprocessing` sets it, or uint8 pixels; channels first or last. The
    logits are the first output [batch, classes] of floats with one class for each label; a Softmax or Sigmoid that
    makes them is left out, and becomes the manifest's activation. A fixed batch size stays. Weights in files next to
    the model are read. Raises ModelRejected, or UsageError if preprocessing or labels do not fit.
    """
    name = "the bytes given" if isinstance(source, bytes) else printable(source)
    try:
        return _read(source, name, preprocessing, tuple(labels))
    except (ModelRejected, UsageError) as error:
        error.file = error.file or name
        error.remedy = error.remedy.replace("{file}", name)
        raise


def _bytes_of(source: str | os.PathLike[str] | bytes) -> bytes:
    if isinstance(source, bytes):
        return source
    return read_file(source, what="model file", max_bytes=MODEL_BYTES, error=ModelRejected)


def _read(
    source: str | os.PathLike[str] | bytes, name: str, preprocessing: Preprocessing, labels: tuple[str, ...]
) -> ModelFile:
    data = _bytes_of(source)
    proto = parsed(data)
    graph = proto.graph
    weights = take_in_weights(proto, source)
    producer, precision = proto.producer_name, _precision(graph)
    entry = read_input(graph, preprocessing)
    output = _output(graph, len(labels))
    found = drop_activation(graph, output.name, rank=output.rank)
    activation, task = settled_activation(None, found), settled_task(None, found, output.num_classes)
    if task is None:
        raise one_value()
    fields = set_input(graph, entry, preprocessing, entry.batch_size)
    set_output(graph, output, entry.batch_size)
    if task == "binary":
        add_zero_logit(graph)
    proto.producer_name, proto.producer_version = "vit-edge", vit_edge.__version__
    del graph.value_info[:]  # shapes of the tensors between; engines find them again
    more = {"source_weights_sha256": weights} if weights else {}
    manifest = Manifest(
        name=printable(Path(name).stem),
        architecture={"family": "onnx", "producer": producer},
        preprocessing=preprocessing,
        labels=binary_labels(labels) if task == "binary" else labels,
        precision=precision,
        input=fields,
        activation="softmax" if task == "binary" else activation,
        task=task,
        provenance={
            "form": "third-party",
            "source_sha256": sha256_hex(data),
            "vit_edge": vit_edge.__version__,
            **more,
        },
    )
    return replace(ModelFile.from_graph(proto, manifest), source=name, is_third_party=True)


def parsed(data: bytes) -> Any:
    """Return the ModelProto in `data`; raises ModelRejected with what the bytes are instead."""
    kind = kind_of(data) or ("the file is not an ONNX model", "give an ONNX file")
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


def _output(graph: Any, num_labels: int) -> Output:
    """Return the first output [batch, classes] of floats; among several, the first with as many classes as labels."""
    shapes = {value.name: _shape(value) for value in graph.output}
    floats = {name: sizes for name, (dtype, sizes) in shapes.items() if dtype in (FLOAT, FLOAT16)}
    fitting = [name for name, sizes in floats.items() if len(sizes) >= 2 and set(sizes[2:]) <= {1}]
    fitting.sort(key=lambda name: floats[name][1] != num_labels)  # a stable sort
    if len(shapes) == 1 and [] in floats.values():  # no shape is declared: the trial in the sandbox shows it
        fitting = list(floats)
    if not fitting:
        raise rejected(f"no output of {', '.join(shapes)} is float32 or float16 [batch, classes]", IMPORT)
    dtype, sizes = shapes[fitting[0]]
    num_values = (sizes[1] if sizes else 0) or num_labels
    check_labels(num_values, num_labels)
    return Output(
        name=fitting[0],
        rank=len(sizes) or 2,
        num_classes=num_values,
        dtype="float16" if dtype == FLOAT16 else "float32",
    )


def _shape(value: Any) -> tuple[int, list[int]]:
    tensor = value.type.tensor_type
    return tensor.elem_type, [dim.dim_value for dim in tensor.shape.dim]
