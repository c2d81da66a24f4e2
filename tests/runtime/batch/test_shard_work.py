"""Each input of a job gets one row, as one process computes it, whatever is wrong with single images."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from PIL import Image

from tests.data.test_shards import png, samples, write_tar
from vit_edge.cli import main
from vit_edge.cli.ray_options import with_rate
from vit_edge.errors import DataRejected, UsageError
from vit_edge.files import sha256_hex
from vit_edge.progress import silent
from vit_edge.runtime import load, load_encoder
from vit_edge.runtime.batch.inputs import find_inputs, inputs_sha256, read_input
from vit_edge.runtime.batch.job_folder import JobFolder
from vit_edge.runtime.batch.shard_files import read_origin, shard_path
from vit_edge.runtime.batch.shard_work import ClassifyTask, EmbedTask, Task
from vit_edge.runtime.checks.golden import golden_images

BAD = {"bad.png", "none.jpg", "small.png"}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Return a folder of six images, one damaged, one that is none, and one too small."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number, pixels in enumerate(golden_images(range(6), height=48, width=40)):
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "bad.png").write_bytes(png(0)[:100])
    (folder / "none.jpg").write_bytes(b"hello")
    Image.new("RGB", (4, 4)).save(folder / "small.png")
    return folder


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of all shards."""
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed: pip install pyarrow")
    return [row for path in sorted(folder.glob("part-*.parquet")) for row in parquet.read_table(path).to_pylist()]


def check_inputs(rows: list[dict[str, Any]], images: Path) -> None:
    """Check that every image of the folder is there once, and which of them have an error."""
    assert [row["path"] for row in rows] == sorted(str(path) for path in images.iterdir())
    assert all(row["sha256"] == sha256_hex(Path(row["path"]).read_bytes()) for row in rows)
    wrong = {Path(row["path"]).name: row["error"] for row in rows if row["error"] is not None}
    assert {*wrong} == BAD
    assert "not an image" in wrong["none.jpg"]


def check_labels(rows: list[dict[str, Any]], model: Path) -> None:
    """Check each label against one process."""
    with load(model, threads=1) as classifier:
        for row in rows:
            if row["error"] is None:
                found = classifier(row["path"])
                assert (row["label"], row["probability"]) == (found.label, found.probability)
            else:
                assert (row["label"], row["probability"]) == (None, None)


def run_shard(task: Task, folder: Path, sources: list[Path]) -> list[dict[str, Any]]:
    """Run one shard here and return its rows."""
    pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install pyarrow")
    worker = task.open()
    shard_path(folder, 7).write_bytes(worker.run(7, find_inputs(sources), node="n"))
    worker.close()
    return rows_of(folder)


def test_inputs_of_all_kinds_are_there_once(images: Path, tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "s.tar", samples(0, 3))
    (tmp_path / "list.txt").write_text(f"images/0.png\n\n{images / '1.png'}\nfile://{images}/2.png\n")
    found = find_inputs([images, images / "0.png", archive, tmp_path / "list.txt", str(tmp_path / "*.tar")])
    assert len(found) == 9 + 3 + 1
    assert len({item.name for item in found}) == len(found)
    assert read_input(found[9]) == png(0)
    assert inputs_sha256(found) != inputs_sha256(found[1:])
    with pytest.raises(DataRejected, match="no such file or folder"):
        find_inputs([tmp_path / "gone"])


def test_a_uri_is_read_through_fsspec(images: Path, tmp_path: Path) -> None:
    pytest.importorskip("fsspec", reason="fsspec is not installed")
    (tmp_path / "list.txt").write_text(f"file://{images}/2.png")
    (item,) = find_inputs([tmp_path / "list.txt"])
    assert read_input(item) == (images / "2.png").read_bytes()


def test_a_shard_has_a_row_for_each_image_and_errors_are_rows(images: Path, small_model: Path, tmp_path: Path) -> None:
    task = ClassifyTask(model=(small_model / "m.onnx").read_bytes(), options={"threads": 1})
    rows = run_shard(task, tmp_path, [images])
    assert [*rows[0]] == ["path", "sha256", "label", "probability", "error"]
    check_inputs(rows, images)
    check_labels(rows, small_model / "m.onnx")
    origin = read_origin(shard_path(tmp_path, 7))
    assert (origin.shard, origin.images, origin.errors, origin.node) == (7, 9, 3, "n")


def test_parquet_images_are_inputs_and_embeddings_are_those_of_one_process(
    images: Path, small_encoder: Path, tmp_path: Path
) -> None:
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    files = [path.read_bytes() for path in sorted(images.glob("[0-9].png"))]
    parquet.write_table(arrow.table({"image": files}), tmp_path / "images.parquet")
    model = small_encoder / "e.onnx"
    rows = run_shard(
        EmbedTask(model=model.read_bytes(), options={"threads": 1}), tmp_path, [tmp_path / "images.parquet"]
    )
    assert [*rows[0]] == ["path", "sha256", "embedding", "error"]
    assert [row["sha256"] for row in rows] == [sha256_hex(data) for data in files]
    with load_encoder(model, threads=1) as encoder:
        for row, data in zip(rows, files, strict=True):
            assert np.array_equal(np.float32(row["embedding"]), encoder.embed(data))


def test_a_folder_is_resumed_only_by_its_own_job(tmp_path: Path) -> None:
    job, inputs = ClassifyTask(model=b"model", options={"engine": "auto", "threads": 1}), ()
    JobFolder.begin(tmp_path / "new", job, inputs, shard_size=3, resume=True)
    other_threads = replace(job, options={"engine": "auto", "threads": 2})
    JobFolder.begin(tmp_path / "new", other_threads, inputs, shard_size=3, resume=True)
    with pytest.raises(UsageError, match="a job began in the folder"):
        JobFolder.begin(tmp_path / "new", job, inputs, shard_size=3, resume=False)
    others = (EmbedTask(model=b"model", options=job.options), replace(job, model=b"other"), replace(job, options={}))
    for other, named in zip(others, ("task", "models", "options"), strict=True):
        with pytest.raises(UsageError, match=f"different value for {named}"):
            JobFolder.begin(tmp_path / "new", other, inputs, shard_size=3, resume=True)
    with pytest.raises(UsageError, match="different value for shard size"):
        JobFolder.begin(tmp_path / "new", job, inputs, shard_size=4, resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(UsageError, match="not empty"):
        JobFolder.begin(tmp_path / "other", job, inputs, shard_size=3, resume=True)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--ray", "local"], "--ray needs a folder"),
        (["--resume"], "--resume is for --ray"),
        (["--ray", "local", "--out", "o", "--top", "2"], "--top has no use with --ray"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    images: Path, small_model: Path, options: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["classify", str(small_model / "m.onnx"), str(images), *options, "--json"]) == 2
    assert reason in json.loads(capsys.readouterr().out)["error"]["reason"]


def test_progress_has_images_per_second_and_the_time_left() -> None:
    class Recorder:
        text = ""

        def detail(self, text: str) -> None:
            self.text = text

    recorder = Recorder()
    with click.Context(click.Command("classify")) as context:
        context.meta["vit_edge.progress"] = recorder
        show = with_rate(silent)
        show("classifying", 0, 4_000)
        show("classifying", 1_000, 4_000)
    assert re.fullmatch(r"1,000 of 4,000, [\d.]+ images/s, about .+ left", recorder.text)


def test_a_job_refuses_a_file_of_the_other_kind(
    small_encoder: Path, small_model: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = ["--ray", "local", "--out", str(tmp_path / "out")]
    assert main(["classify", str(small_encoder / "e.onnx"), str(images), *job]) == 3
    assert "the file is an encoder" in capsys.readouterr().err
    assert main(["embed", str(images), "--model", str(small_model / "m.onnx"), *job]) == 3
    assert "the file is a classifier" in capsys.readouterr().err
