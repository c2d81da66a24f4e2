"""The example in Node.js gives the answers of the runtime from the same file."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import ROOT, Workspace
from tests.support.networks import SIZE, write_checkpoint
from vit_edge.export import ExportOptions, export_onnx
from vit_edge.export.tracing import external_data
from vit_edge.model_file.artifact import open_model
from vit_edge.runtime import load
from vit_edge.runtime.checks.golden import golden_images

_INSTALL_S = 180


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the example with its packages installed; skips where these cannot be had."""
    for tool in ("node", "npm"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    folder = tmp_path_factory.mktemp("node") / "example"
    shutil.copytree(ROOT / "examples" / "node", folder, ignore=shutil.ignore_patterns("node_modules"))
    packages = ", ".join(json.loads((folder / "package.json").read_text())["dependencies"])
    command = ["npm", "install", "--no-audit", "--no-fund", "--fetch-retries=1"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_INSTALL_S, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm did not fetch {packages} in {_INSTALL_S} s")
    if done.returncode:
        said = " ".join(line for line in done.stderr.splitlines() if line.startswith("npm error"))
        pytest.skip(f"npm cannot fetch {packages}: {said[:300]}")
    assert not (folder / "package-lock.json").exists()
    return folder


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model that is higher than wide and has a fixed batch, and one of two files."""
    folder = tmp_path_factory.mktemp("others")
    write_checkpoint(folder / "c.safetensors")
    export_onnx(folder / "c.safetensors", out=folder / "fixed.onnx", options=ExportOptions(batch_size=3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(external_data, "_MOST_INSIDE_BYTES", 10_000)
        export_onnx(folder / "c.safetensors", out=folder / "two.onnx")
    return folder


def node(example: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = ["node", str(example / "classify.mjs"), *(str(argument) for argument in arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def answered(example: Path, *arguments: str | Path) -> dict[str, Any]:
    done = node(example, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    printed: dict[str, Any] = json.loads(done.stdout)
    return printed


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_the_golden_inputs_are_the_same_and_the_logits_within_tolerance(
    example: Path, workspace: Workspace, precision: str
) -> None:
    model = workspace.int8_model if precision == "int8" else workspace.float_model
    printed = answered(example, model, "--golden")
    assert (printed["model"]["precision"], printed["model"]["labels"]) == (precision, 10)
    assert printed["golden"]["inputs"] >= 8
    assert printed["golden"]["problems"] == []


def test_golden_inputs_of_another_shape_and_a_fixed_batch_agree_too(example: Path, others: Path) -> None:
    assert SIZE[0] != SIZE[1]
    printed = answered(example, others / "fixed.onnx", "--golden")
    assert printed["golden"]["largest_difference"] < 1e-4


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_raw_pixels_get_the_label_and_logits_that_python_gives(
    example: Path, workspace: Workspace, tmp_path: Path, precision: str
) -> None:
    model = workspace.int8_model if precision == "int8" else workspace.float_model
    with load(model, engine="onnxruntime", threads=1) as classifier:
        pixels = classifier.prepare(workspace.folder / "image.png").pixels
        expected = classifier.logits(pixels[None])[0]
        prediction = classifier(workspace.folder / "image.png", top=3)
    pixels.tofile(tmp_path / "image.rgb")
    found = answered(example, model, "--raw", "32x32", tmp_path / "image.rgb")["image"]
    assert found["label"] == prediction.label == "3"
    assert found["probability"] == pytest.approx(prediction.probability, abs=0.05 if precision == "int8" else 1e-4)
    assert len(found["answers"]) == 3
    # Releases of ONNX Runtime may round another way where integers are made of floats.
    np.testing.assert_allclose(found["logits"], expected, atol=0.3 if precision == "int8" else 1e-4)
    done = node(example, model, "--raw", "32x32", tmp_path / "image.rgb", "--top", "1")
    assert done.stdout.startswith(f"{tmp_path / 'image.rgb'}: 3 ")


def test_one_changed_bit_is_refused(example: Path, workspace: Workspace, tmp_path: Path) -> None:
    data = bytearray(workspace.int8_model.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "changed.onnx").write_bytes(data)
    (tmp_path / "cut.onnx").write_bytes(workspace.int8_model.read_bytes()[:-1])
    for name, sentence in (("changed.onnx", "not those that were sealed"), ("cut.onnx", "no seal")):
        done = node(example, tmp_path / name, "--golden")
        assert done.returncode == 4
        assert sentence in done.stderr


def test_logits_other_than_the_golden_ones_are_reported(example: Path, workspace: Workspace, tmp_path: Path) -> None:
    model = open_model(workspace.float_model)
    golden = dict(model.manifest.golden or {})
    golden["seeds"] = [seed + 1 for seed in golden["seeds"]]
    (tmp_path / "edited.onnx").write_bytes(model.with_manifest(replace(model.manifest, golden=golden)))
    done = node(example, tmp_path / "edited.onnx", "--golden")
    assert done.returncode == 6
    assert "the model gives other logits here" in done.stderr


def test_what_cannot_be_used_gets_one_sentence_and_its_exit_code(
    example: Path, workspace: Workspace, others: Path, tmp_path: Path
) -> None:
    golden_images([1], height=16, width=16).tofile(tmp_path / "small.rgb")
    for arguments, code, sentence in (
        ((others / "two.onnx", "--golden"), 3, "its weights lie in two.onnx.data beside it"),
        ((tmp_path / "gone.onnx", "--golden"), 3, "gone.onnx"),
        ((workspace.int8_model, "--raw", "16x16", tmp_path / "small.rgb"), 3, "the network takes 32x32"),
        ((workspace.int8_model, "--raw", "32x32", tmp_path / "small.rgb"), 3, "the file has 768 bytes"),
        ((workspace.int8_model,), 2, "either --golden or --raw"),
        ((workspace.int8_model, "--golden", "--top", "0"), 2, "whole numbers"),
    ):
        done = node(example, *arguments)
        assert done.returncode == code, done.stderr
        assert sentence in done.stderr
        problem, *remedy = done.stderr.splitlines()
        assert problem.startswith("error: ")
        assert [line[:5] for line in remedy] == ["try: "] * len(remedy)
        assert len(remedy) <= 1
