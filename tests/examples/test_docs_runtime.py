"""Every example of docs/runtime.md gives what stands below it."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

from tests.conftest import ROOT, Workspace


def test_the_examples_of_the_document_run(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIT_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(workspace.folder)
    flags = doctest.ELLIPSIS | doctest.FAIL_FAST
    found = doctest.testfile(str(ROOT / "docs" / "runtime.md"), module_relative=False, optionflags=flags)
    assert found.attempted > 25
    assert found.failed == 0
