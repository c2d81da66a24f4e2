"""The part of ONNX's protobuf schema that vit-edge reads, for devices that have no onnx package.

Field numbers are those of onnx.proto (the ONNX IR specification, version 13); fields that are not listed here survive
as unknown fields. The messages live in a pool of their own, so the onnx package may be loaded as well.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

__all__ = ["FLOAT", "FLOAT16", "INT", "INT64", "INTS", "UINT8", "one_node", "parse", "property_bytes"]

# TensorProto.DataType
FLOAT, UINT8, INT64, FLOAT16 = 1, 2, 7, 10
# AttributeProto.AttributeType
INT, INTS = 2, 7

_FIELD = descriptor_pb2.FieldDescriptorProto
_SCALARS = {
    "int32": _FIELD.TYPE_INT32,
    "int64": _FIELD.TYPE_INT64,
    "uint64": _FIELD.TYPE_UINT64,
    "float": _FIELD.TYPE_FLOAT,
    "double": _FIELD.TYPE_DOUBLE,
    "string": _FIELD.TYPE_STRING,
    "bytes": _FIELD.TYPE_BYTES,
}

# message -> field -> (number, type); "*" marks a repeated field.
_SCHEMA: dict[str, dict[str, tuple[int, str]]] = {
    "StringStringEntryProto": {"key": (1, "string"), "value": (2, "string")},
    "OperatorSetIdProto": {"domain": (1, "string"), "version": (2, "int64")},
    "TensorProto": {
        "dims": (1, "int64*"),
        "data_type": (2, "int32"),
        "float_data": (4, "float*"),
        "int32_data": (5, "int32*"),
        "int64_data": (7, "int64*"),
        "name": (8, "string"),
        "raw_data": (9, "bytes"),
        "double_data": (10, "double*"),
        "uint64_data": (11, "uint64*"),
        "external_data": (13, "StringStringEntryProto*"),
        "data_location": (14, "int32"),
    },
    "Dimension": {"dim_value": (1, "int64"), "dim_param": (2, "string")},
    "TensorShapeProto": {"dim": (1, "Dimension*")},
    "TensorTypeProto": {"elem_type": (1, "int32"), "shape": (2, "TensorShapeProto")},
    "TypeProto": {"tensor_type": (1, "TensorTypeProto")},
    "ValueInfoProto": {"name": (1, "string"), "type": (2, "TypeProto")},
    "AttributeProto": {
        "name": (1, "string"),
        "i": (3, "int64"),
        "t": (5, "TensorProto"),
        "g": (6, "GraphProto"),
        "ints": (8, "int64*"),
        "graphs": (11, "GraphProto*"),
        "type": (20, "int32"),
    },
    "NodeProto": {
        "input": (1, "string*"),
        "output": (2, "string*"),
        "name": (3, "string"),
        "op_type": (4, "string"),
        "attribute": (5, "AttributeProto*"),
        "domain": (7, "string"),
    },
    "GraphProto": {
        "node": (1, "NodeProto*"),
        "name": (2, "string"),
        "initializer": (5, "TensorProto*"),
        "input": (11, "ValueInfoProto*"),
        "output": (12, "ValueInfoProto*"),
        "value_info": (13, "ValueInfoProto*"),
        "sparse_initializer": (15, "UnreadProto*"),
    },
    "UnreadProto": {},
    "ModelProto": {
        "ir_version": (1, "int64"),
        "producer_name": (2, "string"),
        "producer_version": (3, "string"),
        "graph": (7, "GraphProto"),
        "opset_import": (8, "OperatorSetIdProto*"),
        "metadata_props": (14, "StringStringEntryProto*"),
        "training_info": (20, "UnreadProto*"),
        "functions": (25, "UnreadProto*"),
    },
}


def _build() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="vit_edge/onnx.proto", package="vit_edge.onnx", syntax="proto2")
    for name, fields in _SCHEMA.items():
        entry = file.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            single = kind.removesuffix("*")
            entry.field.add(
                name=field,
                number=number,
                label=_FIELD.LABEL_REPEATED if kind != single else _FIELD.LABEL_OPTIONAL,
                type=_SCALARS.get(single, _FIELD.TYPE_MESSAGE),
                type_name=None if single in _SCALARS else f".vit_edge.onnx.{single}",
            )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("vit_edge.onnx.ModelProto"))


_ModelProto = _build()


def parse(data: bytes) -> Any:
    """Return the ModelProto in `data`; raises ValueError if the bytes are no such message, or its text is not UTF-8."""
    model = _ModelProto()
    try:
        model.ParseFromString(data)
    except (message.DecodeError, RecursionError) as error:
        raise ValueError(str(error)) from error
    _check_text(model)
    return model


def _check_text(model: Any) -> None:
    """Raise ValueError if a name is not UTF-8: protobuf accepts it and gives bytes, which every later step reads."""
    graph = model.graph
    values, entries = [*graph.input, *graph.output], [*model.metadata_props]
    for tensor in graph.initializer:
        entries += tensor.external_data
    nodes = [text for n in graph.node for text in (*n.input, *n.output, n.name, n.op_type, n.domain)]
    others = [entry.name for entry in (graph, *graph.initializer, *values)]
    properties = [text for entry in entries for text in (entry.key, entry.value)]
    domains = [model.producer_name, model.producer_version, *(entry.domain for entry in model.opset_import)]
    try:
        "".join((*nodes, *others, *properties, *domains))
    except TypeError as error:
        raise ValueError("the file holds text that is not UTF-8") from error


def one_node() -> bytes:
    """Return a serialized graph that adds its float32 input [1, 8] to itself: what any engine and device can run."""
    model = _ModelProto(ir_version=8)
    model.opset_import.add(version=17)
    model.graph.name = "one"
    model.graph.node.add(op_type="Add", name="add", input=["x", "x"], output=["y"])
    for value, name in ((model.graph.input.add(), "x"), (model.graph.output.add(), "y")):
        value.name = name
        value.type.tensor_type.elem_type = FLOAT
        for size in (1, 8):
            value.type.tensor_type.shape.dim.add(dim_value=size)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def property_bytes(key: str, value: str) -> bytes:
    """Return a serialized ModelProto that holds one metadata property and nothing else.

    Protobuf merges concatenated messages, so appending it to a model file adds the property.
    """
    model = _ModelProto()
    model.metadata_props.add(key=key, value=value)
    data: bytes = model.SerializeToString(deterministic=True)
    return data
