"""Tar and Parquet shards give the images of a folder, from their place in the archive; hostile archives are refused."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vit_edge.data import draw_images, find_images, lies_loose, read_labelled, read_splits, read_unlabelled
from vit_edge.errors import DataRejected, ImageRejected, MissingExtra
from vit_edge.files import read_file
from vit_edge.image import Limits, Preprocessing, decode_for, pixel_hash

PREPROCESSING = Preprocessing(resize=(16, 16), crop=(16, 16))


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, files: list[tuple[str, bytes]], *, mode: Any = "w", **header: Any) -> Path:
    """Write an archive; `header` changes fields of every member."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            for field, value in header.items():
                setattr(member, field, value)
            tar.addfile(member, io.BytesIO(data))
    return path


def samples(first: int, count: int, *, classes: int = 2) -> list[tuple[str, bytes]]:
    found: list[tuple[str, bytes]] = []
    for number in range(first, first + count):
        found += [(f"{number:04d}.png", png(number)), (f"{number:04d}.cls", f"class {number % classes}".encode())]
    return found


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Return a folder of two shards with ten images each."""
    write_tar(tmp_path / "shards" / "a-0.tar", samples(0, 10))
    write_tar(tmp_path / "shards" / "a-1.tar", samples(10, 10))
    return tmp_path / "shards"


@pytest.mark.parametrize("name", ["", "*.tar", "a-[01].tar"])
def test_shards_give_the_pixels_and_labels_of_the_images_in_them(shards: Path, name: str) -> None:
    found = read_labelled(shards / name)
    assert (found.num_images, found.class_names) == (20, ("class 0", "class 1"))
    assert found.labels == tuple(number % 2 for number in range(20))
    for number, path in enumerate(found.paths):
        assert pixel_hash(PREPROCESSING.pixels(path)) == pixel_hash(PREPROCESSING.pixels(png(number)))
    assert find_images(shards / name) == read_unlabelled(shards / name) == found.paths
    assert not lies_loose(shards / name)


def test_a_path_in_a_shard_names_both_and_can_go_to_another_process(shards: Path) -> None:
    path = find_images(shards / "a-1.tar")[3]
    assert str(path) == str(shards / "a-1.tar" / "0013.png")
    again = pickle.loads(pickle.dumps(path))
    assert again == path
    assert pixel_hash(PREPROCESSING.pixels(again)) == pixel_hash(PREPROCESSING.pixels(png(13)))


def test_labels_come_from_cls_or_json_and_indices_sort_by_value(tmp_path: Path) -> None:
    files = [("a.png", png(0)), ("a.json", b'{"label": 10, "x": [1]}'), ("b.png", png(1)), ("b.json", b'{"cls": 9}')]
    assert read_labelled(write_tar(tmp_path / "s.tar", files)).class_names == ("9", "10")
    files = [("a.png", png(0)), ("a.json", b'{"label": "dog"}'), ("a.cls", b"cat\n")]
    assert read_labelled(write_tar(tmp_path / "s.tar", files)).class_names == ("cat",)
    assert read_labelled(tmp_path / "s.tar", class_names=("dog", "cat")).labels == (1,)


def test_what_is_no_image_is_passed_over_by_its_full_ending(tmp_path: Path) -> None:
    files = [
        ("./d/a.PNG", png(0)),
        ("./d/a.seg.png", png(1)),
        ("./d/a.txt", b"x"),
        ("./d/._a.png", b""),
        ("b.txt", b""),
    ]
    (found,) = find_images(write_tar(tmp_path / "s.tar", files))
    assert found.name == "a.PNG"
    with pytest.raises(DataRejected, match="1 of 1 images have no label"):
        read_labelled(tmp_path / "s.tar")
    assert lies_loose(tmp_path / "s.tar")


def test_names_of_shards_divide_them_into_splits(tmp_path: Path) -> None:
    write_tar(tmp_path / "data" / "train-00000-of-00002.tar", samples(0, 8))
    write_tar(tmp_path / "data" / "train-00001-of-00002.tar", samples(8, 8))
    write_tar(tmp_path / "data" / "test-00000-of-00001.tar", samples(16, 4))
    splits = read_splits(tmp_path, validation_fraction=0.25, seed=0)
    assert splits.validation is not None
    assert splits.test is not None
    assert [part.num_images for part in (splits.train, splits.validation, splits.test)] == [12, 4, 4]
    assert read_labelled(tmp_path, splits=("test", "validation")).num_images == 4
    with pytest.raises(DataRejected, match="divided into test, train"):
        read_labelled(tmp_path, splits=("validation",))


def test_a_sample_is_the_same_for_a_seed_and_in_order(shards: Path) -> None:
    paths = find_images(shards)
    drawn = draw_images(paths, 7, seed=3)
    assert drawn == draw_images(paths, 7, seed=3) != draw_images(paths, 7, seed=4)
    assert len(drawn) == 7
    assert list(drawn) == sorted(drawn)
    assert draw_images(paths, None) == draw_images(paths, 99) == paths


def test_a_sample_of_shards_calibrates_as_a_folder_of_these_images_does(
    shards: Path, small_model: Path, tmp_path: Path
) -> None:
    from vit_edge.export import QuantizationOptions, quantize

    options = QuantizationOptions(calibration_images=5, seed=1, measure_speed=False, use_cache=False)
    (tmp_path / "drawn").mkdir()
    for path in draw_images(find_images(shards), 5, seed=1):
        (tmp_path / "drawn" / path.name).write_bytes(read_file(path, what="image", max_bytes=10**6))
    model, found = small_model / "m.onnx", []
    for number, source in enumerate((shards / "*.tar", tmp_path / "drawn")):
        result = quantize(model, calibration=source, out=tmp_path / f"{number}.onnx", options=options)
        found.append((result.sha256, result.num_calibration_images))
    assert found[0] == found[1]
    assert found[0][1] == 5


@pytest.mark.parametrize(
    ("files", "header", "reason"),
    [
        ([("a.png", b"")], {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "'a.png' is a link"),
        ([("a.png", b"")], {"type": tarfile.LNKTYPE, "linkname": "b.png"}, "'a.png' is a link"),
        ([("a.png", b"")], {"type": tarfile.CHRTYPE}, "is not a plain file"),
        ([("a.png", b"")], {"type": tarfile.FIFOTYPE}, "is not a plain file"),
        ([("/a.png", png(0))], {}, "leads out of the archive"),
        ([("../a.png", png(0))], {}, "leads out of the archive"),
        ([("x/../../a.png", png(0))], {}, "leads out of the archive"),
        ([("a.png", png(0)), ("a.png", png(1))], {}, "is there twice"),
        ([("a.png", png(0)), ("a.jpg", png(1))], {}, "has two images"),
        ([("a.png", png(0)), ("b.png", png(1)), ("a.cls", b"0")], {}, "the key 'a' is there twice"),
        ([("a.png", png(0)), ("a.cls", bytes(1_000_001))], {}, "a label has at most 1,000,000"),
        ([("a.png", png(0)), ("a.cls", b"\xff")], {}, "cannot be read"),
        ([("a.png", png(0)), ("a.json", b"[" * 100_000)], {}, "cannot be read"),
        ([("a.txt", b"0")], {}, "hold no image"),
        ([], {}, "hold no image"),
    ],
)
def test_a_hostile_or_wrong_archive_is_refused(
    tmp_path: Path, files: list[tuple[str, bytes]], header: dict[str, Any], reason: str
) -> None:
    archive = write_tar(tmp_path / "s.tar", files, **header)
    with pytest.raises(DataRejected, match=reason):
        find_images(archive)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: data[:700], "the archive ends before|damaged"),
        (lambda data: b"", "damaged"),
        (lambda data: b"\x1f\x8b" + data, "uncompressed"),
        (lambda data: data[:100] + b"9" * 20 + data[120:], "damaged"),
    ],
)
def test_a_damaged_archive_is_refused(tmp_path: Path, change: Callable[[bytes], bytes], reason: str) -> None:
    archive = write_tar(tmp_path / "s.tar", [("a.png", png(0))])
    archive.write_bytes(change(archive.read_bytes()))
    with pytest.raises(DataRejected, match=reason):
        find_images(archive)


def test_a_member_that_claims_more_than_the_archive_holds_is_refused(tmp_path: Path) -> None:
    member = tarfile.TarInfo("a.png")
    member.size = 10**12
    (tmp_path / "s.tar").write_bytes(member.tobuf() + png(0))
    with pytest.raises(DataRejected, match=r"the archive ends before 'a.png' does"):
        find_images(tmp_path / "s.tar")


def extended(records: bytes, *, times: int = 1) -> bytes:
    """Return extended headers with these records, for the member that follows."""
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, len(records)
    return (header.tobuf(tarfile.USTAR_FORMAT) + records + bytes(-len(records) % 512)) * times


@pytest.mark.parametrize(
    ("name", "headers", "reason"),
    [
        ("._a", extended(b"14 size=-1536\n"), "has -1,536 bytes"),  # the next header would be this one again
        (
            "a.png",
            extended(b"7 a=bb\n", times=3_000),
            "damaged",
        ),  # tarfile reads a header of a header in a call of its own
        ("a.png", extended(b"22 GNU.sparse.map=1,x\n"), "damaged"),
        ("a.png", extended(b"99999999999999999999 a=b\n"), "damaged"),
    ],
)
def test_headers_that_would_loop_recurse_or_overflow_are_refused(
    tmp_path: Path, name: str, headers: bytes, reason: str
) -> None:
    (tmp_path / "s.tar").write_bytes(headers + tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT) + bytes(1024))
    with pytest.raises(DataRejected, match=reason):
        find_images(tmp_path / "s.tar")


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "s.tar", samples(0, 2), mode="w:gz")
    with pytest.raises(DataRejected, match="not an uncompressed tar"):
        find_images(tmp_path / "s.tar")


def test_a_large_or_damaged_image_in_a_shard_is_one_image_and_not_the_end(tmp_path: Path) -> None:
    files = [("a.png", png(0)), ("b.png", png(1)[:100]), ("c.png", bytes(2000))]
    first, second, third = find_images(write_tar(tmp_path / "s.tar", files))
    decode_for(None, first)
    with pytest.raises(ImageRejected, match="damaged"):
        decode_for(None, second)
    with pytest.raises(ImageRejected, match=r"c.png: the file has 2,000 bytes; at most 1,999"):
        decode_for(None, third, limits=Limits(max_file_bytes=1999))
    os.truncate(tmp_path / "s.tar", 600)
    with pytest.raises(ImageRejected, match="shorter than when it was opened"):
        decode_for(None, first)


def test_shards_and_images_in_one_folder_are_refused(shards: Path) -> None:
    (shards / "cat").mkdir()
    (shards / "cat" / "a.png").write_bytes(png(0))
    with pytest.raises(DataRejected, match=r"holds shards, such as a-0\.tar, and images"):
        find_images(shards)
    assert len(find_images(shards / "*.tar")) == 20


def test_a_pattern_that_matches_no_shard_is_refused(shards: Path) -> None:
    with pytest.raises(DataRejected, match="the pattern matches 0 files"):
        find_images(shards / "*.tgz")


def test_metadata_in_json_lines_is_a_label_file(tmp_path: Path) -> None:
    rows = [{"file_name": f"{n}.png", "label": n % 2, "objects": {"x": 1}} for n in range(4)]
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_labelled(tmp_path).labels == (0, 1, 0, 1)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png"')
    with pytest.raises(DataRejected, match="not JSON lines"):
        read_labelled(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("[1]\n[2]")
    with pytest.raises(DataRejected, match="a line is no object"):
        read_labelled(tmp_path)


@pytest.fixture
def parquet(tmp_path: Path) -> Callable[..., Path]:
    """Return what writes a Parquet file as Hugging Face's `datasets` does."""
    reason = "pyarrow is not installed: pip install pyarrow"
    pyarrow = pytest.importorskip("pyarrow", reason=reason)
    parquet = pytest.importorskip("pyarrow.parquet", reason=reason)

    def write(name: str, *, count: int = 6, names: list[str] | None = None) -> Path:
        images = [{"bytes": png(number), "path": f"{number}.png"} for number in range(count)]
        table = pyarrow.table({"image": images, "label": [number % 2 for number in range(count)]})
        features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)}) if names else table
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(table, tmp_path / name, row_group_size=4)
        return tmp_path / name

    return write


def test_parquet_shards_give_the_pixels_and_the_class_names(parquet: Callable[..., Path], tmp_path: Path) -> None:
    parquet("data/train-00000-of-00001.parquet", names=["cat", "dog"])
    parquet("data/test-00000-of-00001.parquet", names=["cat", "dog"], count=2)
    found = read_labelled(tmp_path, splits=("train",))
    assert (found.class_names, found.labels) == (("cat", "dog"), (0, 1, 0, 1, 0, 1))
    for number, path in enumerate(found.paths):
        assert pixel_hash(PREPROCESSING.pixels(pickle.loads(pickle.dumps(path)))) == pixel_hash(
            PREPROCESSING.pixels(png(number))
        )
    assert read_labelled(tmp_path, splits=("test",)).num_images == 2
    assert read_labelled(parquet("plain.parquet")).class_names == ("0", "1")


def test_a_parquet_file_without_images_or_damaged_is_refused(parquet: Callable[..., Path], tmp_path: Path) -> None:
    file = parquet("a.parquet")
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(DataRejected, match="not Parquet, or it is damaged"):
        find_images(file)


def test_damage_in_the_pages_of_a_parquet_file_is_one_image_or_one_error(parquet: Callable[..., Path]) -> None:
    file = parquet("a.parquet")
    data = file.read_bytes()
    file.write_bytes(data[:4] + b"\xff" * 40 + data[44:])
    first, *_, last = find_images(file)
    with pytest.raises(ImageRejected, match="the row cannot be read"):
        read_file(first, what="image", max_bytes=10**6, error=ImageRejected)
    assert read_file(last, what="image", max_bytes=10**6, error=ImageRejected) == png(5)


def test_a_parquet_file_of_more_than_a_data_set_of_images_is_refused(
    parquet: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = parquet("a.parquet")
    with monkeypatch.context() as limit:
        limit.setattr("vit_edge.data.parquet_shards.MOST_IMAGES", 5)
        with pytest.raises(DataRejected, match="6 rows; at most 5"):
            find_images(file)
    monkeypatch.setattr("vit_edge.data.parquet_shards._MOST_ROW_GROUP_BYTES", 1_000)
    with pytest.raises(DataRejected, match="at most 1,000 are read at once"):
        find_images(file)


def test_without_pyarrow_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(MissingExtra, match=r"vit-edge\[parquet\]"):
        find_images(tmp_path / "a.parquet")
