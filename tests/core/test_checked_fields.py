"""Fields from outside that contradict each other, or are of another kind: each is named by the error."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vit_edge.errors import ModelRejected, NotTrusted
from vit_edge.image import Preprocessing
from vit_edge.model_file.artifact import Manifest, open_model, seal
from vit_edge.model_file.onnx_schema import one_node, parse
from vit_edge.model_file.openvino_ir import NO_SEAL, open_ir, seal_ir
from vit_edge.model_file.weights import checked_weights, weights_entry
from vit_edge.runtime.checks.golden import Tolerance, differences, top2_gap

MANIFEST = Manifest(
    name="m", architecture={}, preprocessing=Preprocessing(resize=8, crop=(8, 8)), labels=("cat", "dog"),
    precision="float32", provenance={},
)  # fmt: skip
FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "kind": ({"name": 5}, "the manifest's name is int"),
    "precision": ({"precision": "int3"}, "precision is 'int3'"),
    "input": ({"input": {"name": "x", "dtype": "uint8", "layout": "NCHW"}}, "neither uint8 NHWC nor float32 NCHW"),
    "batch": ({"input": {"name": "x", "dtype": "uint8", "layout": "NHWC", "batch": 0}}, "the manifest's batch is 0"),
    "outputs": ({"outputs": ["top5"]}, "the first is 'logits'"),
    "outputs of another kind": ({"outputs": ["logits", "tokens"]}, "the manifest's outputs are"),
    "labels": ({"labels": ["cat", 5]}, "a classifier has a list of texts"),
    "labels of an encoder": ({"outputs": ["embedding"], "embedding": {"width": 4}}, "an encoder none"),
    "assumed": ({"assumed": [5]}, "is not a list of texts"),
    "list": ({"labels": "cat"}, "the manifest's labels are not a list"),
    "weights": ({"weights": {"file": "../a"}}, "not in a file of the same folder"),
    "form": ({"provenance": {"form": []}}, "the manifest's form is list"),
    "macs": ({"macs": {"int8": -1}}, "multiply-accumulates are"),
    "images": ({"quantization": {"images": [5]}}, "not a list of hashes"),
    "half a character": ({"name": "\ud800"}, "surrogates not allowed"),
    "schema": ({"schema": True - 1}, "schema is 0, not a positive integer"),
    "newer schema": ({"schema": 99}, "this vit-edge reads up to"),
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_of_the_manifest_is_named(field: str) -> None:
    changes, reason = FIELDS[field]
    with pytest.raises(ValueError, match=re.escape(reason)):
        Manifest.from_json(json.dumps({**json.loads(MANIFEST.to_json()), **changes}))


def test_a_manifest_that_is_nested_without_end_is_refused() -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        Manifest.from_json("[" * 100_000)


def test_a_manifest_that_is_too_large_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(ValueError, match="33,554,433 characters; at most 33,554,432 are read"):
        Manifest.from_json("[" * (2**25 + 1))


PREPROCESSINGS: dict[str, tuple[dict[str, Any], str]] = {
    "no pixels": ({"crop": (0, 8)}, "must be positive pixel counts"),
    "crop": ({"crop": (9, 8)}, "larger than the image resized"),
    "fraction": ({"resize": (8.5, 8)}, "must be whole numbers"),
    "side": ({"resize": 100_000}, "must be whole numbers up to"),
    "pixels": ({"resize": (60_000, 60_000)}, "must be whole numbers up to|makes over"),
    "keep_ratio": ({"keep_ratio": True}, "needs a resize of"),
    "crop_rounding": ({"crop_rounding": "up"}, "choose half-even or floor"),
    "interpolation": ({"interpolation": "wavelet"}, "wavelet"),
    "mean": ({"mean": (0.5, 0.5)}, "mean"),
    "std": ({"std": (0.0, 1.0, 1.0)}, "std"),
}


@pytest.mark.parametrize("field", PREPROCESSINGS)
def test_a_field_of_the_preprocessing_is_named(field: str) -> None:
    changes, reason = PREPROCESSINGS[field]
    with pytest.raises(ValueError, match=reason):
        Preprocessing(**{"resize": 8, "crop": (8, 8), **changes})


@pytest.mark.parametrize(
    ("bounds", "reason"),
    [({"absolute": "x"}, "not a number"), ({"spread": 1e12}, "not a number"), ({}, "needs a bound")],
)
def test_a_tolerance_that_bounds_nothing_is_refused(bounds: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Tolerance(**bounds)


def test_each_bound_that_is_broken_is_a_sentence() -> None:
    expected = np.array([[3.0, 1.0, 0.0]], np.float32)
    tolerance = Tolerance(absolute=0.1, sqnr_db=30.0, top1_gap=0.5)
    assert differences(expected, expected + np.float32(0.01), tolerance) == []
    assert differences(expected, expected[:, :2], tolerance) == ["the values have shape [1, 2], not [1, 3]"]
    assert differences(expected, expected * np.nan, tolerance) == ["not every value is finite"]
    off, noise, answer = differences(expected, expected[:, ::-1], tolerance)
    assert off == "a value is off by 3, more than 0.1"
    assert noise.startswith("SQNR is -")
    assert answer == "1 clear answers changed"
    assert top2_gap(expected[:, :1]).tolist() == [np.inf]


@pytest.mark.parametrize("place", ["name of a node", "input of a node", "property"])
def test_text_that_is_not_utf8_is_no_graph(place: str) -> None:
    old = {"name of a node": b"add", "input of a node": b"\x0a\x01x", "property": b"key"}[place]
    new = {"name of a node": b"a\xfbd", "input of a node": b"\x0a\x01\xfb", "property": b"k\xfby"}[place]
    data = one_node() + b"\x72\x08\x0a\x03key\x12\x01v"
    assert parse(data).metadata_props[0].key == "key"
    assert old in data
    with pytest.raises(ValueError, match="text that is not UTF-8"):
        parse(data.replace(old, new, 1))
    with pytest.raises(ModelRejected, match="not UTF-8"):
        open_model(seal(data.replace(old, new, 1)))


def test_weights_next_to_a_model_are_those_that_were_sealed(tmp_path: Path) -> None:
    entry = weights_entry("m.onnx.data", b"weights")
    (tmp_path / "m.onnx.data").write_bytes(b"weights")
    assert checked_weights(entry, None, "m.onnx", place=tmp_path / "m.onnx") == b"weights"
    assert checked_weights(entry, b"weights", "m.onnx", place=None) == b"weights"
    assert checked_weights(entry, b"others!", "m.onnx", place=None, check=False) == b"others!"
    with pytest.raises(ModelRejected, match="which was not given"):
        checked_weights(entry, None, "m.onnx", place=None)
    with pytest.raises(NotTrusted, match=r"m\.onnx\.data is not the file that was sealed"):
        checked_weights(entry, b"others!", "m.onnx", place=None)


def ir(inside: str, seals: int = 1) -> bytes:
    seal_lines = f'<seal value="{NO_SEAL}" />' * seals
    return f"<net><rt_info><vit_edge>{seal_lines}{inside}</vit_edge></rt_info></net>".encode()


def test_an_ir_is_sealed_with_its_weights_and_holds_a_manifest() -> None:
    for given, error, reason in (
        (b"<net></net>", ModelRejected, "no OpenVINO IR made by vit-edge"),
        (b"", ModelRejected, "the file is empty"),
        (ir("", seals=2), NotTrusted, "not those that were sealed"),
        (ir(""), NotTrusted, "not those that were sealed"),
        (seal_ir(ir(""), b"w"), ModelRejected, "a seal but no manifest"),
        (seal_ir(ir("<manifest />"), b"w"), ModelRejected, "cannot|value"),
        (seal_ir(ir("<!-- a -->"), b"w"), ModelRejected, "declares entities"),
        (seal_ir(ir("<"), b"w"), ModelRejected, "not well-formed|invalid|cannot"),
    ):
        with pytest.raises(error, match=reason):
            open_ir(given, weights=b"w")
    with pytest.raises(ModelRejected, match="the weights are not given"):
        open_ir(ir(""))
