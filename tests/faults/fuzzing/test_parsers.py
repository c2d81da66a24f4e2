"""Hypothesis on the parsers: any bytes are parsed or refused by the parser's own error, whatever they are."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vit_edge.errors import CheckpointRejected, ImageRejected, ModelRejected, NotTrusted
from vit_edge.image import decode
from vit_edge.model_file.artifact import Manifest, open_model, property_bytes, seal
from vit_edge.model_file.fields import check_fields
from vit_edge.model_file.onnx_schema import one_node, parse
from vit_edge.tensor_file import read_tensors

NAMES = st.sampled_from(["a", "b", "c"]) | st.text(max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(NAMES, inside, max_size=3),
    max_leaves=12,
)
FIELDS = st.sampled_from(["schema", "name", "labels", "preprocessing", "golden", "input", "outputs", "weights", "macs"])


@settings(max_examples=200, deadline=None)
@given(head=st.sampled_from([b"", one_node()[:20], one_node()]), data=st.binary(max_size=300))
def test_bytes_are_a_protobuf_message_or_a_value_error(head: bytes, data: bytes) -> None:
    with contextlib.suppress(ValueError):
        parse(head + data)


@settings(max_examples=200, deadline=None)
@given(head=st.sampled_from([b"", one_node()]), data=st.binary(max_size=300), is_sealed=st.booleans())
def test_bytes_are_a_model_file_or_refused(head: bytes, data: bytes, is_sealed: bool) -> None:
    with pytest.raises((ModelRejected, NotTrusted)):
        open_model(seal(head + data) if is_sealed else head + data)


@settings(max_examples=200, deadline=None)
@given(fields=st.dictionaries(FIELDS, JSON, max_size=9))
def test_a_manifest_is_whole_or_a_value_error(fields: dict[str, Any]) -> None:
    import json

    with contextlib.suppress(ValueError):
        Manifest.from_json(json.dumps(fields))
    body = one_node() + property_bytes("vit_edge.manifest", json.dumps(fields))
    with contextlib.suppress(ModelRejected, NotTrusted):
        open_model(seal(body), warn=False)


@settings(max_examples=150, deadline=None)
@given(size=st.integers(0, 2**64 - 1) | st.integers(0, 60), header=JSON, data=st.binary(max_size=60))
def test_bytes_are_tensors_or_refused(size: int, header: Any, data: bytes) -> None:
    import json

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        path.write_bytes(size.to_bytes(8, "little") + json.dumps(header).encode() + data)
        with pytest.raises(CheckpointRejected):
            read_tensors(path, key="vit_edge.checkpoint")


@settings(max_examples=150, deadline=None)
@given(
    head=st.sampled_from(
        [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"RIFF\x00\x00\x00\x00WEBPVP8X", b"BM", b"II*\0"]
    ),
    data=st.binary(max_size=300),
)
def test_bytes_are_an_image_or_refused(head: bytes, data: bytes) -> None:
    with contextlib.suppress(ImageRejected):
        assert decode(head + data).mode == "RGB"


@settings(max_examples=200, deadline=None)
@given(value=JSON)
def test_a_value_has_the_shape_or_the_error_names_the_field(value: Any) -> None:
    shape = {"a": str, "b?": [int], "c?": {str: bool}}
    is_right = (
        isinstance(value, dict)
        and isinstance(value.get("a"), str)
        and isinstance(value.get("b", []), list)
        and all(type(entry) is int for entry in value.get("b", []))
        and isinstance(value.get("c", {}), dict)
        and all(type(entry) is bool for entry in value.get("c", {}).values())
    )
    with contextlib.nullcontext() if is_right else pytest.raises(ValueError, match=r"^record"):
        check_fields(value, shape, path="record")
