"""Data as people have it: every layout gives the right classes and images, or an error that names what is wrong."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from tests.data.test_data import image
from vit_edge.conversion.label_names import read_labels
from vit_edge.data import (
    EVALUATION_SPLITS,
    find_images,
    lies_loose,
    read_class_names,
    read_labelled,
    read_splits,
    read_unlabelled,
)
from vit_edge.errors import DataRejected

ANIMALS = ("cat", "dog", "eel")


def animals(root: Path, *, classes: tuple[str, ...] = ANIMALS, count: int = 2, suffix: str = ".png") -> Path:
    for seed, name in enumerate(classes):
        for number in range(count):
            image(root / name / f"{number}.png", 100 * seed + number).rename(root / name / f"{number}{suffix}")
    return root


@pytest.mark.parametrize(
    "extra",
    [
        ".ipynb_checkpoints/0-checkpoint.png",
        ".Trash-1000/files/0.png",
        "@eaDir/0.png/SYNOPHOTO_THUMB_M.png",
        "__MACOSX/cat/._0.png",
        "#recycle/0.png",
        "cat/._0.png",
        "cat/.ipynb_checkpoints/0-checkpoint.png",
        "cat/@eaDir/0.png",
        ".0.png",
    ],
)
def test_hidden_and_system_names_are_skipped_and_counted(
    tmp_path: Path, extra: str, caplog: pytest.LogCaptureFixture
) -> None:
    animals(tmp_path)
    image(tmp_path / extra)
    found = read_splits(tmp_path, validation_fraction=0.0, seed=0).train
    assert (found.class_names, found.num_images) == (ANIMALS, 6)
    assert "1 hidden or system names are skipped" in caplog.text
    assert read_labelled(tmp_path, class_names=ANIMALS).paths == find_images(tmp_path) == read_unlabelled(tmp_path)
    assert read_labels(tmp_path) == ANIMALS
    assert not lies_loose(tmp_path)


@pytest.mark.parametrize("suffix", [".jfif", ".jpe", ".JPE", ".JFIF", ".JPEG", ".jif", ".TIF"])
def test_every_suffix_of_a_format_that_is_read_counts(tmp_path: Path, suffix: str) -> None:
    animals(tmp_path, suffix=suffix)
    assert read_labelled(tmp_path).num_images == 6


@pytest.mark.parametrize("suffix", [".gif", ".heic", ".avif", ".HEIC", ".jp2"])
def test_other_images_are_counted_in_one_warning(tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture) -> None:
    animals(tmp_path)
    for number in range(5):
        (tmp_path / "dog" / f"other{number}{suffix}").write_bytes(b"x")
    assert read_labelled(tmp_path).num_images == 6
    assert len([entry for entry in caplog.messages if f"(5 {suffix.lower()})" in entry]) == 1


def test_a_class_of_unread_images_is_named_and_a_folder_of_them_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    animals(tmp_path / "data")
    (tmp_path / "data" / "fox").mkdir()
    (tmp_path / "data" / "fox" / "1.heic").write_bytes(b"x")
    assert read_labelled(tmp_path / "data").class_names == ANIMALS == read_labels(tmp_path / "data")
    assert "no image that can be read in fox" in caplog.text
    with pytest.raises(DataRejected, match=r"only 1 \.heic"):
        find_images(tmp_path / "data" / "fox")


@pytest.mark.parametrize(
    ("train", "validation", "test"),
    [
        ("Train", None, "Test"),
        ("training", "validation", "testing"),
        ("TRAIN", "VAL", "TEST"),
        ("train", "Valid", "Testing"),
    ],
)
def test_splits_in_any_spelling(tmp_path: Path, train: str, validation: str | None, test: str) -> None:
    for seed, name in enumerate(filter(None, (train, validation, test))):
        animals(tmp_path / name, count=seed + 2)
    found = read_splits(tmp_path, validation_fraction=0.0, seed=0)
    assert found.test is not None
    assert (found.train.class_names, found.train.num_images) == (ANIMALS, 6)
    assert (found.validation is None) == (validation is None)
    assert found.test.num_images == (9 if validation is None else 12)
    judged = read_labelled(tmp_path, splits=EVALUATION_SPLITS, class_names=ANIMALS)
    assert judged.paths == found.test.paths == read_unlabelled(tmp_path, splits=EVALUATION_SPLITS)
    assert read_labels(tmp_path) == ANIMALS


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    animals(tmp_path, classes=("bus", "train", "test"))
    assert read_splits(tmp_path, validation_fraction=0.0, seed=0).train.class_names == ("bus", "test", "train")
    assert read_labelled(tmp_path, splits=EVALUATION_SPLITS).num_images == 6
    assert read_labels(tmp_path) == ("bus", "test", "train")


def test_splits_without_class_folders_are_never_classes(tmp_path: Path) -> None:
    animals(tmp_path, classes=("train", "test"))
    with pytest.raises(DataRejected, match="next to the class folders"):
        read_splits(tmp_path, validation_fraction=0.0, seed=0)
    assert lies_loose(tmp_path, splits=EVALUATION_SPLITS)
    assert len(read_unlabelled(tmp_path, splits=EVALUATION_SPLITS)) == 2


def test_a_test_split_without_labels_does_not_stop_training(tmp_path: Path) -> None:
    animals(tmp_path / "train")
    image(tmp_path / "test" / "unknown.png")
    found = read_splits(tmp_path, validation_fraction=0.0, seed=0)
    assert (found.train.num_images, found.test) == (6, None)
    assert len(read_unlabelled(tmp_path, splits=EVALUATION_SPLITS)) == 1


def test_two_folders_for_one_split_are_refused(tmp_path: Path) -> None:
    for name in ("train", "val", "valid"):
        animals(tmp_path / name)
    with pytest.raises(DataRejected, match="val and valid are the same split"):
        read_splits(tmp_path, validation_fraction=0.0, seed=0)


def test_one_class_is_refused_with_the_folder_that_was_meant(tmp_path: Path) -> None:
    animals(tmp_path / "dataset" / "train")
    for read in (read_class_names, lambda path: read_splits(path, validation_fraction=0.0, seed=0)):
        with pytest.raises(DataRejected, match=r"(?s)one class only, 'dataset'.*try: .*dataset"):
            read(tmp_path)
        with pytest.raises(DataRejected, match=r"one class only|no class folder|no image|next to the class"):
            read(tmp_path / "dataset" / "train" / "cat")


def test_linked_class_folders_are_followed(tmp_path: Path) -> None:
    animals(tmp_path / "elsewhere")
    (tmp_path / "data").mkdir()
    for name in ANIMALS:
        (tmp_path / "data" / name).symlink_to(tmp_path / "elsewhere" / name)
    (tmp_path / "data" / "cat" / "again").symlink_to(tmp_path / "data")  # a loop
    found = read_splits(tmp_path / "data", validation_fraction=0.0, seed=0).train
    assert found.class_names == ANIMALS
    assert len({path.resolve() for path in found.paths}) == 6
    assert read_labels(tmp_path / "data") == ANIMALS


def test_two_links_to_one_class_folder_are_refused(tmp_path: Path) -> None:
    animals(tmp_path)
    (tmp_path / "puma").symlink_to(tmp_path / "cat")
    with pytest.raises(DataRejected, match="cat and puma are the same folder"):
        read_labelled(tmp_path)


def listed(root: Path, text: str | bytes, *, name: str = "labels.csv") -> Path:
    for file in ("img/a.png", "img/b.png"):
        image(root / file, len(file))
    (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


@pytest.mark.parametrize(
    "text",
    [
        "file,label\nimg/a.png,cat\nimg/b.png,dog\n",
        "file;label\nimg/a.png;cat\nimg/b.png;dog\n",
        "file\tlabel\r\nimg/a.png\tcat\r\nimg/b.png\tdog\r\n",
        "\ufefffile,label\nimg/a.png,cat\nimg/b.png,dog\n",
        " File , Label \n img/a.png , cat \n img/b.png , dog \n",
        "FILENAME;LABEL\nimg/a.png;cat\nimg/b.png;dog\n",
        "File Name,Class\nimg/a.png,cat\nimg/b.png,dog\n",
        "id,label,image_path\n1,cat,img/a.png\n2,dog,img/b.png\n",
        '"filename","label"\n"img\\a.png","cat"\n"img\\b.png","dog"\n',
        "file,label\n.\\img\\a.png,cat\nimg/b.png,dog\n",
        "file,label\n\nimg/a.png,cat\nimg/b.png,dog\n\n",
        "file,label\nimg/a.png,cat\nimg/a.png,cat\n./img/b.png,dog\n",
        "file\tlabel\nimg/a.png\tcat\nimg/b.png\tdog\n".encode("utf-16"),
    ],
)
@pytest.mark.parametrize("name", ["labels.csv", "metadata.csv", "Labels.CSV", "labels.tsv"])
def test_every_dialect_of_a_label_file_is_read(tmp_path: Path, text: str | bytes, name: str) -> None:
    listed(tmp_path, text, name=name)
    found = read_labelled(tmp_path, splits=EVALUATION_SPLITS, class_names=ANIMALS)
    assert [path.name for path in found.paths] == ["a.png", "b.png"]
    assert found.labels == (0, 1)
    assert not lies_loose(tmp_path)


@pytest.mark.parametrize("relative", [True, False])
def test_absolute_paths_in_a_label_file_are_read(
    tmp_path: Path, relative: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed(tmp_path, f"file,label\n{tmp_path}/img/a.png,cat\n{tmp_path}/img/b.png,dog\n")
    monkeypatch.chdir(tmp_path)
    data = Path() if relative else tmp_path
    assert read_labelled(data, class_names=ANIMALS).labels == (0, 1)
    assert read_splits(data, validation_fraction=0.0, seed=0).train.class_names == ("cat", "dog")


@pytest.mark.parametrize("relative", [True, False])
def test_absolute_paths_divide_one_label_file_into_splits(
    tmp_path: Path, relative: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [image(tmp_path / split / f"{n}.png", n) for split in ("Train", "Test") for n in range(2)]
    rows = "".join(f"{path},{'ab'[number % 2]}\n" for number, path in enumerate(paths))
    (tmp_path / "labels.csv").write_text("file,label\n" + rows)
    monkeypatch.chdir(tmp_path)
    found = read_splits(Path() if relative else tmp_path, validation_fraction=0.0, seed=0)
    assert found.test is not None
    assert (found.train.num_images, found.test.num_images) == (2, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\nimg/a.png,cat\n.\\img\\a.png,dog\n", r"1 images have several labels: a\.png \(cat and dog\)"),
        ("img/a.png,cat\nimg/b.png,dog\n", r"the columns are 'img/a\.png', 'cat'"),
        ("file,kind\nimg/a.png,cat\n", r"no column for the label; the columns are 'file', 'kind'"),
        ("file,label\nimg/a.png,\n", r"'img/a\.png' has no label"),
        ("file,label\nimg/gone.png,cat\n", r"1 of 1 images are not there: img/gone\.png"),
        ("file,label\n", "1 rows"),
        ("", "empty|0 rows"),
        (b"file,label\nimg/a.png,caf\xe9\n", "not CSV in UTF-8"),
        (f"file,label\n{'x' * 300}/\0.png,cat\n", "not there|not CSV"),
    ],
)
def test_an_error_of_a_label_file_says_what_was_found(tmp_path: Path, text: str | bytes, message: str) -> None:
    listed(tmp_path, text)
    with pytest.raises(DataRejected, match=message):
        read_labelled(tmp_path, class_names=ANIMALS)


def test_a_class_name_that_stands_twice_is_refused_or_given_by_index(tmp_path: Path) -> None:
    names = ("cat", "crane", "dog", "crane")
    animals(tmp_path / "names", classes=("cat", "crane"))
    with pytest.raises(DataRejected, match="'crane' is the name of the classes 1 and 3"):
        read_labelled(tmp_path / "names", class_names=names)
    animals(tmp_path / "indices", classes=("0", "3"), count=1)
    assert read_labelled(tmp_path / "indices", class_names=names).labels == (0, 3)
    animals(tmp_path / "others", classes=("cat", "dog"), count=1)
    assert read_labelled(tmp_path / "others", class_names=names).labels == (0, 2)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_are_compared_in_one_unicode_form(tmp_path: Path, form: str) -> None:
    composed, decomposed = (unicodedata.normalize(f, "façade") for f in ("NFC", "NFD"))
    own = composed if form == "NFC" else decomposed
    animals(tmp_path / "folders", classes=(own, "cat"), count=1)
    for name in (composed, decomposed):
        assert read_labelled(tmp_path / "folders", class_names=("cat", name)).labels in ((0, 1), (1, 0))
    assert read_labels(tmp_path / "folders") == ("cat", composed)
    image(tmp_path / "listed" / f"{own}.png")
    (tmp_path / "listed" / "labels.csv").write_text(f"file,label\n{composed}.png,{decomposed}\n", encoding="utf-8")
    assert read_labelled(tmp_path / "listed", class_names=("cat", composed)).labels == (1,)
