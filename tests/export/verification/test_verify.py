"""The verdict rests on the bound, and damage does not pass."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.conftest import Workspace, vit_edge
from vit_edge.data import find_images
from vit_edge.errors import DataRejected, InputError, UsageError
from vit_edge.export import verify
from vit_edge.export.verification.request import open_request
from vit_edge.export.verification.verdict import decide_from_logits
from vit_edge.export.verification.verifier import run_verification
from vit_edge.metrics import best_certifiable_points, drop_upper_bound_points
from vit_edge.model_file.artifact import open_model

# Lines of progress: on a busy machine they come before what is checked here.
PROGRESS = ("starting", "reading the files")


def test_the_readme_run_passes_in_both_engines_with_98_percent_agreement(workspace: Workspace) -> None:
    printed = workspace.printed["verify"]
    assert printed["verdict"] == "pass"
    assert {entry["engine"] for entry in printed["results"]} == {"onnxruntime", "openvino"}
    for entry in printed["results"]:
        assert entry["images"] == 360
        assert entry["agreement"] >= 98
        assert entry["sqnr_db"] > 25
        bound = drop_upper_bound_points(360, worse=entry["worse"], better=entry["better"])
        assert entry["drop_upper_bound_points"] == pytest.approx(bound)
        assert entry["drop_points"] == pytest.approx(entry["reference"]["top1"] - entry["candidate"]["top1"])
    assert printed["best_certifiable_points"] == pytest.approx(best_certifiable_points(360))
    assert set(printed) >= {"images", "reference", "candidate", "drop_points", "agreement", "sqnr_db"}


def test_too_few_images_are_inconclusive_with_the_number_needed(workspace: Workspace, tmp_path: Path) -> None:
    for path in find_images(workspace.test_images)[::9]:
        target = tmp_path / "few" / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    done = vit_edge(
        "verify", workspace.float_model, "--reference", workspace.float_model, "--data", tmp_path / "few", "--max-drop",
        "0.5", "--json",
    )  # fmt: skip
    assert done.returncode == 6
    first = [line for line in done.stderr.splitlines() if line not in PROGRESS][:2]
    assert first[0] == "40 images: the minimum certifiable drop is 7.22 points (limit 0.5)"
    assert first[1] == "even an unchanged model cannot pass with so few: use at least 598 images"
    printed = json.loads(done.stdout)
    assert printed["verdict"] == "inconclusive"
    assert printed["images_needed"] == printed["images_needed_at_best"] == 598
    assert printed["too_few_images"] is True
    assert printed["error"]["exit_code"] == 6


def _damaged(source: Path, target: Path, how: str, name: str = "block.0.fc1.weight.quantized") -> None:
    model = onnx.load(source)
    tensor = next(t for t in model.graph.initializer if t.name == name)
    weight = numpy_helper.to_array(tensor).copy()
    rng = np.random.default_rng(0)
    if how == "shuffled":
        weight = rng.permutation(weight, axis=0)
    elif how == "zeroed":
        weight[:] = 0
    elif how == "one percent":
        hit = rng.random(weight.shape) < 0.01
        weight[hit] = rng.integers(-63, 64, int(hit.sum()))
    else:
        weight[100, 100] ^= 32
    tensor.CopyFrom(numpy_helper.from_array(weight, tensor.name))
    onnx.save(model, target)


@pytest.mark.parametrize("how", ["shuffled", "zeroed", "one percent", "one bit"])
def test_damaged_weights_that_were_sealed_again_do_not_pass(workspace: Workspace, tmp_path: Path, how: str) -> None:
    _damaged(workspace.int8_model, tmp_path / "m.onnx", how)
    arguments = ("--reference", workspace.float_model, "--data", workspace.test_images, "--max-drop", "4", "--json")
    unsealed = vit_edge("verify", tmp_path / "m.onnx", *arguments)
    assert unsealed.returncode == 4
    assert vit_edge("seal", tmp_path / "m.onnx").returncode == 0
    sealed = vit_edge("verify", tmp_path / "m.onnx", *arguments)
    assert sealed.returncode == 6, sealed.stderr
    error = json.loads(sealed.stdout)["error"]
    assert error["type"] == "GoldenMismatch"
    assert error["file"] == str(tmp_path / "m.onnx")


def test_a_damaged_model_with_golden_vectors_of_its_own_fails_on_accuracy(workspace: Workspace, tmp_path: Path) -> None:
    """Whoever damages a file can also record new golden vectors: then the verdict itself has to see it."""
    from vit_edge.export.parity.golden_vectors import with_answers
    from vit_edge.model_file.artifact import reseal

    _damaged(workspace.int8_model, tmp_path / "m.onnx", "shuffled", "head.weight.quantized")
    finished = with_answers(reseal(tmp_path / "m.onnx"), open_model(workspace.float_model))
    (tmp_path / "m.onnx").write_bytes(finished.data)
    done = vit_edge(
        "verify", tmp_path / "m.onnx", "--reference", workspace.float_model, "--data", workspace.test_images,
        "--max-drop", "4", "--json",
    )  # fmt: skip
    assert done.returncode == 6
    printed = json.loads(done.stdout)
    assert printed["verdict"] == "fail"
    assert printed["drop_points"] > 4


def _logits(*, images: int, worse: int = 0, better: int = 0, neither: int = 0) -> tuple[Any, Any, Any]:
    """Return logits of three classes and labels with so many answers changed; the rest is right on both sides."""
    eye = np.eye(3, dtype=np.float32)
    before, after = np.zeros(images, dtype=np.int64), np.zeros(images, dtype=np.int64)
    after[:worse], before[worse : worse + better], after[worse + better : worse + better + neither] = 1, 1, 1
    labels = np.zeros(images, dtype=np.int64)
    labels[worse + better : worse + better + neither] = 2
    return eye[before], eye[after], labels


@pytest.mark.parametrize(
    ("changed", "budget", "expected", "needed"),
    [
        ({"images": 300}, {"max_drop_points": 1}, "pass", None),
        ({"images": 300, "worse": 4}, {"max_drop_points": 1}, "fail", None),
        ({"images": 300, "worse": 1}, {"max_drop_points": 1}, "inconclusive", range(500, 1500)),
        ({"images": 300, "neither": 9}, {"max_drop_points": 1}, "pass", None),
        ({"images": 40}, {"max_drop_points": 0.5}, "inconclusive", [598]),
        # One lost answer of 40 proves nothing about half a point; five do.
        ({"images": 40, "worse": 1}, {"max_drop_points": 0.5}, "inconclusive", [598]),
        ({"images": 40, "worse": 5}, {"max_drop_points": 0.5}, "fail", None),
        ({"images": 550, "worse": 2, "better": 1}, {"min_agreement": 98.5}, "pass", None),
        ({"images": 550, "neither": 3}, {"min_agreement": 99}, "inconclusive", range(900, 4000)),
        ({"images": 550, "neither": 6}, {"min_agreement": 99}, "fail", None),
        ({"images": 40}, {"min_agreement": 99}, "inconclusive", [299]),
        ({"images": 550}, {"min_agreement": 100}, "inconclusive", None),
        ({"images": 550, "neither": 30}, {"max_drop_points": 1, "min_agreement": 99}, "fail", None),
        ({"images": 300}, {"max_drop_points": 1, "min_agreement": 99.5}, "inconclusive", [598]),
    ],
)  # fmt: skip
def test_the_verdict_rests_on_bounds_in_one_place(
    changed: dict[str, int], budget: dict[str, float], expected: str, needed: Any
) -> None:
    reference, candidate, labels = _logits(**changed)
    verdict, figures, images_needed = decide_from_logits(reference, candidate, labels, **budget)
    assert verdict == expected
    assert figures.images == changed["images"]
    assert images_needed is None if needed is None else images_needed in needed


def test_without_labels_a_changed_prediction_counts_as_lost_and_never_fails() -> None:
    reference, candidate, labels = _logits(images=600, neither=30)
    assert decide_from_logits(reference, candidate, labels, max_drop_points=1)[0] == "pass"
    verdict, figures, needed = decide_from_logits(reference, candidate, None, max_drop_points=1)
    assert (verdict, figures.unlabelled, needed) == ("inconclusive", 30, None)
    assert decide_from_logits(reference, candidate, None, max_drop_points=7)[0] == "pass"
    with pytest.raises(UsageError, match="no accuracy budget"):
        decide_from_logits(reference, candidate, labels)


def test_the_classes_that_lost_and_the_predictions_that_changed_are_reported(
    workspace: Workspace, tmp_path: Path
) -> None:
    from vit_edge.export.parity.golden_vectors import with_answers
    from vit_edge.model_file.artifact import reseal

    _damaged(workspace.int8_model, tmp_path / "m.onnx", "shuffled", "head.weight.quantized")
    finished = with_answers(reseal(tmp_path / "m.onnx"), open_model(workspace.float_model))
    (tmp_path / "m.onnx").write_bytes(finished.data)
    found = verify(tmp_path / "m.onnx", reference=workspace.float_model, data=workspace.test_images)
    result = found.decisive
    assert result.reference_top5 is not None
    assert result.reference_top5 > (result.candidate_top5 or 0)
    losses = [entry.lost for entry in result.worst_classes]
    assert losses == sorted(losses, reverse=True)
    for entry in result.worst_classes:
        assert entry.images == len(list((workspace.test_images / entry.label).iterdir()))
        assert entry.reference_right is not None
        assert entry.lost == entry.reference_right - (entry.candidate_right or 0)
    assert len(result.changed) == result.num_changed > 20
    for change in result.changed:
        assert change.label == Path(change.path).parent.name
        assert change.reference != change.candidate
        assert min(change.reference_margin, change.candidate_margin) >= 0
    assert sum(change.effect == "worse" for change in result.changed) == result.worse
    assert sum(change.effect == "better" for change in result.changed) == result.better


def test_agreement_can_be_required(workspace: Workspace) -> None:
    found = verify(
        workspace.int8_model,
        reference=workspace.float_model,
        data=workspace.test_images,
        max_drop_points=4,
        min_agreement=96,
    )
    assert found.verdict == "pass"
    assert all(result.agreement_lower_bound >= 96 for result in found.results)
    with pytest.raises(UsageError, match="min agreement"):
        verify(
            workspace.int8_model,
            reference=workspace.float_model,
            data=workspace.test_images,
            min_agreement=float("nan"),
        )


def test_duplicates_of_an_image_count_once(
    workspace: Workspace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for copy in range(3):
        for path in find_images(workspace.test_images)[::6]:
            target = tmp_path / "copies" / path.parent.name / f"{copy}-{path.name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    found = verify(workspace.int8_model, reference=workspace.float_model, data=tmp_path / "copies")
    assert found.results[0].images == 60
    assert "120 images are duplicates" in caplog.text


def test_a_perfect_reference_on_few_images_is_inconclusive_not_refused(workspace: Workspace, tmp_path: Path) -> None:
    for name in ("0", "1"):
        target = tmp_path / "few" / name / "a.png"
        target.parent.mkdir(parents=True)
        shutil.copy(sorted((workspace.test_images / name).iterdir())[0], target)
    found = verify(workspace.int8_model, reference=workspace.float_model, data=tmp_path / "few")
    assert found.verdict == "inconclusive"


@pytest.mark.parametrize(
    ("right", "reason"), [(0, "no better than chance"), (1, r"far below the 9\d\.\d % in its manifest")]
)
def test_wrong_labels_are_not_blamed_on_int8(workspace: Workspace, tmp_path: Path, right: int, reason: str) -> None:
    for number, path in enumerate(find_images(workspace.test_images)[::3]):
        shift = 0 if number % 4 < right else 1
        target = tmp_path / "wrong" / str((int(path.parent.name) + shift) % 10) / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    with pytest.raises(DataRejected, match=reason):
        verify(workspace.int8_model, reference=workspace.float_model, data=tmp_path / "wrong")


def test_a_model_with_other_labels_is_not_compared(workspace: Workspace, tmp_path: Path) -> None:
    model = open_model(workspace.int8_model)
    relabelled = replace(model.manifest, labels=tuple("abcdefghij"))
    (tmp_path / "m.onnx").write_bytes(model.with_manifest(relabelled))
    with pytest.raises(InputError, match="the labels differ"):
        verify(tmp_path / "m.onnx", reference=workspace.float_model, data=workspace.test_images)


@pytest.mark.parametrize("points", [0, -1, 100])
def test_a_budget_that_makes_no_sense_is_refused(workspace: Workspace, points: float) -> None:
    with pytest.raises(UsageError, match="max drop"):
        verify(
            workspace.int8_model,
            reference=workspace.float_model,
            data=workspace.test_images,
            max_drop_points=points,
        )


def test_the_files_are_checked_before_anything_is_said_of_the_images(workspace: Workspace, tmp_path: Path) -> None:
    images = ("--data", workspace.test_images)
    for model, reference, named in (
        (tmp_path / "none.onnx", workspace.float_model, "none.onnx"),
        (workspace.int8_model, tmp_path / "none.onnx", "none.onnx"),
        (workspace.int8_model, workspace.int8_model, "a reference is float32"),
    ):
        done = vit_edge("verify", model, "--reference", reference, *images)
        assert done.returncode in (2, 3)
        said = [line for line in done.stderr.splitlines() if line not in PROGRESS]
        assert said[0].startswith("error: ")
        assert named in said[0]


def test_the_verdict_is_the_first_line_and_nothing_is_cut_at_80_columns(workspace: Workspace) -> None:
    env = {**os.environ, "COLUMNS": "80"}
    command = [sys.executable, "-m", "vit_edge", "verify", str(workspace.int8_model), "--reference",
               str(workspace.float_model), "--data", str(workspace.test_images), "--max-drop", "4"]  # fmt: skip
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    first, *rest = done.stdout.splitlines()
    assert first.startswith("pass: on 360 images the accuracy drop is ")
    for name in ("top-1, reference", "drop, 95 % upper bound", "agreement, 95 % interval", "McNemar p", "verdict"):
        assert any(line.split("  ")[0].strip() == name for line in rest), name


def test_an_opened_request_serves_several_candidates(workspace: Workspace) -> None:
    opened = open_request(workspace.float_model, reference=workspace.float_model, data=workspace.test_images)
    assert run_verification(opened).num_changed == 0
    candidate = replace(opened, model=open_model(workspace.int8_model))
    expected = verify(workspace.int8_model, reference=workspace.float_model, data=workspace.test_images)
    assert run_verification(candidate) == expected
