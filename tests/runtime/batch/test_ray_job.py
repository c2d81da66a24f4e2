"""A job gives each input one row, as one process does, whatever is wrong with single images; a stopped job goes on."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.data.test_shards import png, samples, write_tar
from vit_edge.cli import main
from vit_edge.errors import DataRejected, UsageError
from vit_edge.files import sha256_hex
from vit_edge.runtime import load
from vit_edge.runtime.batch import ray_job
from vit_edge.runtime.batch.inputs import find_inputs, inputs_sha256, read_input
from vit_edge.runtime.batch.shard_classifier import COLUMNS, ShardClassifier, shard_path
from vit_edge.runtime.checks.golden import golden_images

needs_pyarrow = pytest.mark.skipif(
    importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed: pip install pyarrow"
)
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None or importlib.util.find_spec("pyarrow") is None,
    reason="ray is not installed: pip install 'ray[data]'",
)


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
    from pyarrow import parquet

    return [row for path in sorted(folder.glob("part-*.parquet")) for row in parquet.read_table(path).to_pylist()]


def check_rows(rows: list[dict[str, Any]], images: Path, model: Path) -> None:
    """Check each row against one process."""
    assert [row["path"] for row in rows] == sorted(str(path) for path in images.iterdir())
    with load(model, threads=1) as classifier:
        for row in rows:
            data = Path(row["path"]).read_bytes()
            assert (tuple(row), row["sha256"]) == (COLUMNS, sha256_hex(data))
            if row["error"] is None:
                found = classifier(data)
                assert (row["label"], row["probability"]) == (found.label, found.probability)
    wrong = {Path(row["path"]).name: row["error"] for row in rows if row["error"] is not None}
    assert {*wrong} == {"bad.png", "none.jpg", "small.png"}
    assert "not an image" in wrong["none.jpg"]


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


@needs_pyarrow
def test_a_shard_has_a_row_for_each_image_and_errors_are_rows(images: Path, small_model: Path, tmp_path: Path) -> None:
    model = small_model / "m.onnx"
    classifier = ShardClassifier(model.read_bytes(), out=tmp_path, options={"threads": 1})
    summary = classifier.run(7, find_inputs([images]))
    classifier.close()
    assert (summary.shard, summary.images, summary.errors) == (7, 9, 3)
    assert shard_path(tmp_path, 7).is_file()
    check_rows(rows_of(tmp_path), images, model)


def test_a_folder_is_resumed_only_by_its_own_job(tmp_path: Path) -> None:
    job = {"model": "a", "inputs": "b", "shard_size": 3}
    ray_job._begin(tmp_path / "new", job, resume=True)
    ray_job._begin(tmp_path / "new", job, resume=True)
    with pytest.raises(UsageError, match="a job began in the folder"):
        ray_job._begin(tmp_path / "new", job, resume=False)
    with pytest.raises(UsageError, match="another model, other images"):
        ray_job._begin(tmp_path / "new", {**job, "shard_size": 4}, resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(UsageError, match="not empty"):
        ray_job._begin(tmp_path / "other", job, resume=True)


@pytest.mark.parametrize(
    ("options", "reason"),
    [(["--ray", "local"], "--ray needs a folder"), (["--resume"], "--out and --resume are for --ray")],
)
def test_options_that_do_not_fit_are_refused(
    images: Path, small_model: Path, options: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["classify", str(small_model / "m.onnx"), str(images), *options]) == 2
    assert reason in capsys.readouterr().err


@needs_ray
def test_a_job_on_ray_gives_the_rows_of_one_process_and_resumes(
    images: Path, small_model: Path, tmp_path: Path
) -> None:
    out, model = tmp_path / "out", small_model / "m.onnx"
    command = [sys.executable, "-m", "vit_edge", "classify", str(model), str(images), "--ray", "local", "--json"]
    command += ["--out", str(out), "--shard-size", "4"]

    def run(*more: str) -> dict[str, Any]:
        environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
        done = subprocess.run(
            [*command, *more], capture_output=True, text=True, timeout=600, check=False, env=environment
        )
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    printed = run()
    assert (printed["images"], printed["errors"], printed["shards"], printed["kept_shards"]) == (9, 3, 3, 0)
    assert sum(printed["workers"].values()) >= 1
    check_rows(rows_of(out), images, model)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*")}
    shard_path(out, 1).unlink()
    printed = run("--resume")
    assert (printed["images"], printed["errors"], printed["kept_shards"]) == (9, 3, 2)
    check_rows(rows_of(out), images, model)
    changed = {path.name for path in out.glob("part-*") if path.stat().st_mtime_ns != before[path.name]}
    assert changed == {"part-000001.parquet"}
