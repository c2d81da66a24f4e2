"""The examples do what they say, on files made here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT
from vit_edge.data import read_splits

FOODS = ("apple_pie", "pizza", "steak", "sushi")


def make_food101(root: Path) -> None:
    """Lay out a Food-101 as torchvision leaves it: 40 training and 20 test images of each of four foods."""
    meta, images = root / "food-101" / "meta", root / "food-101" / "images"
    meta.mkdir(parents=True)
    image = next((ROOT / "calibration_data").rglob("*.png")).read_bytes()
    for split, numbers in (("train", range(40)), ("test", range(40, 60))):
        names = {food: [f"{food}/{1000 + number}" for number in numbers] for food in FOODS}
        (meta / f"{split}.json").write_text(json.dumps(names))
        (meta / f"{split}.txt").write_text("".join(f"{name}\n" for food in FOODS for name in names[food]))
        for name in (name for food in FOODS for name in names[food]):
            (images / name).parent.mkdir(parents=True, exist_ok=True)
            (images / f"{name}.jpg").write_bytes(image)


def test_pizza_steak_and_sushi_are_drawn_as_the_tutorials_draw_them(tmp_path: Path) -> None:
    make_food101(tmp_path / "root")
    script = ROOT / "examples" / "pizza_steak_sushi.py"
    for name in ("a", "b"):
        command = [sys.executable, script, "--root", tmp_path / "root", "--out", tmp_path / name, "--percent", "10"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        assert done.stdout.splitlines() == ["train: 12 images", "test: 6 images"]
    files = [
        sorted(str(path.relative_to(tmp_path / name)) for path in (tmp_path / name).rglob("*.jpg")) for name in "ab"
    ]
    assert files[0] == files[1]
    splits = read_splits(tmp_path / "a", validation_fraction=0.0, seed=0)
    assert set(splits.train.class_names) <= {"pizza", "steak", "sushi"}
    assert splits.train.num_images == 12
    assert splits.test is not None
    assert splits.test.num_images == 6
    again = subprocess.run(command, check=False, capture_output=True, text=True)
    assert again.returncode != 0
    assert "exists" in again.stderr
