"""Bad model files: one row for each numbered fault (14 to 30 of the list of faults), what it gives, and nothing else.

Weights beside files made elsewhere (16 to 19) have their rows in test_foreign_classifiers.py, applications (26) theirs
in test_bundle.py, engines that crash or hang (23) theirs in test_runtime_api.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.conftest import Workspace
from tests.export.onnx_import.test_importer import CONV, HEAD, LABELS, PREPROCESSING, WEIGHTS, network, node
from tests.faults.hostile_models import appended, resealed
from vit_edge.cache import cache_folder
from vit_edge.errors import GoldenMismatch, ModelRejected, NotTrusted, VitEdgeError
from vit_edge.model_file.artifact import MANIFEST_KEY, open_model, seal
from vit_edge.runtime import installed_engines, load
from vit_edge.runtime.checks.golden import golden_images
from vit_edge.runtime.engines.protocol import EngineOptions
from vit_edge.runtime.loading import load_model, open_any

IMAGES = golden_images(range(3), height=32, width=32)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIT_EDGE_CACHE", str(tmp_path / "cache"))


# 14 and 15: what is no model file. Made at the path given, from the bytes of a right one.
FILES: dict[str, tuple[Callable[[Path, bytes], object], type[VitEdgeError], str]] = {
    "14 random": (lambda p, _: p.write_bytes(np.random.default_rng(0).bytes(5000)), ModelRejected, "not an ONNX model"),
    "14 truncated": (lambda p, data: p.write_bytes(data[:-1000]), NotTrusted, "seal is missing: it was cut short"),
    "14 empty": (lambda p, _: p.touch(), ModelRejected, "the file is empty"),
    "14 PNG": (lambda p, _: p.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99)), ModelRejected, "the file is a PNG image"),
    "14 HTML": (lambda p, _: p.write_bytes(b"<!DOCTYPE html><html>"), ModelRejected, "the file is an HTML page"),
    "14 folder": (lambda p, _: p.mkdir(), ModelRejected, "the path is a folder"),
    "14 missing": (lambda _p, _: None, ModelRejected, "there is no such file"),
    "15 over 2 GiB": (lambda p, _: (p.touch(), os.truncate(p, 2**31)), ModelRejected, "at most 2,147,483,647 are read"),
    "26 one bit": (lambda p, d: p.write_bytes(d[:999] + bytes([d[999] ^ 4]) + d[1000:]), NotTrusted, "not those that"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FILES)
def test_what_is_no_model_file_is_named_with_its_path(workspace: Workspace, tmp_path: Path, fault: str) -> None:
    make, error, reason = FILES[fault]
    make(tmp_path / "model.onnx", workspace.int8_model.read_bytes())
    with pytest.raises(error, match=reason) as caught:
        load(tmp_path / "model.onnx")
    assert str(tmp_path / "model.onnx") in str(caught.value)


def planted(operator: str, inputs: str = "logits", **attributes: object) -> Callable[[onnx.ModelProto], None]:
    def plant(model: onnx.ModelProto) -> None:
        made = helper.make_node(operator, inputs.split(), ["planted"], name="planted", **attributes)
        model.graph.node.append(made)

    return plant


def outside(place: str) -> Callable[[onnx.ModelProto], None]:
    def move(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=place)

    return move


def chain(model: onnx.ModelProto) -> None:
    model.graph.node.extend(helper.make_node("Relu", ["logits"], [f"n{i}"], name=f"n{i}") for i in range(20_000))


def named(**values: int) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        model.ir_version = values.get("ir", model.ir_version)
        model.opset_import[0].version = values.get("opset", model.opset_import[0].version)

    return change


def without_pixels(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 31


BODY = helper.make_graph([], "body", [], [])
# 16 to 25: what an engine must never see, sealed as if it were ours.
GRAPHS: dict[str, tuple[Callable[[onnx.ModelProto], object], str]] = {
    "16 absolute": (outside("/etc/passwd"), "lies in another file"),
    "16 above": (outside("../x"), "lies in another file"),
    "18 memory": (outside("*/_ORT_MEM_ADDR_/*"), "lies in another file"),
    "20 If": (planted("If", then_branch=BODY, else_branch=BODY), "'planted' is ai.onnx.If"),
    "20 Loop": (planted("Loop", "logits logits", body=BODY), "'planted' is ai.onnx.Loop"),
    "20 Scan": (planted("Scan", body=BODY, num_scan_inputs=1), "'planted' is ai.onnx.Scan"),
    "20 a function": (lambda m: m.functions.add(name="f", domain="d"), "the model holds functions"),
    "20 custom": (planted("Mine", domain="com.example"), r"'planted' is com.example.Mine"),
    "20 contrib": (planted("FusedMatMul", "logits logits", domain="com.microsoft"), "com.microsoft.FusedMatMul"),
    "20 EPContext": (planted("EPContext", domain="com.microsoft"), "com.microsoft.EPContext"),
    "21 opset 999": (named(opset=999), "the opset is 999"),
    "21 opset 2^62": (named(opset=2**62), "the opset is 4611686018427387904"),
    "21 IR 99": (named(ir=99), "the IR version is 99"),
    "22 a bomb": (appended("ConstantOfShape", shape=np.array([2**40])), "makes 1,099,511,627,776 values"),
    "22 giant sizes": (lambda m: m.graph.initializer[0].dims.append(2**40), "has the shape"),
    "22 20,000 nodes": (chain, "nodes; at most 5,000 are read"),
    "25 other pixels": (without_pixels, r"the input 'images' has shape .*31"),
}


@pytest.mark.parametrize("fault", GRAPHS)
def test_what_an_engine_must_never_see_is_refused_before(workspace: Workspace, fault: str) -> None:
    change, reason = GRAPHS[fault]
    data = resealed(workspace.float_model, change)
    with pytest.raises(ModelRejected, match=reason):
        load(data)


def test_fault_25_labels_of_another_number_are_refused(workspace: Workspace) -> None:
    model = open_model(workspace.float_model)
    with pytest.raises(ModelRejected, match="the manifest has 3 labels"):
        load(model.with_manifest(replace(model.manifest, labels=("a", "b", "c"))))


def edited(workspace: Workspace, name: str, values: np.ndarray) -> bytes:
    """Return the float file with another tensor in it, sealed again."""
    opened = open_model(workspace.float_model)
    model = onnx.load_model_from_string(opened.data)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(values, name))
    del model.metadata_props[:]
    model.metadata_props.add(key=MANIFEST_KEY, value=opened.manifest.to_json())
    return seal(model.SerializeToString())


@pytest.mark.parametrize("engine", installed_engines())
def test_fault_24_answers_that_are_not_finite_or_of_another_network_are_found(
    workspace: Workspace, engine: str
) -> None:
    for values in (np.full(10, np.nan, np.float32), np.linspace(-1, 1, 10, dtype=np.float32)):
        with pytest.raises(GoldenMismatch):
            load(edited(workspace, "head.bias", values), engine=engine)  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", installed_engines())
def test_faults_22_to_24_of_files_made_elsewhere_end_a_process_apart(tmp_path: Path, engine: str) -> None:
    # A shape that only running the graph tells: shape inference does not follow a Cast from float.
    bomb = [
        node("Cast", ["huge"], ["s"], to=7),
        node("ConstantOfShape", ["s"], ["h"]),
        node("ReduceMax", ["h"], ["m"], keepdims=0),
        node("Add", ["x", "m"], ["z"]),
        node("Conv", ["z", "filters"], ["c"]),
    ]
    huge = np.array([200_000, 200_000], np.float32)
    models = {
        "memory": network(*bomb, *CONV[1:], *HEAD, huge=huge, **WEIGHTS),
        "shape": network(
            *CONV, HEAD[0], node("Gemm", ["f", "w", "b"], ["g"], transB=1), node("Reshape", ["g", "s"], ["y"]),
            s=np.array([-1, 1]), **WEIGHTS,
        ),
    }  # fmt: skip
    for name, model in models.items():
        (tmp_path / f"{name}.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(ModelRejected, match=r"cannot (run|load) the (network|model)") as caught:
            load(tmp_path / f"{name}.onnx", preprocessing=PREPROCESSING, labels=LABELS, engine=engine)  # type: ignore[arg-type]
        assert f"{name}.onnx" in str(caught.value)


@pytest.mark.parametrize("engine", installed_engines())
def test_faults_27_and_28_what_was_checked_is_what_runs(workspace: Workspace, tmp_path: Path, engine: str) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(workspace.int8_model.read_bytes())
    opened = open_any(path)
    path.write_bytes(workspace.float_model.read_bytes())  # between the check and the load
    with load_model(opened, engine=engine, options=EngineOptions(threads=1)) as classifier:
        assert classifier.describe()["precision"] == "int8"
        before = classifier.logits(IMAGES)
        os.truncate(path, 100)  # while it serves
        np.testing.assert_array_equal(classifier.logits(IMAGES), before)


def test_fault_29_a_name_of_255_bytes_and_others_that_are_odd_are_read(workspace: Workspace, tmp_path: Path) -> None:
    for name in ("a" * 250 + ".onnx", " .onnx", "-rf.onnx", "%s{}.onnx", os.fsdecode(b"\xff\xfe.onnx")):
        (tmp_path / name).write_bytes(workspace.int8_model.read_bytes())
        with load(tmp_path / name, threads=1) as classifier:
            assert classifier.logits(IMAGES).shape == (3, 10)


@pytest.mark.parametrize("engine", installed_engines())
def test_fault_30_no_engine_keeps_a_compiled_model(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with load(workspace.int8_model, engine=engine) as classifier:  # type: ignore[arg-type]
        classifier.logits(IMAGES)
    assert list((tmp_path / "here").iterdir()) == []
    left = [path for path in cache_folder().rglob("*") if path.is_file()] if cache_folder().exists() else []
    assert {path.parent.name for path in left} <= {"accepted"}
