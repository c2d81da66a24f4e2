"""The scripts that measure the runtime run to their end and tell what they measured."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT, Workspace

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")


def measured(folder: Path, script: str, *arguments: str | Path) -> Any:
    """Run a script, and return its figures; its section has to stand in its copy of docs/results.md."""
    shutil.copy(ROOT / "docs" / "results.md", folder / "results.md")
    command = [sys.executable, ROOT / "benchmarks" / script, *arguments, "--results", "results.md", "--json", "m.json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in (folder / "results.md").read_text(encoding="utf-8")
    return json.loads((folder / "m.json").read_bytes())


def test_overload_refuses_and_answers(workspace: Workspace, tmp_path: Path) -> None:
    options = ("--images", workspace.test_images / "3", "--seconds", "1", "--queue-size", "4")
    for row in measured(tmp_path, "runtime/serving.py", workspace.int8_model, *options):
        assert row["refused"] > 0
        assert row["accepted"] > 0
        assert 0 < row["service_p50_ms"] <= row["bound_ms"]
        assert row["accepted_p50_ms"] <= row["accepted_p99_ms"]


def test_models_that_change_under_load_leave_no_answer_out(workspace: Workspace, tmp_path: Path) -> None:
    options = ("--images", workspace.test_images / "3", "--seconds", "2", "--interval-ms", "50")
    for row in measured(tmp_path, "runtime/swapping.py", workspace.float_model, workspace.int8_model, *options):
        assert (row["failed"], row["mixed"]) == (0, 0)
        assert row["of_one"] > 0
        assert row["of_other"] > 0
        assert row["swaps"] >= 4
        assert row["refused"] >= 2


def test_answers_and_loads_leave_nothing(workspace: Workspace, tmp_path: Path) -> None:
    for row in measured(tmp_path, "runtime/soak.py", workspace.int8_model, "--runs", "2000", "--cycles", "20"):
        assert (row["runs"], row["wrong"], row["cycles"]) == (2000, 0, 20)
        assert (row["threads_left"], row["files_left"]) == (0, 0)


def test_every_contestant_answers_from_a_file(small_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    shutil.copy(small_model / "m.onnx", tmp_path)
    (tmp_path / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "images" / "p.jpg", quality=95)
    brief = ("--rounds", "1", "--queries", "1", "--enlarged-side", "400")
    options = ("--models", tmp_path / "m.onnx", "--images", tmp_path / "images", *brief)
    found = measured(tmp_path, "runtime/end_to_end.py", small_model / "c.safetensors", *options)
    for rows in found["timed"].values():
        assert len(rows) == 4
        assert rows["ours, m.onnx"]["said"] in "abcdefg"
        assert all(row["min_ms"] > 0 for row in rows.values())
    as_they_are, enlarged = found["effects"]
    for effect in (as_they_are, enlarged):  # both are larger than twice what the network takes
        assert effect["models"]["m.onnx"]["sqnr_db"] > 0
