"""Every room reaches the wheel, and the wheel that goes to a device."""

from __future__ import annotations

import io
import shutil
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.policy.packages import expected_files, listed_packages, missing_packages
from tests.policy.ranks import modules


def test_setup_cfg_lists_every_room() -> None:
    assert missing_packages(ROOT) == {"not listed": set(), "not there": set()}


@pytest.mark.parametrize("folder", ["export/new_room", "runtime/serving/new_room", "vit_edge/new_room"])
def test_a_planted_room_that_setup_cfg_does_not_list_is_found(folder: str, tmp_path: Path) -> None:
    shutil.copy(ROOT / "setup.cfg", tmp_path)
    for path in modules(ROOT).values():
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.touch()
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "new.py").touch()
    (missing,) = missing_packages(tmp_path)["not listed"]
    assert missing.endswith("new_room")


def test_a_package_that_is_listed_and_not_there_is_found(tmp_path: Path) -> None:
    shutil.copy(ROOT / "setup.cfg", tmp_path)
    assert missing_packages(tmp_path)["not there"] == listed_packages(ROOT)


def test_the_wheel_for_a_device_holds_every_module() -> None:
    from vit_edge.remote.package import build_wheel

    names = {*zipfile.ZipFile(io.BytesIO(build_wheel())).namelist()}
    assert {name for name in expected_files(ROOT) if name.endswith(".py")} <= names
