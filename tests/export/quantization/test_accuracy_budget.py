"""A budget is certified by images that judge, in an order that they did not choose; what ruins INT8 stays float."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, Workspace, vit_edge
from vit_edge.checkpoint import load_checkpoint, save_checkpoint
from vit_edge.errors import Interrupted, UsageError
from vit_edge.export import QuantizationOptions, QuantizationResult, export_onnx, quantize
from vit_edge.export.quantization.accuracy_budget import StepCache, ordered_by_noise, step_sizes
from vit_edge.model_file.artifact import open_model

CALIBRATION = ROOT / "calibration_data"
_BAD = "block.1.fc2"
_QUICK = {"effort": "fast", "measure_speed": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, workspace: Workspace) -> Path:
    """The digits' network with one product that INT8 ruins, and links to the images."""
    folder = tmp_path_factory.mktemp("budget")
    checkpoint = load_checkpoint(workspace.checkpoint)
    with torch.no_grad():
        # Pairs of inputs, one a multiple of the other, whose large weights cancel: their rounding errors do not.
        mlp, random = checkpoint.model.blocks[1].mlp, torch.Generator().manual_seed(0)
        mlp.fc1.bias[:8] = 12  # where GELU is the identity
        mlp.fc1.weight[8:16], mlp.fc1.bias[8:16] = 1.37 * mlp.fc1.weight[:8], 1.37 * mlp.fc1.bias[:8]
        mlp.fc2.weight[:, :8] = 60 * torch.randn((len(mlp.fc2.weight), 8), generator=random)
        mlp.fc2.weight[:, 8:16] = -mlp.fc2.weight[:, :8] / 1.37
    save_checkpoint(folder / "c.safetensors", checkpoint)
    export_onnx(folder / "c.safetensors", out=folder / "m.onnx")
    (folder / "calibration").symlink_to(CALIBRATION)
    (folder / "judging").symlink_to(workspace.test_images)
    return folder


def quantized(folder: Path, out: Path, options: QuantizationOptions, *, data: Path | None = None) -> QuantizationResult:
    return quantize(folder / "m.onnx", calibration=folder / "calibration", data=data, out=out, options=options)


def verified(folder: Path, model: Path) -> subprocess.CompletedProcess[str]:
    reference, data = folder / "m.onnx", folder / "judging"
    return vit_edge("verify", model, "--reference", reference, "--data", data, "--max-drop", "1.5")


def test_the_ruined_product_is_found_and_spared_and_the_bound_holds(folder: Path, tmp_path: Path) -> None:
    done = vit_edge(
        "quantize", folder / "m.onnx", "--calibration", folder / "calibration", "--data", folder / "judging",
        "--max-drop", "1.5", "--effort", "fast", "--no-speed", "--no-cache", "-o", tmp_path / "q.onnx", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["verdict"] == "pass"
    assert _BAD in result["float32_ops"]
    assert len(result["float32_ops"]) <= 3
    steps = result["search"]["steps"]
    assert [step["verdict"] for step in steps[:-1]] == ["pass"] * (len(steps) - 1)
    assert all(entry["drop_upper_bound_points"] <= 1.5 for entry in result["evaluation"])
    manifest = open_model(tmp_path / "q.onnx").manifest
    assert manifest.evaluation is not None
    assert manifest.quantization is not None
    assert manifest.evaluation["verdict"] == "pass"
    assert manifest.quantization["float32_ops"] == result["float32_ops"]
    done = verified(folder, tmp_path / "q.onnx")
    assert done.returncode == 0, done.stderr


def test_without_a_budget_the_same_network_is_ruined(folder: Path, tmp_path: Path) -> None:
    quantized(folder, tmp_path / "q.onnx", QuantizationOptions(**_QUICK))  # type: ignore[arg-type]
    done = verified(folder, tmp_path / "q.onnx")
    assert done.returncode == 6


def test_too_few_images_are_said_first_and_the_file_holds_its_verdict(
    folder: Path, workspace: Workspace, tmp_path: Path
) -> None:
    for path in sorted((folder / "judging").resolve().rglob("*.png"))[::9]:
        target = tmp_path / "few" / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    done = vit_edge(
        "quantize", workspace.float_model, "--calibration", folder / "calibration", "--data", tmp_path / "few",
        "--max-drop", "0.5", "--effort", "fast", "--no-speed", "--no-cache", "-o", tmp_path / "q.onnx", "--json",
    )  # fmt: skip
    assert done.returncode == 6
    assert "598" in "".join(done.stderr.splitlines()[:3])  # before anything is calibrated
    assert "calibrating" not in "".join(done.stderr.splitlines()[:3])
    printed = json.loads(done.stdout)
    assert printed["verdict"] == "inconclusive"
    assert printed["images_needed"] >= 598
    evaluation = open_model(tmp_path / "q.onnx").manifest.evaluation
    assert evaluation is not None
    assert evaluation["verdict"] == "inconclusive"


def test_without_labels_agreement_is_certified(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "loose").mkdir()
    for path in (folder / "judging").resolve().rglob("*.png"):
        shutil.copy(path, tmp_path / "loose" / f"{path.parent.name}-{path.name}")
    options = QuantizationOptions(min_agreement=98, use_cache=False, **_QUICK)  # type: ignore[arg-type]
    result = quantized(folder, tmp_path / "q.onnx", options, data=tmp_path / "loose")
    assert result.verification is not None
    assert result.verification.verdict == "pass"
    assert _BAD in result.float32_ops


def test_a_search_that_was_stopped_goes_on_and_ends_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIT_EDGE_CACHE", str(tmp_path / "cache"))

    def run(name: str, **more: float) -> str:
        options = QuantizationOptions(max_drop_points=1.5, **_QUICK, **more)  # type: ignore[arg-type]
        result = quantized(folder, tmp_path / name, options, data=folder / "judging")
        assert result.search is not None
        if more:
            assert result.search.cut_short == "time limit"
            assert len(result.search.steps) == 1
            evaluation = open_model(tmp_path / name).manifest.evaluation
            assert evaluation is not None
            assert evaluation["cut_short"] == "time limit"
        return result.sha256

    cut = run("cut.onnx", time_limit_s=1e-6)
    kept = list((tmp_path / "cache" / "budget").iterdir())
    assert len(kept) == 1
    whole = run("whole.onnx")
    kept[0].write_text("{")  # damaged: judged again
    assert run("again.onnx") == whole != cut


def interrupted(folder: Path, cache: Path, kept: str, *more: str | Path) -> str:
    """Return what `vit-edge quantize` says where Ctrl-C comes as soon as its cache holds a file that matches `kept`."""
    command = [
        sys.executable, "-m", "vit_edge", "quantize", folder / "m.onnx", "--calibration", folder / "calibration",
        "--effort", "fast", "--no-speed", *more,
    ]  # fmt: skip
    environment = {"VIT_EDGE_CACHE": str(cache), "PATH": ""}
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        deadline = time.monotonic() + 120
        while not list(cache.glob(kept)) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    lines = said.decode().splitlines()
    assert [line for line in lines if "interrupted" in line] == lines[-2:-1]
    return lines[-1]


def test_ctrl_c_leaves_the_best_file_so_far(folder: Path, tmp_path: Path) -> None:
    judged = ("--data", folder / "judging", "--max-drop", "1.5", "-o", tmp_path / "q.onnx")
    assert "the file holds the best model so far" in interrupted(folder, tmp_path / "cache", "budget/*.json", *judged)
    evaluation = open_model(tmp_path / "q.onnx").manifest.evaluation
    assert evaluation is not None
    assert evaluation["verdict"] == "pass"
    assert evaluation["cut_short"] == "interrupted"


def test_ctrl_c_while_a_verdict_is_being_kept_finds_the_best_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setenv("VIT_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(StepCache, "keep", stopped)
    options = QuantizationOptions(max_drop_points=1.5, **_QUICK)  # type: ignore[arg-type]
    with pytest.raises(Interrupted, match="the file holds the best model so far"):
        quantized(folder, tmp_path / "q.onnx", options, data=folder / "judging")
    evaluation = open_model(tmp_path / "q.onnx").manifest.evaluation
    assert evaluation is not None
    assert evaluation["verdict"] == "pass"


def test_ctrl_c_before_there_is_a_file_says_that_the_calibration_is_kept(folder: Path, tmp_path: Path) -> None:
    said = interrupted(folder, tmp_path / "cache", "calibration/*", "-o", tmp_path / "q.onnx")
    assert "run the same command to continue" in said
    assert not (tmp_path / "q.onnx").exists()


def test_the_last_steps_differ_by_one_and_the_noisiest_come_last() -> None:
    assert step_sizes(51) == [26, 39, 45, 48, 50, 51]
    assert step_sizes(1) == [1]
    assert step_sizes(2) == [1, 2]
    noise = {"a": 1e-3, "b": 1e-6, "c": 1e-3}
    assert ordered_by_noise(noise, {"a": 10, "b": 10, "c": 1000}) == ["b", "c", "a"]


def test_a_budget_needs_images_that_judge(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs evaluation images"):
        quantized(folder, tmp_path / "q.onnx", QuantizationOptions(max_drop_points=1.0))
    assert not list(tmp_path.iterdir())
