"""A model file says what it is, and a changed bit anywhere is found before an engine sees it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import Workspace
from vit_edge.errors import ModelRejected, NotTrusted
from vit_edge.image import Preprocessing
from vit_edge.model_file.artifact import MANIFEST_KEY, Manifest, open_model, reseal, seal, unsealed
from vit_edge.model_file.onnx_schema import property_bytes


def test_the_seal_is_the_last_83_bytes_and_nothing_else_differs(workspace: Workspace) -> None:
    data = workspace.float_model.read_bytes()
    assert len(data) - len(unsealed(data)) == 83
    assert seal(unsealed(data)) == data


def test_every_onnx_reader_loads_a_sealed_file(workspace: Workspace) -> None:
    path = workspace.int8_model
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert {entry.key for entry in model.metadata_props} == {MANIFEST_KEY, "vit_edge.seal"}
    image = np.zeros((1, 32, 32, 3), dtype=np.uint8)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert session.run(None, {"images": image})[0].shape == (1, 10)
    assert openvino.Core().compile_model(path, "CPU")({"images": image})["logits"].shape == (1, 10)


@settings(max_examples=150, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_one_flipped_bit_anywhere_is_refused(workspace: Workspace, place: float, bit: int) -> None:
    data = bytearray(workspace.int8_model.read_bytes())
    data[int(place * len(data))] ^= 1 << bit
    with pytest.raises(NotTrusted):
        open_model(bytes(data))


def test_one_flipped_bit_in_the_seal_or_at_the_start_is_refused(workspace: Workspace) -> None:
    original = workspace.int8_model.read_bytes()
    for position in (*range(64), *range(len(original) - 120, len(original))):
        for bit in range(8):
            data = bytearray(original)
            data[position] ^= 1 << bit
            with pytest.raises(NotTrusted):
                open_model(bytes(data))


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.99999])
def test_a_truncated_file_is_refused(workspace: Workspace, kept: float) -> None:
    data = workspace.int8_model.read_bytes()
    with pytest.raises(NotTrusted):
        open_model(data[: int(len(data) * kept)])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"\x89PNG\r\n\x1a\n123", "PNG"),
        (b"<!DOCTYPE html><html></html>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"PK\x03\x04 something", "zip"),
        (b"some text that is no model", "not an ONNX model"),
        (b"\xff" * 1000, "not an ONNX model"),
    ],
)
def test_what_is_no_model_file_is_named(data: bytes, message: str) -> None:
    with pytest.raises(ModelRejected, match=message):
        open_model(data)


def test_a_file_made_elsewhere_is_not_taken_for_ours() -> None:
    node = onnx.helper.make_node("Relu", ["a"], ["b"])
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "ab"]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", values[:1], values[1:]))
    with pytest.raises(ModelRejected, match="not made by vit-edge"):
        open_model(model.SerializeToString())


def test_unknown_keys_are_kept_and_a_higher_schema_is_refused(workspace: Workspace) -> None:
    model = open_model(workspace.float_model)
    manifest = Manifest.from_json(json.dumps({**json.loads(model.manifest.to_json()), "colour": "green"}))
    assert json.loads(manifest.to_json())["colour"] == "green"
    assert open_model(model.with_manifest(manifest)).manifest.unknown == {"colour": "green"}

    newer = json.dumps({**json.loads(manifest.to_json()), "schema": 2})
    graph = onnx.load_from_string(unsealed(model.data))
    del graph.metadata_props[:]
    with pytest.raises(ModelRejected, match="schema 2"):
        open_model(seal(graph.SerializeToString() + property_bytes(MANIFEST_KEY, newer)))


def test_the_activation_is_softmax_unless_the_manifest_names_another() -> None:
    manifest = Manifest(
        name="m",
        architecture={},
        preprocessing=Preprocessing(resize=8, crop=(8, 8)),
        labels=("cat", "dog"),
        precision="float32",
        provenance={},
    )
    assert "activation" not in json.loads(manifest.to_json())
    assert Manifest.from_json(manifest.to_json()).activation == "softmax"
    several = replace(manifest, activation="sigmoid")
    assert Manifest.from_json(several.to_json()) == several
    with pytest.raises(ValueError, match="activation is 'relu'"):
        Manifest.from_json(json.dumps({**json.loads(manifest.to_json()), "activation": "relu"}))


@pytest.mark.parametrize("text", ["[]", "{}", '{"schema": "x"}', '{"schema": 1}', "nonsense"])
def test_a_manifest_that_is_none_is_refused(workspace: Workspace, text: str) -> None:
    graph = onnx.load_from_string(workspace.float_model.read_bytes())
    del graph.metadata_props[:]
    with pytest.raises(ModelRejected):
        open_model(seal(graph.SerializeToString() + property_bytes(MANIFEST_KEY, text)))


def test_a_file_edited_by_the_onnx_package_can_be_sealed_again(workspace: Workspace, tmp_path: Path) -> None:
    path = tmp_path / "edited.onnx"
    model = onnx.load(workspace.float_model)
    model.doc_string = "a deliberate edit"
    onnx.save(model, path)
    with pytest.raises(NotTrusted):
        open_model(path)
    resealed = reseal(path)
    assert resealed.manifest == open_model(workspace.float_model).manifest


def test_with_manifest_changes_the_manifest_only(workspace: Workspace) -> None:
    model = open_model(workspace.float_model)
    renamed = open_model(model.with_manifest(replace(model.manifest, name="other")))
    assert renamed.manifest.name == "other"
    assert renamed.proto.graph == model.proto.graph
    assert renamed.sha256 != model.sha256
