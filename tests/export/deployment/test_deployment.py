"""One command goes the whole way, does nothing twice, and leaves a record that can be held against the files."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import vit_edge
from tests.support.deployments import run
from vit_edge.errors import InputError, NotTrusted, UsageError
from vit_edge.export.deployment.deployer import DeploymentOptions, check_record, conclude, folder_sha256, read_record
from vit_edge.files import sha256_hex
from vit_edge.model_file.artifact import open_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, deployment: Path) -> Path:
    """Return a folder with a checkpoint, images of two kinds, and what a deployment made of them."""
    return shutil.copytree(deployment, tmp_path_factory.mktemp("deployment"), dirs_exist_ok=True)


def test_every_step_is_recorded_with_hashes_and_versions(folder: Path) -> None:
    record = read_record(folder / "out" / "record.json")
    assert list(record["steps"]) == ["export", "quantize", "speed"]
    assert list(record["commands"]) == ["check", "export", "quantize", "speed"]
    assert record["files"]["model.int8.onnx"] == open_model(folder / "out" / "model.int8.onnx").sha256
    assert record["steps"]["quantize"]["inputs"]["model"] == record["files"]["model.onnx"]
    assert record["steps"]["quantize"]["result"]["num_calibration_images"] == 40
    assert {engine["engine"] for engine in record["steps"]["speed"]["result"]["engines"]} == {"onnxruntime", "openvino"}
    assert record["made_with"]["versions"].keys() >= {"torch", "onnx", "onnxruntime", "openvino"}
    assert record["verdict"] in ("pass", "inconclusive", "fail")
    assert [claim.split(",")[0] for claim in record["claims"]] == ["accuracy", "speed"]


def test_what_did_not_change_is_not_done_again(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "f")
    before = (tmp_path / "f" / "out" / "record.json").read_bytes()
    again = run(tmp_path / "f")
    assert again.skipped == ("export", "quantize", "speed")
    assert json.loads(before)["steps"] == json.loads((tmp_path / "f" / "out" / "record.json").read_bytes())["steps"]
    (tmp_path / "f" / "out" / "model.int8.onnx").unlink()
    assert run(tmp_path / "f").ran == ("quantize",)  # the same bytes come out of it: nothing to measure again
    (tmp_path / "f" / "calibration" / "0.png").unlink()
    changed = run(tmp_path / "f")
    assert changed.skipped == ("export",)
    assert changed.ran == ("quantize", "speed")
    (tmp_path / "f" / "out" / "record.json").write_text("[")
    assert len(run(tmp_path / "f").ran) == 3


def test_a_record_is_held_against_files_and_images(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "f")
    out, record = tmp_path / "f" / "out", tmp_path / "f" / "out" / "record.json"
    again = check_record(record, data=tmp_path / "f" / "data")
    first = read_record(record)["steps"]["quantize"]["result"]["verification"]
    judged = again.record["again"]["quantize"]["verification"]
    for before, after in zip(first["engines"], judged["engines"], strict=True):
        assert (before["engine"], before["drop_points"]) == (after["engine"], after["drop_points"])
    data = (out / "model.int8.onnx").read_bytes()
    (out / "model.int8.onnx").write_bytes(data[:-1])
    with pytest.raises(NotTrusted, match="it was changed"):
        check_record(record)
    (out / "model.int8.onnx").write_bytes(data)
    image = next((tmp_path / "f" / "data").rglob("*.png"))
    image.unlink()
    with pytest.raises(NotTrusted, match="not the images that judged"):
        check_record(record, data=tmp_path / "f" / "data")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 1}', "x" * 10])
def test_what_is_no_record_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(InputError, match=r"record\.json"):
        check_record(tmp_path / "record.json")


def _engine(**more: Any) -> dict[str, Any]:
    figures = {"verdict": "pass", "drop_points": 0.0, "drop_upper_bound_points": 0.5, "agreement": 99.0, "images": 550}
    return {**figures, "num_changed": 3, "unlabelled": 0, "engine": "onnxruntime", **more}


@pytest.mark.parametrize(
    ("verdict", "low", "expected"),
    [("pass", 1.2, "pass"), ("pass", 0.99, "fail"), ("inconclusive", 1.2, "inconclusive"), ("fail", 2.0, "fail")],
)
def test_the_verdict_needs_the_accuracy_and_the_speed(verdict: str, low: float, expected: str) -> None:
    judged = {"verdict": verdict, "engines": [_engine(verdict=verdict), _engine(engine="openvino")]}
    timed = [{"engine": "onnxruntime", "ratio": 1.5, "ratio_interval": [low, 2.2]}]
    found, (accuracy, speed) = conclude(judged, timed)
    assert found == expected
    assert accuracy.startswith(f"accuracy, {verdict}: on 550 images INT8 loses 0.00 points, no more than 0.50")
    assert f"1.50 times as fast as float32 in onnxruntime ({low:.2f} to 2.20" in speed


def test_a_folder_has_the_hash_of_its_names_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1").write_bytes(b"x")
    first = folder_sha256(tmp_path)
    (tmp_path / "a" / "1").rename(tmp_path / "a" / "2")
    assert folder_sha256(tmp_path) != first
    with pytest.raises(InputError, match="no folder"):
        folder_sha256(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="how much may be lost"):
        DeploymentOptions()


def test_the_command_ends_with_the_verdict(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "f")
    arguments = ("c.safetensors", "--calibration", "calibration", "--data", "data", "--max-drop", "0.1")
    done = vit_edge("deploy", *arguments, "--effort", "fast", "-o", "out", "--json", cwd=tmp_path / "f")
    assert done.returncode == 6  # seventy images certify no tenth of a point
    printed = json.loads(done.stdout)
    assert printed["verdict"] in ("inconclusive", "fail")
    assert printed["skipped"] == ["export"]
    assert printed["error"]["type"] == "VerificationFailed"
    for path in (tmp_path / "f" / "out").glob("*.onnx"):
        path.unlink()
    record = read_record(tmp_path / "f" / "out" / "record.json")
    for step in ("export", "quantize"):
        vit_edge(*shlex.split(record["commands"][step])[1:], cwd=tmp_path / "f")
    # The same files, step by step.
    for name, digest in record["files"].items():
        assert sha256_hex((tmp_path / "f" / "out" / name).read_bytes()) == digest, record["commands"]
    for wrong, text in ((("deploy",), "SOURCE, --calibration, --data"), (("deploy", "x", "--check", "y"), "no source")):
        refused = vit_edge(*wrong, cwd=tmp_path)
        assert refused.returncode == 2
        assert text in refused.stderr
