"""The wheel, built once from what git tracks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of what git tracks, as a release would."""
    folder = tmp_path_factory.mktemp("build")
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    archive = subprocess.run(
        ["tar", "--null", "--files-from=-", "-cf", "-"], cwd=ROOT, input=files, capture_output=True, check=True
    )
    (folder / "source").mkdir()
    subprocess.run(["tar", "-xf", "-"], cwd=folder / "source", input=archive.stdout, check=True)
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(folder / "source")]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*.whl"))
