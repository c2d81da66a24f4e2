"""The wheel holds one package, and on a device it needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT, Workspace, vit_edge
from tests.policy.packages import expected_files


def test_the_wheel_holds_one_top_level_package(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"vit_edge"}
    assert len(names) == len(set(names))


def test_the_wheel_holds_every_module_and_template_of_the_tree(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info" not in name}
    expected = expected_files(ROOT)
    assert {"vit_edge/report/page.html", "vit_edge/py.typed", "vit_edge/runtime/engines/ort.py"} <= expected
    assert names == expected


# The lower bounds of setup.cfg for the runtime, and ONNX Runtime's.
OLDEST = ("numpy==1.24.*", "Pillow==10.1.*", "click==8.1.*", "rich==13.0.*", "protobuf==4.25.*", "onnxruntime==1.17.*")


def _environment(folder: Path, *packages: str) -> Path:
    """Return the interpreter of a new virtual environment with these packages."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return python


@pytest.mark.skipif(
    sys.version_info >= (3, 12), reason="ONNX Runtime 1.17 and numpy 1.24 have no wheels for this Python"
)
def test_the_oldest_packages_pass_the_golden_vectors(wheel: Path, workspace: Workspace, tmp_path: Path) -> None:
    python = _environment(tmp_path / "venv", str(wheel), *OLDEST)
    for model in (workspace.float_model, workspace.int8_model):
        done = vit_edge("classify", model, workspace.folder / "image.png", "--json", cwd=tmp_path, python=python)
        assert done.returncode == 0, done.stderr
        printed = json.loads(done.stdout)
        assert printed["images"][0]["label"] == "3"
        assert printed["model"]["engine_version"].startswith("1.17.")


# What a device gets: at most 12 packages and 200 MB, and an import of at most 0.3 s beside numpy's and the engine's.
_SMALL = """
import importlib.metadata as m, pathlib, time
found = {d.metadata["Name"]: d for d in m.distributions() if d.metadata["Name"] not in ("pip", "setuptools")}
files = [pathlib.Path(d.locate_file(f)) for d in found.values() for f in d.files or ()]
size = sum(f.stat().st_size for f in files if f.is_file() and f.suffix != ".pyc")
assert len(found) <= 12, sorted(found)
assert 50e6 < size <= 200e6, size
import numpy, PIL.Image, onnxruntime
started = time.process_time()
import vit_edge.runtime
assert time.process_time() - started < 0.3
"""


def test_a_device_without_torch_classifies(wheel: Path, workspace: Workspace, tmp_path: Path) -> None:
    python = _environment(tmp_path / "venv", f"{wheel}[onnxruntime]")
    done = vit_edge(
        "classify", workspace.int8_model, workspace.folder / "image.png", "--json", cwd=tmp_path, python=python
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["images"][0]["label"] == "3"
    absent = "import importlib.util as u; assert not any(map(u.find_spec, ('torch', 'onnx', 'openvino', 'scipy')))"
    light = "import vit_edge.runtime, sys; assert 'torch' not in sys.modules"
    hidden = "import importlib.util as u; assert not u.find_spec('export') and not u.find_spec('runtime')"
    for script in (absent, light, hidden, _SMALL):
        subprocess.run([python, "-c", script], check=True, cwd=tmp_path)
    for arguments in (
        ("export", "x"),
        ("train", "x", "--out", "y"),
        ("verify", "a", "--reference", "b", "--data", "c"),
    ):
        done = vit_edge(*arguments, cwd=tmp_path, python=python)
        assert done.returncode == 7, done.stderr
        assert "pip install" in done.stderr
