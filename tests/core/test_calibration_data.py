"""The images that ship are those the script makes, and none of them judges."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

from tests.conftest import ROOT
from vit_edge.files import sha256_hex

SHIPPED = ROOT / "calibration_data"


def _files(folder: Path) -> dict[str, str]:
    paths = [*folder.rglob("*.png"), *folder.rglob("manifest.json")]
    return {path.relative_to(folder).as_posix(): sha256_hex(path.read_bytes()) for path in paths}


def test_the_script_reproduces_what_ships_byte_for_byte(tmp_path: Path) -> None:
    subprocess.run([sys.executable, SHIPPED / "make_digits.py", "--calibration", tmp_path], check=True)
    assert _files(tmp_path) == _files(SHIPPED)


def test_the_manifest_lists_every_image_and_classes_are_balanced() -> None:
    entries = json.loads((SHIPPED / "manifest.json").read_text())["images"]
    assert len(entries) == 128
    assert {entry["file"]: entry["sha256"] for entry in entries} == {
        name: digest for name, digest in _files(SHIPPED).items() if name != "manifest.json"
    }
    assert set(Counter(entry["class"] for entry in entries).values()) == {12, 13}


def test_no_test_image_is_among_them(digits: Path) -> None:
    test, training = _files(digits / "test"), _files(digits / "train")
    assert (len(test), len(training)) == (360, 1437)
    assert not set(test.values()) & set(training.values())
    assert not set(test.values()) & set(_files(SHIPPED).values())
    assert set(training.values()) > {digest for name, digest in _files(SHIPPED).items() if name != "manifest.json"}


def test_the_test_split_has_every_class_in_proportion(digits: Path) -> None:
    for name in map(str, range(10)):
        test, training = (len(list((digits / split / name).iterdir())) for split in ("test", "train"))
        assert abs(test / (test + training) - 360 / 1797) < 0.005
