"""What commands for devices print: the verdict first, then tables that fit the terminal."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from vit_edge.cli.output import make_table


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vit_edge", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, env={**os.environ, **environment}, encoding="utf-8", check=False
    )


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for number in range(3):
        Image.new("RGB", (40, 40), (number, 20, 30)).save(tmp_path / f"{number}é.png")
    return tmp_path


def test_classify_takes_folders_and_says_what_ran_first(small_model: Path, images: Path) -> None:
    done = run("classify", small_model / "m.onnx", images, COLUMNS="80")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Classified 3 images with ")
    printed = json.loads(run("classify", small_model / "m.onnx", images, "--json").stdout)
    assert [Path(image["file"]).name for image in printed["images"]] == ["0é.png", "1é.png", "2é.png"]


def test_an_empty_folder_is_refused(small_model: Path, tmp_path: Path) -> None:
    done = run("classify", small_model / "m.onnx", tmp_path)
    assert done.returncode == 3
    assert str(tmp_path) in done.stderr


def test_inspect_shows_size_input_labels_and_accuracy_first_and_no_raw_values(small_model: Path) -> None:
    done = run("inspect", small_model / "m.onnx", COLUMNS="80")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("The seal is intact: ")
    assert max(map(len, lines[1:])) <= 80
    fields = [line.split()[0] for line in lines if line[:2].strip() and line[:3] != " ──"]
    assert "{" not in done.stdout
    assert fields.index("accuracy") < fields.index("preprocessing") < fields.index("provenance")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
def test_a_stdout_that_is_not_utf_8_gets_escaped_characters(small_model: Path, images: Path, encoding: str) -> None:
    for command in (("classify", images), ("inspect",)):
        done = subprocess.run(
            [sys.executable, "-m", "vit_edge", command[0], small_model / "m.onnx", *command[1:]],
            capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding}, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.decode(encoding)


@pytest.mark.parametrize("width", [30, 60, 80])
def test_a_table_breaks_no_word_at_any_width(width: int) -> None:
    from rich.console import Console

    rows = [("model.int8.onnx in onnxruntime 1.32.0, int8", "0.451", "1637", "-"), ("b", "0.7", "9", "-")]
    table = make_table("", ("candidate", "p50 ms", "images/s", "energy"), rows)
    shown = io.StringIO()
    Console(width=width, file=shown).print(table)
    words = shown.getvalue().split()
    assert {"model.int8.onnx", "onnxruntime", "1.32.0,", "0.451", "1637"} <= set(words)
    assert "energy" not in words  # a column without any value is dropped
