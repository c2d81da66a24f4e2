"""Label files with several labels or values an image, in the forms that people write them."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from vit_edge.data.truths import read_label_sets, read_values
from vit_edge.errors import DataRejected

NAMES = ("cat", "tree top", "owl")


def _folder(root: Path, text: str, name: str = "labels.csv") -> Path:
    for letter in "ab":
        Image.new("RGB", (4, 4)).save(root / f"{letter}.png")
    (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("labels.csv", "file,label\na.png,cat|owl\nb.png,tree top\n"),
        ("labels.csv", 'file;tags\na.png;"cat, owl"\nb.png;tree top\n'),
        ("labels.csv", "file,labels\na.png,cat;owl\nb.png,1\n"),
        ("labels.csv", "file,labels\na.png,cat owl\nb.png,tree top\n"),
        ("labels.csv", "file,labels\na.png,cat,owl\nb.png,tree top\n"),
        ("labels.csv", "file,label\na.png,cat\nb.png,tree top\na.png,owl\n"),
        ("labels.csv", "image,Cat,Tree top,owl\na.png,1,0,1\nb.png,0,1.0,0\n"),
        ("metadata.jsonl", '{"file_name": "a.png", "label": ["cat", "owl"]}\n{"file_name": "b.png", "label": 1}\n'),
    ],
)
def test_sets_of_labels_are_read_in_every_form(tmp_path: Path, name: str, text: str) -> None:
    found = read_label_sets(_folder(tmp_path, text, name), names=NAMES)
    assert {path.name: sets for path, sets in found.items()} == {"a.png": (1, 0, 1), "b.png": (0, 1, 0)}


def test_an_image_may_have_no_label_and_class_folders_give_one(tmp_path: Path) -> None:
    found = read_label_sets(_folder(tmp_path, "file,labels\na.png,\nb.png,owl\n"), names=NAMES)
    assert [*found.values()] == [(0, 0, 0), (0, 0, 1)]
    (tmp_path / "c" / "owl").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "c" / "owl" / "x.png")
    assert [*read_label_sets(tmp_path / "c", names=NAMES).values()] == [(0, 0, 1)]


def test_values_come_from_columns_of_their_names_or_one_of_a_usual_name(tmp_path: Path) -> None:
    folder = _folder(tmp_path, "file,height,age\na.png,1.5,-2\nb.png,0,1e3\n")
    assert [*read_values(folder, names=("age", "height")).values()] == [(-2, 1.5), (1000, 0)]
    folder = _folder(tmp_path, "file,value\na.png,1.5\nb.png,2\n")
    assert [*read_values(folder, names=("0",)).values()] == [(1.5,), (2,)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("file,labels\na.png,cat|fox\n", "'fox' is not a label"),
        ("file,what\na.png,cat\n", "no column for the labels"),
        ("file,cat,tree top,owl\na.png,1,yes,0\n", "could not convert"),
        ("file,labels\nz.png,cat\n", "not there"),
    ],
)
def test_what_is_no_set_of_labels_is_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(DataRejected, match=said):
        read_label_sets(_folder(tmp_path, text), names=NAMES)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("file,value\na.png,nan\n", "finite"),
        ("file,value\na.png,1\na.png,2\n", "two values"),
        ("file,what\na.png,1\n", "no column for the value"),
    ],
)
def test_what_is_no_value_is_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(DataRejected, match=said):
        read_values(_folder(tmp_path, text), names=("age",))


def test_a_regression_needs_a_label_file_and_a_column_for_each_output(tmp_path: Path) -> None:
    with pytest.raises(DataRejected, match="come from a label file"):
        read_values(_folder(tmp_path, "", "notes.txt"), names=("age",))
    with pytest.raises(DataRejected, match="no column for 'height'"):
        read_values(_folder(tmp_path, "file,age\na.png,1\n"), names=("age", "height"))
