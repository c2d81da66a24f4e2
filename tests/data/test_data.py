"""Folders of images, label files, and what is refused of them."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vit_edge.data import (
    Rejections,
    find_images,
    lies_loose,
    pixel_hashes,
    read_labelled,
    read_splits,
    read_unlabelled,
    refuse_overlap,
    set_hash,
    stream,
    stream_pixels,
)
from vit_edge.errors import DataRejected
from vit_edge.image import Preprocessing

PREPROCESSING = Preprocessing(resize=8, crop=(8, 8))


def image(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    return path


def test_class_folders_give_sorted_classes(tmp_path: Path) -> None:
    for name in ("b/2.png", "a/1.PNG", "b/deep/3.jpg"):
        image(tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    found = read_labelled(tmp_path)
    assert found.class_names == ("a", "b")
    assert found.labels == (0, 1, 1)


def test_a_divided_folder_gives_the_split_asked_for(tmp_path: Path) -> None:
    image(tmp_path / "train/a/1.png")
    image(tmp_path / "val/a/2.png")
    assert read_labelled(tmp_path, splits=("train",)).paths[0].name == "1.png"
    assert read_labelled(tmp_path, splits=("test", "val")).paths[0].name == "2.png"
    with pytest.raises(DataRejected, match="divided"):
        read_labelled(tmp_path)


@pytest.mark.parametrize(("name", "column"), [("labels.csv", "file"), ("metadata.csv", "file_name")])
def test_label_files_give_names_or_indices(tmp_path: Path, name: str, column: str) -> None:
    image(tmp_path / "x.png")
    image(tmp_path / "y.png")
    (tmp_path / name).write_text(f"{column},label\nx.png,dog\ny.png,cat\n")
    assert read_labelled(tmp_path, class_names=("cat", "dog")).labels == (1, 0)
    (tmp_path / name).write_text(f"{column},label\nx.png,1\ny.png,0\n")
    assert read_labelled(tmp_path, class_names=("cat", "dog")).labels == (1, 0)


def test_labels_that_the_model_does_not_have_are_named(tmp_path: Path) -> None:
    image(tmp_path / "zebra/1.png")
    with pytest.raises(DataRejected, match="'zebra'"):
        read_labelled(tmp_path, class_names=("cat", "dog"))


def test_names_and_indices_are_not_mixed(tmp_path: Path) -> None:
    for name in ("0", "1"):
        image(tmp_path / name / "a.png")
    assert read_labelled(tmp_path, class_names=("cat", "dog")).labels == (0, 1)
    with pytest.raises(DataRejected, match="'0'"):
        read_labelled(tmp_path, class_names=("1", "2", "3"))


def test_a_row_without_a_label_is_refused(tmp_path: Path) -> None:
    image(tmp_path / "x.png")
    (tmp_path / "labels.csv").write_text("file,label\nx.png,\n")
    with pytest.raises(DataRejected, match="no label"):
        read_labelled(tmp_path)


def test_a_label_file_that_names_missing_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("file,label\ngone.png,1\n")
    with pytest.raises(DataRejected, match=r"gone\.png"):
        read_labelled(tmp_path)


def test_an_empty_folder_a_file_and_a_missing_folder_are_refused(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path, "no image"),
        (tmp_path / "no", "no such"),
        (image(tmp_path / "f.png"), "not a"),
    ):
        if path.name == "f.png":
            with pytest.raises(DataRejected, match="not a folder"):
                find_images(path)
        else:
            with pytest.raises(DataRejected, match=message):
                find_images(path if path != tmp_path else _empty(tmp_path))


def _empty(tmp_path: Path) -> Path:
    (tmp_path / "empty").mkdir(exist_ok=True)
    return tmp_path / "empty"


def test_links_are_followed_and_those_that_lead_back_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image(tmp_path / "outside/1.png")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "outside/1.png")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    with caplog.at_level(logging.WARNING):
        assert [path.name for path in find_images(tmp_path / "in")] == ["link.png"]
    assert "1 links lead back" in caplog.text


def test_few_damaged_images_are_skipped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = [image(tmp_path / f"{i:03}.png", i) for i in range(150)]
    paths[70].write_bytes(b"damaged")
    with caplog.at_level(logging.WARNING):
        positions = [position for position, _ in stream_pixels(paths, PREPROCESSING)]
    assert len(positions) == 149
    assert 70 not in positions
    assert "1 of 150 images were skipped" in caplog.text
    assert "070.png" in caplog.text


def test_over_one_percent_damaged_is_refused_with_names(tmp_path: Path) -> None:
    paths = [image(tmp_path / f"{i:03}.png", i) for i in range(50)]
    paths[7].write_bytes(b"damaged")
    with pytest.raises(DataRejected, match=r"over 1 %.*007\.png"):
        list(stream_pixels(paths, PREPROCESSING))


def test_damaged_images_of_a_small_part_count_against_the_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = [image(tmp_path / f"{i}.png", i) for i in range(5)]
    paths[3].write_bytes(b"damaged")
    rejections = Rejections(200)
    assert len(list(stream_pixels(paths, PREPROCESSING, rejections=rejections))) == 4
    rejections.conclude()
    assert "1 of 200 images were skipped" in caplog.text
    list(stream_pixels(paths * 2, PREPROCESSING, rejections=rejections))
    with pytest.raises(DataRejected, match="3 or more of 200 images cannot be used, over 1 %"):
        rejections.conclude()


def test_one_label_file_may_name_the_images_of_every_split(tmp_path: Path) -> None:
    lines = ["file_name,label"]
    for split, count in (("train", 4), ("test", 2)):
        (tmp_path / split).mkdir()
        for number in range(count):
            image(tmp_path / split / f"{number}.png", number)
            lines.append(f"{split}/{number}.png,{'ab'[number % 2]}")
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    splits = read_splits(tmp_path, validation_fraction=0.0, seed=0)
    assert splits.test is not None
    assert (splits.train.num_images, splits.test.num_images) == (4, 2)
    assert splits.test.labels == (0, 1)


def test_overlap_is_found_by_pixels_not_by_name(tmp_path: Path) -> None:
    first, copy = image(tmp_path / "a.png", 1), image(tmp_path / "renamed.bmp", 1)
    hashes = pixel_hashes([first], PREPROCESSING)
    with pytest.raises(DataRejected, match=r"renamed\.bmp"):
        refuse_overlap(list(hashes), pixel_hashes([copy], PREPROCESSING))
    refuse_overlap(list(hashes), pixel_hashes([image(tmp_path / "b.png", 2)], PREPROCESSING))


def test_the_hash_of_a_set_does_not_depend_on_order() -> None:
    assert set_hash(["a", "b"]) == set_hash(["b", "a"]) != set_hash(["a", "c"])


def class_folders(root: Path, counts: dict[str, int]) -> None:
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            image(root / name / f"{number}.png", sum(map(ord, name)) + number)


def test_a_tenth_of_every_class_is_held_out_the_same_way_each_time(tmp_path: Path) -> None:
    class_folders(tmp_path, {"a": 20, "b": 3, "c": 1})
    one, two = (read_splits(tmp_path, validation_fraction=0.1, seed=5) for _ in range(2))
    assert one == two
    assert one.validation is not None
    assert one.test is None
    held = [one.validation.class_names[label] for label in one.validation.labels]
    assert held == ["a", "a", "b"]  # never the last one of a class
    assert not set(one.train.paths) & set(one.validation.paths)
    assert one.train.num_images == 21
    other = read_splits(tmp_path, validation_fraction=0.1, seed=6)
    assert other.validation is not None
    assert other.validation.paths != one.validation.paths


def test_splits_that_are_given_are_taken(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        class_folders(tmp_path / split, {"a": 2, "b": 1})
    splits = read_splits(tmp_path, validation_fraction=0.5, seed=0)
    assert splits.validation is not None
    assert splits.test is not None
    assert {path.parents[1].name for path in splits.validation.paths} == {"val"}
    assert splits.train.num_images == 3
    (tmp_path / "train").rename(tmp_path / "elsewhere")
    with pytest.raises(DataRejected, match="without train"):
        read_splits(tmp_path, validation_fraction=0.5, seed=0)


def test_threads_read_in_order_and_count_what_is_broken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class_folders(tmp_path, {"a": 120})
    (tmp_path / "a" / "7.png").write_bytes(b"no image")
    paths = find_images(tmp_path)
    for threads in (1, 4):
        found = [paths[i].name for i, _ in stream(paths, PREPROCESSING.pixels, threads=threads)]
        assert found == [path.name for path in paths if path.name != "7.png"]
    assert "1 of 120 images were skipped" in caplog.text


@pytest.mark.parametrize(("file", "column"), [("labels.csv", "file"), ("metadata.csv", "file_name")])
@pytest.mark.parametrize("divided", [True, False])
def test_label_files_are_split_as_folders_are(tmp_path: Path, file: str, column: str, divided: bool) -> None:
    for split in ("train", "test") if divided else (".",):
        folder = tmp_path / split
        class_folders(folder / "images", {"a": 10, "b": 10})
        rows = [f"images/{name}/{number}.png,{name}\n" for name in "ab" for number in range(10)]
        (folder / file).write_text(f"{column},label\n" + "".join(rows))
    splits = read_splits(tmp_path, validation_fraction=0.2, seed=0)
    assert splits.validation is not None
    assert (splits.train.num_images, splits.validation.num_images) == (16, 4)
    assert (splits.test is not None) == divided
    assert splits.train.class_names == ("a", "b")


def test_images_without_labels_are_those_of_the_split_and_of_the_label_file(tmp_path: Path) -> None:
    paths = [image(tmp_path / "test" / name, seed) for seed, name in enumerate(("a.png", "b.png", "c.png"))]
    assert lies_loose(tmp_path, splits=("test",))
    assert read_unlabelled(tmp_path, splits=("test",)) == tuple(paths)
    (tmp_path / "test" / "metadata.csv").write_text("file_name\nc.png\na.png\n")
    assert read_unlabelled(tmp_path, splits=("test",)) == (paths[0], paths[2])
    (tmp_path / "test" / "metadata.csv").write_text("file_name,label\nc.png,x\na.png,\n")
    assert read_unlabelled(tmp_path / "test") == (paths[0], paths[2])
    (tmp_path / "test" / "metadata.csv").unlink()
    image(tmp_path / "test" / "x" / "d.png", 4)
    assert not lies_loose(tmp_path / "test")
    assert len(read_unlabelled(tmp_path / "test")) == 4


def test_an_overlap_names_both_images_where_both_are_known(tmp_path: Path) -> None:
    first, second = image(tmp_path / "a.png", 1), image(tmp_path / "copy.png", 1)
    with pytest.raises(DataRejected, match=r"copy\.png \(as .*a\.png\)"):
        refuse_overlap(pixel_hashes([first], PREPROCESSING), pixel_hashes([second], PREPROCESSING))
