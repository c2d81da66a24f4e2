"""Seeded mutations of files: of bytes, protobuf fields, JSON values, XML and pickles."""

from __future__ import annotations

import io
import json
import random
import re
import zipfile
from typing import Any

import onnx
from onnx import helper

from tests.faults.hostile_models import breaks_in_a_batch
from tests.faults.test_limits import GRAPHS

__all__ = ["change_graph", "change_json", "change_pickle", "change_text", "change_xml", "raw"]

_INTEGERS = (0, 1, -1, 2, 3, 7, 127, 128, 255, 65_536, 2**24, 2**31 - 1, 2**31, -(2**31), 2**62, -(2**63))
_TEXTS = (
    "",
    "a",
    "\x1b[31m",
    "\u202e",
    "../../etc/passwd",
    "/dev/zero",
    "x" * 100_000,
    "é",
    "\x00",
    "*/_ORT_MEM_ADDR_/*",
)
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1e308, 2**80, 0.5, float("nan"), float("inf"), "", "x", [], {}, [[]], [None], {"a": 1},
    "\ud800", "x" * 5_000, [0] * 1_000,
)  # fmt: skip
# Characters: more than any reader takes.
_MOST_COPIED = 40_000_000
# Graphs that once ended, blocked or filled the process, as changes of an onnx.ModelProto.
_CRASHERS = [change for change, _ in GRAPHS.values()] + [breaks_in_a_batch]


def raw(data: bytes, rng: random.Random) -> bytes:
    """Return bytes with one to eight flips, overwrites, cuts, insertions or copies."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        at = rng.randrange(len(found) + 1)
        length = rng.choice((1, 1, 2, 4, 8, 64, 1024))
        kind = rng.randrange(7)
        if kind == 0 and found:
            found[at % len(found)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            found[at : at + length] = rng.randbytes(min(length, len(found) - at))
        elif kind == 2:
            found[at : at + length] = rng.choice((b"\0", b"\xff", b"\x80", b"\x7f")) * min(length, len(found) - at)
        elif kind == 3:
            del found[at : at + length if rng.random() < 0.7 else None]
        elif kind == 4:
            found[at:at] = rng.randbytes(length)
        elif kind == 5:
            found[at:at] = found[at : at + length]
        else:
            width = rng.choice((1, 2, 4, 8))
            found[at : at + width] = (rng.choice(_INTEGERS) % 256**width).to_bytes(width, rng.choice(("little", "big")))
    return bytes(found)


def change_json(value: Any, rng: random.Random) -> Any:
    """Return a JSON value in which one to three fields are replaced, removed, added or copied."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 2, 3))):
        holders = [found for found in _holders(value) if found]
        if not holders:
            return rng.choice(_VALUES)
        holder = rng.choice(holders)
        key = rng.choice([*holder]) if isinstance(holder, dict) else rng.randrange(len(holder))
        kind = rng.randrange(5)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, list):
            fitting = max(1, _MOST_COPIED // len(json.dumps(holder[key])))  # the mutator has no limit of its own
            holder[key:key] = [holder[key]] * min(rng.choice((1, 5, 5_000)), fitting)
        elif kind == 2 and isinstance(holder, dict):
            holder[rng.choice(_TEXTS)] = holder[key]
        else:
            holder[key] = rng.choice((*_VALUES, *_INTEGERS, *_TEXTS))
    return value


def _holders(value: Any) -> list[Any]:
    """Return every list and object in a JSON value."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    found = [holder for entry in inside for holder in _holders(entry)]
    return [value, *found] if isinstance(value, dict | list) else found


def change_text(data: bytes, rng: random.Random) -> bytes:
    """Return JSON text with changed values, or the bytes mutated."""
    if rng.random() < 0.2:
        return raw(data, rng)
    if rng.random() < 0.03:
        return b"[" * 100_000
    return json.dumps(change_json(json.loads(data), rng)).encode()


def change_graph(model: onnx.ModelProto, rng: random.Random) -> None:
    """Change one to three fields of a model somewhere, or append what once did harm."""
    if rng.random() < 0.1:
        rng.choice(_CRASHERS)(model)
        return
    for _ in range(rng.choice((1, 1, 2, 3))):
        holder = rng.choice((model, model.graph, *_sample(model.graph, rng)))
        if isinstance(holder, onnx.NodeProto) and rng.random() < 0.2:
            holder.op_type = rng.choice(("Identity", "Relu", "Loop", "If", "MatMul", "Concat", "Tile", "Gather", "X"))
        elif isinstance(holder, onnx.NodeProto) and rng.random() < 0.2:
            holder.attribute.append(helper.make_attribute("axis", rng.choice(_INTEGERS)))
        else:
            _change_field(holder, rng)


def _sample(graph: onnx.GraphProto, rng: random.Random) -> list[Any]:
    """Return a few messages from all levels of a graph."""
    found: list[Any] = []
    for entries in (graph.node, graph.initializer, graph.input, graph.output):
        found += rng.sample(list(entries), min(2, len(entries)))
    found += [attribute for node in found if isinstance(node, onnx.NodeProto) for attribute in node.attribute]
    found += [value.type.tensor_type for value in found if isinstance(value, onnx.ValueInfoProto)]
    return found


def _change_field(holder: Any, rng: random.Random) -> None:
    fields = holder.ListFields()
    if not fields:
        return
    field, value = rng.choice(fields)
    if hasattr(value, "append") or hasattr(value, "add"):
        at = rng.randrange(len(value))
        kind = rng.randrange(3)
        if kind == 0:
            del value[at]
        elif kind == 1:
            value.extend([value[at]] * rng.choice((1, 3, 300)))
        elif not hasattr(value, "add"):
            value[at] = _like(value[at], rng)
    elif field.message_type is not None:
        holder.ClearField(field.name) if rng.random() < 0.2 else _change_field(value, rng)
    else:
        try:
            setattr(holder, field.name, _like(value, rng))
        except (TypeError, ValueError, OverflowError):  # out of the field's range: it cannot be in a file
            holder.ClearField(field.name)


def _like(value: Any, rng: random.Random) -> Any:
    if isinstance(value, bytes):
        return raw(value, rng)
    if isinstance(value, str):
        return rng.choice(_TEXTS).replace("\x00", "")
    return (
        rng.choice(_INTEGERS) if isinstance(value, int) else rng.choice((0.0, 1e30, float("nan"), float("inf"), -1.0))
    )


def change_xml(data: bytes, rng: random.Random) -> bytes:
    """Return XML in which attributes have other values, or elements are gone or twice."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        pattern = rng.choice((rb'="[^"]*"', rb"<dim>[^<]*</dim>", rb"<layer .*?</layer>", rb"<edge [^>]*>"))
        places = [found.span() for found in re.finditer(pattern, data, flags=re.DOTALL)]
        if not places:
            continue
        start, end = rng.choice(places)
        entry = data[start:end]
        number = str(rng.choice(_INTEGERS)).encode()
        if entry[:2] == b'="':
            text = rng.choice((number, b"", b"f32", b"u8", b"Parameter", b"1,-1,3", b"&#x1b;", b"../m.bin", b"Loop"))
            entry = b'="' + text + b'"'
        elif entry.startswith(b"<dim>"):
            entry = b"<dim>" + number + b"</dim>"
        else:
            entry *= rng.choice((0, 2))
        data = data[:start] + entry + data[end:]
    return data


def change_pickle(data: bytes, rng: random.Random) -> bytes:
    """Return a file of torch.save whose pickle inside is mutated, or its bytes are."""
    if rng.random() < 0.4:
        return raw(data, rng)
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(made, "w") as target:
        for entry in source.infolist():
            content = source.read(entry)
            target.writestr(entry.filename, raw(content, rng) if entry.filename.endswith(".pkl") else content)
    return made.getvalue()
