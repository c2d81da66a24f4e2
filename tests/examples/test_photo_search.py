"""The photo search finds what is similar, with the model file alone, in float32 and in INT8."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from tests.conftest import ROOT
from tests.support.encoders import NUM_IMAGES

SCRIPT = ROOT / "examples" / "photo_search" / "search.py"
# Torch and onnx cannot be imported: a device does not have them.
_RUN = """
import runpy, sys
for name in ("torch", "torchvision", "onnx", "scipy"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def _search(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _RUN, SCRIPT, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_a_copy_of_a_photograph_is_found_first(small_encoder: Path, tmp_path: Path) -> None:
    shutil.copytree(small_encoder / "images", tmp_path / "photos")
    (tmp_path / "photos" / "even" / "bad.jpg").write_bytes(b"no photograph")
    query = tmp_path / "photos" / "odd" / "0033.png"
    with Image.open(query) as image:
        image.save(tmp_path / "copy.bmp")
    for name in ("e.onnx", "e.int8.onnx"):
        model = small_encoder / name
        indexed = _search("index", "photos", "--model", model, "--index", f"{name}.npz", cwd=tmp_path)
        assert indexed.returncode == 0, indexed.stderr
        assert json.loads(indexed.stdout)["photographs"] == NUM_IMAGES
        assert "bad.jpg" in indexed.stderr
        found = _search("find", "copy.bmp", "--model", model, "--index", f"{name}.npz", "--top", "3", cwd=tmp_path)
        assert found.returncode == 0, found.stderr
        results = [json.loads(line) for line in found.stdout.splitlines()]
        assert len(results) == 3
        assert results[0]["file"] == "photos/odd/0033.png"
        assert results[0]["similarity"] > 0.9999
        assert results[0]["similarity"] >= results[1]["similarity"] >= results[2]["similarity"]
    with np.load(tmp_path / "e.onnx.npz") as index:
        np.testing.assert_allclose(np.linalg.norm(index["vectors"], axis=1), 1, atol=1e-5)
    mixed = _search("find", "copy.bmp", "--model", small_encoder / "e.onnx", "--index", "e.int8.onnx.npz", cwd=tmp_path)
    assert mixed.returncode == 3
    assert "another encoder file" in mixed.stderr
