"""Text from a model file is data: no control character of it reaches a terminal, a log or a table."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults.hostile_models import appended, resealed
from vit_edge.cli import main
from vit_edge.errors import ModelRejected, escaped
from vit_edge.model_file.artifact import open_model
from vit_edge.runtime import load
from vit_edge.runtime.checks.golden import golden_images

_HOSTILE = {
    "ESC": "\x1b[31mred",
    "OSC": "\x1b]0;title\x07",
    "C1": "\x9b31m",
    "bidi": "\u202etxt.exe",
    "NUL": "a\x00b",
    "return": "good\rbad",
    "rich": "[red]rich[/red]",
    "script": "<script>alert(1)</script>",
}


@pytest.fixture
def hostile(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a model file whose name, labels and other texts are hostile."""
    monkeypatch.setenv("VIT_EDGE_CACHE", str(tmp_path / "cache"))
    model = open_model(small_model / "m.onnx", warn=False)
    labels = tuple(_HOSTILE.values())[: len(model.manifest.labels)]
    text = "".join(_HOSTILE.values())
    manifest = replace(model.manifest, name=text, labels=labels, assumed=(text,), license=text, base_model=text)
    (tmp_path / "hostile.onnx").write_bytes(model.with_manifest(manifest))
    return tmp_path / "hostile.onnx"


def is_clean(text: str) -> bool:
    return all(character.isprintable() or character == "\n" for character in text)


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("command", ["classify", "inspect", "benchmark"])
def test_commands_escape_what_a_manifest_says(
    hostile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, as_json: bool
) -> None:
    from PIL import Image

    Image.fromarray(golden_images([0], height=48, width=48)[0]).save(tmp_path / "image.png")
    arguments = {
        "classify": ["classify", str(hostile), str(tmp_path / "image.png"), "--top", "7", "--engine", "onnxruntime"],
        "inspect": ["inspect", str(hostile)],
        "benchmark": ["benchmark", str(hostile), "--engine", "onnxruntime", "--min-seconds", "0.01", "--no-peak"],
    }[command]
    assert main([*arguments, *(["--json"] if as_json else [])]) == 0
    printed = capsys.readouterr()
    assert is_clean(printed.out)
    assert is_clean(printed.err)
    if as_json:
        json.loads(printed.out)


def test_errors_and_logs_escape_what_a_file_says(hostile: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = "".join(_HOSTILE.values()).replace("\x00", "")
    data = resealed(hostile, appended("GridSample", "logits", output=text))
    with caplog.at_level(logging.INFO):
        load(hostile, engine="onnxruntime").close()
        with pytest.raises(ModelRejected, match="which is not allowed") as caught:
            load(data, engine="onnxruntime")
    assert is_clean(str(caught.value))
    assert caplog.messages
    assert all(is_clean(message) for message in caplog.messages)


def test_each_kind_of_hostile_character_is_written_out() -> None:
    assert escaped("\x1b\x9b\u202e\x00\ud800é字\n", keep="") == r"\x1b\x9b\u202e\x00\ud800é字\n"
    assert escaped("a\nb") == "a\nb"
