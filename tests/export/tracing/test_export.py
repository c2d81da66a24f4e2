"""The exported file is the network: in both engines, at batches that were not traced, complete and reproducible."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from tests.conftest import Workspace, vit_edge
from tests.core.test_checkpoint import small_checkpoint
from vit_edge.checkpoint import load_checkpoint, save_checkpoint
from vit_edge.errors import GoldenMismatch, VerificationFailed
from vit_edge.export import ExportOptions, export_onnx
from vit_edge.export.parity.parity import BATCHES, Reference, check_parity
from vit_edge.export.tracing.network import reference_logits
from vit_edge.export.tracing.tracer import trace
from vit_edge.image import Preprocessing
from vit_edge.model_file.artifact import MANIFEST_KEY, open_model, reseal, seal
from vit_edge.runtime import load
from vit_edge.runtime.checks.golden import golden_images

ENGINES = ("onnxruntime", "openvino")


def test_parity_is_proven_in_both_engines_at_untraced_batches(workspace: Workspace) -> None:
    printed = workspace.printed["export"]["parity"]
    assert {(row["engine"], row["batch_size"]) for row in printed} == {(e, b) for e in ENGINES for b in BATCHES}
    assert all(row["max_difference"] < 1e-4 and row["top1_equal"] == row["batch_size"] for row in printed)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_file_answers_as_pytorch_does_on_real_images(workspace: Workspace, engine: str) -> None:
    checkpoint = load_checkpoint(workspace.checkpoint)
    paths = sorted(workspace.test_images.rglob("*.png"))[::5]
    pixels = np.stack([checkpoint.preprocessing.pixels(path) for path in paths])
    expected = reference_logits(checkpoint.model, checkpoint.preprocessing)(pixels)
    with load(workspace.float_model, engine=engine) as classifier:  # type: ignore[arg-type]
        np.testing.assert_allclose(classifier.logits(pixels), expected, atol=1e-4, rtol=1e-3)


def test_the_contract_holds(workspace: Workspace) -> None:
    model = open_model(workspace.float_model)
    tensor = model.proto.graph.input[0].type.tensor_type
    assert tensor.elem_type == onnx.TensorProto.UINT8
    assert [d.dim_param or d.dim_value for d in tensor.shape.dim] == ["batch", 32, 32, 3]
    assert model.proto.ir_version == 8
    assert [(entry.domain, entry.version) for entry in model.proto.opset_import] == [("", 20)]
    manifest = model.manifest
    assert manifest.labels == tuple("0123456789")
    assert manifest.precision == "float32"
    assert manifest.evaluation is not None
    assert manifest.evaluation["num_images"] == 360
    assert re.fullmatch("[0-9a-f]{64}", manifest.provenance["checkpoint_sha256"])
    golden = manifest.golden
    assert golden is not None
    assert len(golden["seeds"]) >= 8
    assert {image["format"] for image in golden["images"]} == {"JPEG", "PNG"}


def test_golden_inputs_have_several_clear_answers(workspace: Workspace) -> None:
    golden = open_model(workspace.float_model).manifest.golden
    assert golden is not None
    with load(workspace.float_model) as classifier:
        logits = np.sort(classifier.logits(golden_images(golden["seeds"], height=32, width=32)), axis=1)
        answers = classifier.logits(golden_images(golden["seeds"], height=32, width=32)).argmax(axis=1)
        possible = classifier.logits(golden_images(range(256), height=32, width=32)).argmax(axis=1)
    # Random tiles are no digits: some networks see two of them in all, others ten.
    assert len(set(answers.tolist())) >= min(4, len(set(possible.tolist()))) >= 2
    assert (logits[:, -1] - logits[:, -2] > 3 * (1e-4 + 1e-3 * np.abs(logits).max(axis=1))).all()


def test_the_graph_is_clean_and_readable(workspace: Workspace) -> None:
    graph = onnx.load(workspace.float_model).graph
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    assert {"patches", "block.0.attention.qkv", "block.1.fc2", "head"} <= set(names)
    read = {name for node in graph.node for name in node.input} | {"logits"}
    assert all(set(node.output) & read for node in graph.node)
    assert {tensor.name for tensor in graph.initializer} <= read
    assert not {"Shape", "Expand", "ConstantOfShape"} & {node.op_type for node in graph.node}


def test_no_path_and_no_trace_of_the_machine_is_in_the_file(workspace: Workspace) -> None:
    for path in (workspace.float_model, workspace.int8_model):
        data = path.read_bytes()
        for mark in (os.fsencode(workspace.folder), b"stack_trace", b"site-packages", os.fsencode(Path.home())):
            assert mark not in data
        assert not re.search(rb"[\w/-]{3,}\.py", data)  # three bytes alone are in many weights by chance


def test_two_folders_give_the_same_bytes(workspace: Workspace, tmp_path: Path) -> None:
    for name in ("one", "two/deeper"):
        (tmp_path / name).mkdir(parents=True)
        shutil.copy(workspace.checkpoint, tmp_path / name / "c.safetensors")
        export_onnx(tmp_path / name / "c.safetensors", out=tmp_path / name / "m.onnx")
    one, two = ((tmp_path / name / "m.onnx").read_bytes() for name in ("one", "two/deeper"))
    assert one == two == workspace.float_model.read_bytes()


def test_average_pooling_exports_too(tmp_path: Path) -> None:
    torch.manual_seed(1)
    from dataclasses import replace

    from vit_edge.vit import VisionTransformer

    checkpoint = small_checkpoint()
    model = VisionTransformer(replace(checkpoint.model.config, pooling="mean", depth=2)).eval()
    nn.init.normal_(model.head.weight)
    save_checkpoint(tmp_path / "c", replace(checkpoint, model=model))
    result = export_onnx(tmp_path / "c", out=tmp_path / "m.onnx")
    assert len(result.parity) == len(ENGINES) * len(BATCHES)


def _edited(path: Path, edit: Callable[[onnx.GraphProto], None]) -> bytes:
    model = onnx.load(path)
    edit(model.graph)
    kept = [entry for entry in model.metadata_props if entry.key == MANIFEST_KEY]
    manifest = kept[0].value
    del model.metadata_props[:]
    model.metadata_props.add(key=MANIFEST_KEY, value=manifest)
    return seal(model.SerializeToString())


def _scale(graph: onnx.GraphProto, name: str, factor: float) -> None:
    tensor = next(tensor for tensor in graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), name))


def _reorder(graph: onnx.GraphProto, rows: Callable[[np.ndarray], np.ndarray]) -> None:  # type: ignore[type-arg]
    """Reorder the rows of the patch weight [patch y, patch x, channel]: as if the image came in otherwise."""
    tensor = next(tensor for tensor in graph.initializer if tensor.name == "patches.weight")
    weight = numpy_helper.to_array(tensor).reshape(8, 8, 3, -1)
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(rows(weight).reshape(192, -1)), tensor.name))


PARTS = ("attention.qkv", "attention.proj", "fc1", "fc2")
LAST = ("attention.query", "attention.key_value", "attention.proj", "fc1", "fc2")
LAYERS = [*(f"block.0.{part}.weight" for part in PARTS), *(f"block.1.{p}.weight" for p in LAST)]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["patches.weight", *LAYERS, "head.weight"])
def test_a_layer_one_percent_off_fails_the_golden_check(workspace: Workspace, engine: str, name: str) -> None:
    data = _edited(workspace.float_model, lambda graph: _scale(graph, name, 1.01))
    with pytest.raises(GoldenMismatch, match="off by"):
        load(data, engine=engine)  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", ENGINES)
def test_swapped_channels_or_axes_fail_the_golden_check(workspace: Workspace, engine: str) -> None:
    reorders: list[Callable[[np.ndarray], np.ndarray]] = [lambda w: w[:, :, ::-1], lambda w: w.transpose(1, 0, 2, 3)]  # type: ignore[type-arg]
    for rows in reorders:
        data = _edited(workspace.float_model, lambda graph, rows=rows: _reorder(graph, rows))  # type: ignore[misc]
        with pytest.raises(GoldenMismatch):
            load(data, engine=engine)  # type: ignore[arg-type]


def test_an_unedited_graph_sealed_again_passes(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(_edited(workspace.float_model, lambda graph: None))
    load(reseal(tmp_path / "m.onnx").data).close()


class _Reshaped(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float().reshape(3, -1)[:, :3]


class _Added(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float().flatten(1)[:, :3] + torch.zeros(3, 1)


@pytest.mark.parametrize("frozen", [_Reshaped, _Added])
def test_a_network_that_freezes_the_batch_is_refused(frozen: type[nn.Module]) -> None:
    with pytest.raises(VerificationFailed) as raised:
        trace(frozen(), height=8, width=8)
    assert "batch" in raised.value.reason
    assert "3" in raised.value.reason


def _reference(model: nn.Module, preprocessing: Preprocessing) -> Reference:
    logits = reference_logits(model, preprocessing)
    return lambda images: {"logits": logits(images)}


def test_a_file_that_freezes_the_batch_is_refused_by_parity(workspace: Workspace) -> None:
    def freeze(graph: onnx.GraphProto) -> None:
        node = next(node for node in graph.node if node.name == "norm.reshape")
        shape = next(tensor for tensor in graph.initializer if tensor.name == node.input[1])
        shape.CopyFrom(numpy_helper.from_array(np.array([3, 192], dtype=np.int64), shape.name))

    checkpoint = load_checkpoint(workspace.checkpoint)
    reference = _reference(checkpoint.model, checkpoint.preprocessing)
    model = open_model(_edited(workspace.float_model, freeze))
    images = golden_images(range(8), height=32, width=32)
    for engine in ENGINES:
        with pytest.raises(VerificationFailed, match="batch 1"):
            check_parity(model, reference, images_NHWC=images, engines=[engine])


def test_another_graph_is_refused_by_parity(workspace: Workspace) -> None:
    checkpoint = load_checkpoint(workspace.checkpoint)
    other = Preprocessing(resize=32, crop=(32, 32), mean=(0.4, 0.4, 0.4), std=(0.5, 0.5, 0.5))
    images = golden_images(range(8), height=32, width=32)
    with pytest.raises(VerificationFailed, match="not the network"):
        check_parity(
            open_model(workspace.float_model),
            _reference(checkpoint.model, other),
            images_NHWC=images,
            engines=ENGINES,
        )


def test_inspect_counts_what_the_fused_graph_saves(workspace: Workspace, tmp_path: Path) -> None:
    plain = tmp_path / "plain.onnx"
    export_onnx(workspace.checkpoint, out=plain, options=ExportOptions(fuse=False))
    found = {}
    for path in (workspace.float_model, plain):
        done = vit_edge("inspect", path, "--json")
        assert done.returncode == 0, done.stderr
        found[path] = json.loads(done.stdout)
    tokens, width, mlp = 17, 192, 768
    attention = 2 * tokens * tokens * width
    block = tokens * width * (4 * width + 2 * mlp) + attention
    whole = 16 * 192 * width + 2 * block + width * 10
    assert found[plain]["gmac_per_image"] == pytest.approx(whole / 1e9)
    # The last block asks and goes on with one token only; keys and values stay.
    last = tokens * width * 2 * width + width * (2 * width + 2 * mlp) + attention // tokens
    assert found[workspace.float_model]["gmac_per_image"] == pytest.approx((whole - block + last) / 1e9)
    assert found[workspace.float_model]["oldest_onnxruntime"] == "1.17"
    assert sum(found[plain]["size_by_kind"].values()) == pytest.approx(4 * found[plain]["parameters"], rel=0.01)


def test_nothing_is_written_when_parity_fails(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def off(model: nn.Module, preprocessing: Preprocessing, *, ends_in_activation: bool = False) -> object:
        run = reference_logits(model, preprocessing, ends_in_activation=ends_in_activation)
        return lambda images: run(images) + np.float32(0.01)

    monkeypatch.setattr("vit_edge.export.tracing.exporter.reference_logits", off)
    with pytest.raises(VerificationFailed):
        export_onnx(workspace.checkpoint, out=tmp_path / "m.onnx")
    assert os.listdir(tmp_path) == []
