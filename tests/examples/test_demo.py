"""`make demo`, without the installation: the whole chain ends with its table and its refusal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT, Workspace


def test_the_demo_runs_and_reports(tmp_path: Path, workspace: Workspace) -> None:
    """From a network that was trained on the same digits by the same command: that takes two minutes."""
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "demo.py", workspace.checkpoint.parent],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    rows = report["table"]
    assert [(row["precision"], row["engine"]) for row in rows] == [
        (precision, engine) for precision in ("float32", "int8") for engine in ("onnxruntime", "openvino")
    ]
    sizes = {row["precision"]: row["size_bytes"] for row in rows}
    assert sizes["int8"] <= 0.30 * sizes["float32"]
    assert all(row["agreement"] >= 98 and row["top1"] >= 96 for row in rows)
    assert report["verification"]["verdict"] == "pass"
    assert "One bit of a copy flipped: will not load the model file" in done.stdout
    for engine in ("onnxruntime", "openvino"):
        assert f"INT8 in {engine} is " in done.stdout
    lines = done.stdout.rstrip().splitlines()
    assert all("vit-edge " in line for line in lines[-3:])
    assert "…" not in done.stdout  # nothing is cut at 80 columns
