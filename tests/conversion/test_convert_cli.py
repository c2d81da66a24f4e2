"""`vit-edge convert` from the outside: exit codes, JSON, and what a person reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.third_party_weights import CLASSES, bare, save_timm, state_of, timm_model
from vit_edge.checkpoint import load_checkpoint
from vit_edge.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("convert")
    save_timm(folder / "timm", timm_model("vit_tiny_patch16_224"), model_config={"label_names": list(CLASSES)})
    bare(folder / "bare.safetensors", {f"model.{k}": v for k, v in state_of(timm_model()).items()})
    return folder


def test_a_person_reads_every_tensor_and_what_was_told_and_assumed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")  # no cell is folded
    out = str(tmp_path / "out")
    assert main(["convert", str(folder / "bare.safetensors"), "-o", out, "--num-classes", "5"]) == 0
    printed = capsys.readouterr().out
    for text in (
        "32 tensors", "0 missing, 0 unexpected", "model.blocks.*.attn.qkv.weight", "x2", "new: zeros",
        "assumed (not specified)", "prefix 'model.' stripped", "the head of 3 classes was replaced", "checkpoint: ",
    ):  # fmt: skip
        assert text in printed, text
    assert load_checkpoint(tmp_path / "out").model.config.num_classes == 5


def test_json_has_the_whole_report(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert main(["convert", str(folder / "timm"), "-o", out, "--image-size", "96x64", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["command"], printed["library"]) == ("convert", "timm")
    assert len(printed["mapped"]) == 32
    assert printed["reshaped"] == ["pos_embed"]
    assert (printed["missing"], printed["unexpected"]) == ([], [])
    assert printed["assumed"] == []  # timm's resize for an input that is not square is known
    assert printed["known"]["labels"] == "config.json"
    assert load_checkpoint(tmp_path / "out").model.config.image_size == (96, 64)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("absent.pt",), 3),
        (("bare.safetensors", "--image-size", "big"), 2),
        (("bare.safetensors", "--image-size", "50"), 3),
        (("bare.safetensors", "--num-classes", "0"), 2),
        (("bare.safetensors", "--like", "timm:nothing"), 2),
        (("bare.safetensors", "--labels", "absent.txt"), 3),
        (("bare.safetensors", "--out", "bare.safetensors", "--force"), 2),
    ],
)
def test_what_cannot_be_done_ends_with_its_code_and_one_sentence(
    folder: Path,
    arguments: tuple[str, ...],
    code: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    assert main(["convert", *arguments]) == code
    assert "Traceback" not in capsys.readouterr().err
    assert not (folder / "checkpoint.safetensors").exists()
