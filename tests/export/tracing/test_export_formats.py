"""OpenVINO's IR and the Hugging Face folder hold the same network, whole and sealed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
import torch
from PIL import Image
from torch import nn

from tests.conftest import vit_edge
from tests.support.networks import PREPROCESSING, SIZE, random_network, small_config
from vit_edge.errors import ModelRejected, NotTrusted, UsageError
from vit_edge.export import ExportOptions, export_onnx
from vit_edge.export.tracing.hf_folder import require_expressible
from vit_edge.export.tracing.network import reference_logits
from vit_edge.model_file.artifact import open_model
from vit_edge.model_file.openvino_ir import open_ir
from vit_edge.runtime import load
from vit_edge.runtime.checks.golden import golden_images

IMAGES = golden_images(range(5), height=SIZE[0], width=SIZE[1])
IR, HUGGINGFACE = ExportOptions(format="openvino"), ExportOptions(format="huggingface")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("formats")
    for name in ("c.safetensors", "m.xml", "m.bin"):
        shutil.copy(small_model / name, folder)
    export_onnx(folder / "c.safetensors", out=folder / "hub", options=HUGGINGFACE)
    return folder


def _expected() -> np.ndarray:  # type: ignore[type-arg]
    return reference_logits(random_network(small_config()), PREPROCESSING)(IMAGES)


def test_the_ir_is_whole_uncompressed_and_answers_from_its_verified_bytes(folder: Path) -> None:
    model = open_ir(folder / "m.xml")
    assert model.manifest.labels == tuple("abcdefg")
    assert b'element_type="f16"' not in model.xml
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(model.xml, model.weights), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    np.testing.assert_allclose(compiled({"images": IMAGES})["logits"], _expected(), atol=1e-4)
    assert str(folder).encode() not in model.xml
    assert b".py" not in model.xml  # text, no weights


@pytest.mark.parametrize("batch", [3, 9])
def test_a_fixed_batch_becomes_ir_too(folder: Path, tmp_path: Path, batch: int) -> None:
    options = ExportOptions(format="openvino", batch_size=batch)
    export_onnx(folder / "c.safetensors", out=tmp_path / "m.xml", options=options)
    assert open_ir(tmp_path / "m.xml").manifest.batch == batch


def test_inspect_shows_what_the_ir_says_of_itself(folder: Path) -> None:
    done = vit_edge("inspect", folder / "m.xml", "--json")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed["manifest"]["labels"] == list("abcdefg")
    assert printed["size_bytes"] == sum((folder / name).stat().st_size for name in ("m.xml", "m.bin"))


def test_two_folders_give_the_same_ir(folder: Path, tmp_path: Path) -> None:
    export_onnx(folder / "c.safetensors", out=tmp_path / "m.xml", options=IR)
    for name in ("m.xml", "m.bin"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize(("name", "place"), [("m.xml", 0.5), ("m.bin", 0.5), ("m.bin", 0.99)])
def test_a_changed_bit_in_either_file_is_found(folder: Path, tmp_path: Path, name: str, place: float) -> None:
    for part in ("m.xml", "m.bin"):
        shutil.copy(folder / part, tmp_path / part)
    data = bytearray((tmp_path / name).read_bytes())
    data[int(len(data) * place)] ^= 1
    (tmp_path / name).write_bytes(data)
    with pytest.raises(NotTrusted, match="one was changed, damaged or exchanged"):
        open_ir(tmp_path / "m.xml")


def test_the_weights_of_another_model_or_none_are_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "m.xml", tmp_path / "m.xml")
    with pytest.raises(ModelRejected, match=r"m\.bin: there is no such file"):
        open_ir(tmp_path / "m.xml")
    (tmp_path / "m.bin").write_bytes((folder / "m.bin").read_bytes()[:-4])
    with pytest.raises(NotTrusted):
        open_ir(tmp_path / "m.xml")
    (tmp_path / "m.xml").write_text("<net/>")
    with pytest.raises(ModelRejected, match="no OpenVINO IR made by vit-edge"):
        open_ir(tmp_path / "m.xml")
    doubled = (folder / "m.xml").read_bytes().replace(b"</vit_edge>", b'<seal value="' + b"0" * 64 + b'" /></vit_edge>')
    (tmp_path / "m.xml").write_bytes(doubled)
    with pytest.raises(NotTrusted):
        open_ir(tmp_path / "m.xml")


def test_transformers_opens_the_folder_and_prepares_images_as_we_do(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    import onnxruntime

    config = transformers.AutoConfig.from_pretrained(folder / "hub")
    assert config.id2label == dict(enumerate("abcdefg"))
    assert (config.hidden_size, config.num_hidden_layers) == (24, 2)
    image = Image.fromarray(golden_images([3], height=60, width=50)[0])
    ours = PREPROCESSING.normalise(PREPROCESSING.pixels(image)[None])
    processor = transformers.AutoImageProcessor.from_pretrained(folder / "hub", use_fast=False)
    theirs = processor(image, return_tensors="np")["pixel_values"]
    assert theirs.shape == ours.shape
    assert np.abs(theirs - ours).max() < 0.05  # two levels of 255: another resize of the same kind
    session = onnxruntime.InferenceSession(folder / "hub" / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    assert [value.name for value in (*session.get_inputs(), *session.get_outputs())] == ["pixel_values", "logits"]
    found = session.run(["logits"], {"pixel_values": ours})[0]
    with load(folder / "hub" / "onnx" / "model.onnx") as classifier:
        np.testing.assert_allclose(found, classifier.logits(PREPROCESSING.pixels(image)[None]), atol=1e-5)
    export_onnx(folder / "c.safetensors", out=tmp_path / "m.onnx")
    with load(tmp_path / "m.onnx") as classifier:
        np.testing.assert_allclose(found, classifier.logits(PREPROCESSING.pixels(image)[None]), atol=1e-4)


def test_a_folder_is_replaced_only_with_force_and_only_where_it_is_one_of_ours(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    for force in (False, True):
        with pytest.raises(UsageError, match="the folder exists"):
            export_onnx(folder / "c.safetensors", out=tmp_path / "mine", options=HUGGINGFACE, force=force)
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"
    shutil.copytree(folder / "hub", tmp_path / "clone")
    (tmp_path / "clone" / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(UsageError, match=r"the folder exists, with model\.safetensors in it"):
        export_onnx(folder / "c.safetensors", out=tmp_path / "clone", options=HUGGINGFACE, force=True)
    assert (tmp_path / "clone" / "model.safetensors").read_bytes() == b"weights"
    shutil.copytree(folder / "hub", tmp_path / "hub")
    with pytest.raises(UsageError, match="the folder exists"):
        export_onnx(folder / "c.safetensors", out=tmp_path / "hub", options=HUGGINGFACE)
    (tmp_path / "hub" / "config.json").write_text("{}")
    export_onnx(folder / "c.safetensors", out=tmp_path / "hub", options=HUGGINGFACE, force=True)
    assert json.loads((tmp_path / "hub" / "config.json").read_text())["model_type"] == "vit"
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "clone", "hub"}
    assert open_model(tmp_path / "hub" / "onnx" / "model.onnx").manifest.input["name"] == "pixel_values"


def test_formats_that_do_not_fit_are_refused_before_any_work(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"name it m\.xml"):
        export_onnx(folder / "c.safetensors", out=tmp_path / "m.onnx", options=IR)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE[0] * SIZE[1], 2))
    torch.manual_seed(0)
    with pytest.raises(UsageError, match="no Vision Transformer"):
        export_onnx(network, out=tmp_path / "m", options=HUGGINGFACE, preprocessing=PREPROCESSING)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "is_exact"),
    [
        ({"resize": max(SIZE)}, False),
        ({"resize": max(SIZE), "crop_rounding": "floor"}, True),
        ({}, True),
        ({"resize": (SIZE[0] + 4, SIZE[1] + 8)}, True),
        ({"resize": (SIZE[0] + 3, SIZE[1])}, False),
    ],
)
def test_a_crop_that_the_image_processor_cuts_one_pixel_away_is_named(
    changes: dict[str, Any], is_exact: bool, caplog: pytest.LogCaptureFixture
) -> None:
    require_expressible({"family": "vit"}, replace(PREPROCESSING, **changes))
    assert ("one pixel away" in caplog.text) == (not is_exact)


def test_what_no_image_processor_does_is_refused() -> None:
    preprocessing = replace(PREPROCESSING, resize=(SIZE[0] + 4, SIZE[1] + 4), keep_ratio=True)
    with pytest.raises(UsageError, match="keep_ratio"):
        require_expressible({"family": "vit"}, preprocessing)
