"""One command runs every step, none twice, and leaves a record that can be checked against the files."""

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
from vit_edge.export.deployment.claims import Claim, accuracy_claim, device_claim, speed_claim, worst_verdict
from vit_edge.export.deployment.deployer import DeploymentOptions, check_record
from vit_edge.export.deployment.record import folder_sha256, read_record
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
    for engine in record["steps"]["speed"]["result"]["engines"]:
        low, high = engine["ratio_interval"]
        assert low <= engine["ratio"] <= high
    assert [claim["subject"] for claim in record["claims"]] == ["accuracy", "speed"]
    assert record["verdict"] == worst_verdict([Claim(**claim) for claim in record["claims"]])


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


def test_a_check_updates_the_record_and_refuses_other_files_and_images(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "f")
    out, record = tmp_path / "f" / "out", tmp_path / "f" / "out" / "record.json"
    first = read_record(record)["steps"]["quantize"]["result"]["verification"]
    again = check_record(record)  # its images are found from the record, wherever both were moved
    written = read_record(record)
    assert (written["verdict"], written["check"]) == (again.verdict, json.loads(json.dumps(again.record["check"])))
    assert written["steps"] == read_record(folder / "out" / "record.json")["steps"]
    for before, after in zip(first["engines"], written["check"]["verification"]["engines"], strict=True):
        assert (before["engine"], before["drop_points"]) == (after["engine"], after["drop_points"])
    data = (out / "model.int8.onnx").read_bytes()
    (out / "model.int8.onnx").write_bytes(data[:-1])
    with pytest.raises(NotTrusted, match="not the one in the record"):
        check_record(record)
    (out / "model.int8.onnx").write_bytes(data)
    image = next((tmp_path / "f" / "data").rglob("*.png"))
    image.unlink()
    with pytest.raises(NotTrusted, match="evaluation images of the record"):
        check_record(record, data=tmp_path / "f" / "data")
    shutil.rmtree(tmp_path / "f" / "data")
    with pytest.raises(InputError, match="--data"):
        check_record(record)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 1}', "x" * 10])
def test_what_is_no_record_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(InputError, match=r"record\.json"):
        check_record(tmp_path / "record.json")


def test_a_check_without_speed_leaves_accuracy_alone_to_decide(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "f")
    found = check_record(tmp_path / "f" / "out" / "record.json", measure_speed=False)
    assert [claim.subject for claim in found.claims] == ["accuracy"]
    assert found.verdict == found.claims[0].verdict


def _engine(**more: Any) -> dict[str, Any]:
    figures = {"verdict": "pass", "drop_points": 0.0, "drop_upper_bound_points": 0.5, "agreement": 99.0, "images": 550}
    return {**figures, "num_changed": 3, "unlabelled": 0, "engine": "onnxruntime", **more}


def _timed(low: float, high: float, engine: str = "onnxruntime") -> dict[str, Any]:
    return {"engine": engine, "ratio": (low + high) / 2, "ratio_interval": [low, high]}


@pytest.mark.parametrize(
    ("intervals", "noise", "verdict", "said", "remedy"),
    [
        ([(1.2, 2.2)], [], "pass", "1.70 times as fast as float32 in onnxruntime (1.20 to 2.20", ""),
        ([(0.7, 0.9)], [], "fail", "(0.70 to 0.90", "deploy the float32 file"),
        ([(0.9, 1.3)], ["the host took 0.5 of a core"], "inconclusive", "noise: the host took 0.5 of a core", "quiet"),
        ([(0.99, 1.01)], [], "inconclusive", "too small to measure", "--no-speed"),
        ([(0.7, 0.9), (1.1, 1.3)], [], "pass", "in openvino (1.10", ""),
        ([(0.7, 0.9), (0.8, 1.3)], [], "inconclusive", "in openvino (0.80", "quiet"),
    ],
)
def test_speed_has_three_verdicts_each_with_its_advice(
    intervals: list[tuple[float, float]], noise: list[str], verdict: str, said: str, remedy: str
) -> None:
    engines = [_timed(*each, engine=name) for each, name in zip(intervals, ("onnxruntime", "openvino"), strict=False)]
    found = speed_claim(engines, noise)
    assert (found.subject, found.verdict) == ("speed", verdict)
    assert said in found.text
    assert remedy in found.remedy


@pytest.mark.parametrize(
    ("verdict", "remedy"),
    [("pass", ""), ("inconclusive", "about 1,200 evaluation images"), ("fail", "vit-edge explain")],
)
def test_accuracy_has_three_verdicts_each_with_its_advice(verdict: str, remedy: str) -> None:
    engines = [_engine(verdict=verdict, images_needed=1200), _engine(engine="openvino")]
    found = accuracy_claim({"verdict": verdict, "engines": engines})
    assert str(found).startswith(f"accuracy: {verdict}, on 550 images INT8 loses 0.00 points, no more than 0.50")
    assert remedy in found.remedy
    assert bool(found.remedy) == (verdict != "pass")


def test_the_worst_claim_is_the_verdict() -> None:
    speed = speed_claim([_timed(0.9, 1.2)], [])
    lossless = accuracy_claim({"verdict": "pass", "engines": [_engine()]})
    lossy = accuracy_claim({"verdict": "fail", "engines": [_engine(verdict="fail")]})
    assert worst_verdict([lossless]) == "pass"
    assert worst_verdict([lossless, speed]) == "inconclusive"
    assert worst_verdict([lossy, speed]) == "fail"


@pytest.mark.parametrize(("exit_code", "verdict"), [(7, "inconclusive"), (6, "fail"), (4, "fail")])
def test_a_device_without_results_is_open_unless_the_files_failed_there(exit_code: int, verdict: str) -> None:
    found = device_claim({"device": "pi", "results": [], "error": "no route", "error_exit_code": exit_code})
    assert str(found) == f"speed on pi: {verdict}, nothing was measured: no route"


def test_a_folder_has_the_hash_of_its_names_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1").write_bytes(b"x")
    first = folder_sha256(tmp_path)
    (tmp_path / "a" / "1").rename(tmp_path / "a" / "2")
    assert folder_sha256(tmp_path) != first
    with pytest.raises(InputError, match="no such folder"):
        folder_sha256(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="no accuracy budget"):
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
        vit_edge(*shlex.split(record["commands"][step])[1:], cwd=tmp_path / "f" / "out")
    # The same files, step by step.
    for name, digest in record["files"].items():
        assert sha256_hex((tmp_path / "f" / "out" / name).read_bytes()) == digest, record["commands"]
    for wrong, text in (
        (("deploy",), "SOURCE, --calibration, --data is missing"),
        (("deploy", "x", "--check", "y"), "no source"),
    ):
        refused = vit_edge(*wrong, cwd=tmp_path)
        assert refused.returncode == 2
        assert text in refused.stderr


def test_a_model_file_and_a_divided_folder_are_enough(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "out" / "model.onnx", tmp_path / "mine.onnx")
    for name, there in (("train", "calibration"), ("test", "data")):
        shutil.copytree(folder / there, tmp_path / "images" / name)
    given = ("--data", "images", "--max-drop", "90", "--effort", "fast", "--no-speed", "-o", "out", "--json")
    done = vit_edge("deploy", "mine.onnx", *given, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.onnx").read_bytes() == (tmp_path / "mine.onnx").read_bytes()
    record = read_record(tmp_path / "out" / "record.json")
    assert record["folders"] == {"calibration": "../images/train", "data": "../images"}
    assert list(record["commands"]) == ["check", "quantize"]
    assert check_record(tmp_path / "out" / "record.json", measure_speed=False).verdict == "pass"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("int8.onnx", "--data", "images"), "the file is int8 already"),
        (("mine.onnx", "--data", "images", "--labels", "names.txt"), "--labels is for checkpoints"),
        (("mine.onnx", "--data", "images/test"), "--calibration is missing"),
    ],
)
def test_a_model_file_that_cannot_be_deployed_says_why(
    folder: Path, tmp_path: Path, arguments: tuple[str, ...], reason: str
) -> None:
    shutil.copy(folder / "out" / "model.onnx", tmp_path / "mine.onnx")
    shutil.copy(folder / "out" / "model.int8.onnx", tmp_path / "int8.onnx")
    shutil.copytree(folder / "calibration", tmp_path / "images" / "train")
    shutil.copytree(folder / "data", tmp_path / "images" / "test")
    (tmp_path / "names.txt").write_text("a\nb\n")
    done = vit_edge("deploy", *arguments, "--max-drop", "1", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert reason in done.stderr
    assert not (tmp_path / "deploy" / "model.onnx").exists()


def test_export_of_a_model_file_names_the_commands_for_it(folder: Path, tmp_path: Path) -> None:
    done = vit_edge("export", folder / "out" / "model.onnx", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "is a model file of vit-edge already" in done.stderr
