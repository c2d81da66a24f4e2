"""Every kind of file that `export` makes answers as the network does, and says what it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from tests.conftest import ROOT, vit_edge
from tests.support.networks import (
    FAMILIES,
    PREPROCESSING,
    SIZE,
    damaged_trace,
    random_network,
    small_config,
    write_checkpoint,
)
from vit_edge.errors import ModelRejected, UsageError, VerificationFailed
from vit_edge.export import ExportOptions, export_onnx, quantize
from vit_edge.export.tracing import exporter as exporter_module
from vit_edge.export.tracing.network import reference_logits
from vit_edge.metrics import sqnr_db
from vit_edge.model_file.artifact import open_model, pack
from vit_edge.runtime import load
from vit_edge.runtime.checks.golden import golden_images

ENGINES = ("onnxruntime", "openvino")
IMAGES = golden_images(range(5), height=SIZE[0], width=SIZE[1])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "c.safetensors")


def _expected() -> np.ndarray:  # type: ignore[type-arg]
    return reference_logits(random_network(small_config()), PREPROCESSING)(IMAGES)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_exports_and_quantizes(tmp_path: Path, family: str) -> None:
    source = write_checkpoint(tmp_path / "c.safetensors", **FAMILIES[family])
    result = export_onnx(source, out=tmp_path / "m.onnx")
    assert min(row.sqnr_db for row in result.parity) > 90
    operators = {node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node}
    assert not {"Shape", "Expand", "ConstantOfShape", "Where"} & operators
    (tmp_path / "images").mkdir()
    for number, pixels in enumerate(golden_images(range(100, 132), height=SIZE[0], width=SIZE[1])):
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    quantize(tmp_path / "m.onnx", calibration=tmp_path / "images", out=tmp_path / "q.onnx")
    with load(tmp_path / "m.onnx") as whole, load(tmp_path / "q.onnx") as integers:
        assert sqnr_db(whole.logits(IMAGES), integers.logits(IMAGES)) > 20


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 2},
        {"input": "float32-nchw"},
        {"fuse": False},
        {"min_onnxruntime": "1.16.3"},
        {"input": "float32-nchw", "batch_size": 3, "outputs": ("top5", "features", "attention")},
    ],
    ids=str,
)
def test_the_runtime_answers_with_every_kind_of_file(
    checkpoint: Path, tmp_path: Path, engine: str, options: dict[str, Any]
) -> None:
    export_onnx(checkpoint, out=tmp_path / "m.onnx", options=ExportOptions(**options))
    with load(tmp_path / "m.onnx", engine=engine) as classifier:  # type: ignore[arg-type]
        found = classifier.logits(IMAGES)
        assert classifier.logits(IMAGES[:0]).shape == (0, 7)
    assert sqnr_db(_expected(), found) > 90


def test_what_a_checkpoint_has_of_its_own_cannot_be_given(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="are for a module"):
        export_onnx(checkpoint, out=tmp_path / "m.onnx", preprocessing=PREPROCESSING)


def test_more_outputs_are_there_and_right(checkpoint: Path, tmp_path: Path) -> None:
    outputs = ("attention", "top5", "probabilities", "features")
    export_onnx(checkpoint, out=tmp_path / "m.onnx", options=ExportOptions(outputs=outputs))
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    assert names == ["logits", "probabilities", "top5", "top5_probabilities", "features", "attention"]
    found = dict(zip(names, session.run(None, {"images": IMAGES}), strict=True))
    model = random_network(small_config())
    with torch.no_grad():
        x = torch.from_numpy(PREPROCESSING.normalise(IMAGES))
        features = model.forward_features(x)[:, 0].numpy()
        tokens = model.blocks[0](model.embed(x))
        weights = model.blocks[1].attn.weights(model.blocks[1].norm1(tokens))  # type: ignore[union-attr,operator]
    np.testing.assert_allclose(found["features"], features, atol=1e-4)
    np.testing.assert_allclose(found["attention"], weights[:, :, 0, 1:].reshape(-1, 2, 3, 2), atol=1e-5)
    np.testing.assert_allclose(found["probabilities"].sum(axis=1), 1, atol=1e-5)
    assert (found["top5"] == np.argsort(-found["logits"], axis=1)[:, :5]).all()
    np.testing.assert_allclose(found["top5_probabilities"], -np.sort(-found["probabilities"], axis=1)[:, :5])
    with load(tmp_path / "m.onnx") as classifier:
        assert classifier(IMAGES[0]).answers[0].index == found["top5"][0, 0]


@pytest.mark.parametrize(
    ("release", "activation", "opset"),
    [("1.17", "gelu", 20), ("1.16", "gelu", 18), ("1.17", "quick_gelu", 18), ("1.26", "gelu", 20)],
)
def test_opset_and_ir_version_are_the_lowest_that_the_graph_needs(
    tmp_path: Path, release: str, activation: str, opset: int
) -> None:
    source = write_checkpoint(tmp_path / "c", activation=activation)
    export_onnx(source, out=tmp_path / "m.onnx", options=ExportOptions(min_onnxruntime=release))
    model = onnx.load(tmp_path / "m.onnx")
    assert (model.ir_version, model.opset_import[0].version) == (8, opset)
    onnx.checker.check_model(model, full_check=True)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"min_onnxruntime": "1.9"}, "older than 1.15"),
        ({"min_onnxruntime": "new"}, "'new' is not a release"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"outputs": ("logit",)}, "no output is named 'logit'"),
        ({"format": "huggingface", "outputs": ("features",)}, "logits only"),
    ],
)
def test_options_that_are_not_possible_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        ExportOptions(**options)


def test_features_of_the_plain_network_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    options = ExportOptions(outputs=("features",), fuse=False)
    with pytest.raises(UsageError, match="fused inference graph"):
        export_onnx(checkpoint, out=tmp_path / "m.onnx", options=options)


def test_a_plain_network_is_admitted_by_its_operators(checkpoint: Path, tmp_path: Path) -> None:
    export_onnx(checkpoint, out=tmp_path / "m.onnx", options=ExportOptions(fuse=False))
    model = open_model(tmp_path / "m.onnx")
    assert model.manifest.provenance["form"] == "plain"
    claimed = replace(model.manifest, provenance={**model.manifest.provenance, "form": "fused"})
    load(model.with_manifest(claimed)).close()  # the operators decide, not what the file says of itself


def test_labels_are_replaced_and_their_number_is_checked(checkpoint: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"class {n}" for n in range(7)), encoding="utf-8")
    done = vit_edge("export", checkpoint, "-o", tmp_path / "m.onnx", "--labels", names)
    assert done.returncode == 0, done.stderr
    assert open_model(tmp_path / "m.onnx").manifest.labels[6] == "class 6"
    names.write_text("one\ntwo\n", encoding="utf-8")
    done = vit_edge("export", checkpoint, "-o", tmp_path / "n.onnx", "--labels", names)
    assert done.returncode == 3
    assert "the file holds 2 names, the network has 7 classes" in done.stderr


def test_parity_runs_on_images_too_and_shows_a_table(checkpoint: Path, tmp_path: Path) -> None:
    images = ROOT / "calibration_data" / "digits" / "3"
    done = vit_edge("export", checkpoint, "-o", tmp_path / "m.onnx", "--data", images)
    assert done.returncode == 0, done.stderr
    for text in (
        "max difference",
        "mean",
        "SQNR dB",
        f"{len(list(images.iterdir()))} of {len(list(images.iterdir()))}",
    ):
        assert text in done.stdout


def test_a_failure_names_the_first_tensor_that_parts_and_writes_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter_module, "trace", damaged_trace("block.0.fc2.weight"))
    with pytest.raises(VerificationFailed, match=r"first apart from PyTorch at 'block\.0\.fc2\.add'") as raised:
        export_onnx(checkpoint, out=tmp_path / "m.onnx")
    assert raised.value.exit_code == 6
    assert list(tmp_path.iterdir()) == []


def test_a_fixed_batch_that_contradicts_the_manifest_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    export_onnx(checkpoint, out=tmp_path / "m.onnx", options=ExportOptions(batch_size=2))
    model = open_model(tmp_path / "m.onnx")
    claimed = replace(model.manifest, input={**model.manifest.input, "batch": 3})
    with pytest.raises(ModelRejected, match="the batch is 2; the manifest says 3"):
        load(model.with_manifest(claimed))
    graph = onnx.load_model_from_string(model.data)
    del graph.metadata_props[:]
    dynamic = replace(model.manifest, input={k: v for k, v in model.manifest.input.items() if k != "batch"})
    with pytest.raises(ModelRejected, match="the batch is fixed at 2"):
        load(pack(graph.SerializeToString(), dynamic))
