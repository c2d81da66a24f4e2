"""A checkpoint only loads whole, and says what it is instead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import Workspace
from vit_edge.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from vit_edge.errors import CheckpointRejected
from vit_edge.image import Preprocessing
from vit_edge.vit import VisionTransformer, ViTConfig


def small_checkpoint(classes: int = 3) -> Checkpoint:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=(16, 16), patch_size=(8, 8), width=12, depth=1, num_heads=2, mlp_width=24, num_classes=classes
    )
    return Checkpoint(
        name="small",
        model=VisionTransformer(config).eval(),
        preprocessing=Preprocessing(resize=16, crop=(16, 16)),
        labels=tuple("abcdefgh"[:classes]),
    )


def test_a_checkpoint_comes_back_as_it_was_and_the_bytes_repeat(tmp_path: Path) -> None:
    checkpoint = small_checkpoint()
    for name in ("a", "b"):
        save_checkpoint(tmp_path / name, checkpoint)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    loaded = load_checkpoint(tmp_path / "a")
    assert (loaded.name, loaded.labels, loaded.preprocessing) == ("small", ("a", "b", "c"), checkpoint.preprocessing)
    assert loaded.model.config == checkpoint.model.config
    for name, tensor in checkpoint.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor)


def test_a_flipped_bit_in_weights_or_header_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", small_checkpoint())
    original = (tmp_path / "a").read_bytes()
    for position in range(0, len(original), 97):
        data = bytearray(original)
        data[position] ^= 4
        (tmp_path / "b").write_bytes(data)
        with pytest.raises(CheckpointRejected):
            load_checkpoint(tmp_path / "b")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"<html>", "HTML"),
        (b"PK\x03\x04...", "zip"),
        (b"\x80\x02}q\x00.", "pickle"),
        (b"\xff" * 100, "safetensors"),
    ],
)
def test_what_is_no_checkpoint_is_named(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(CheckpointRejected, match=message):
        load_checkpoint(tmp_path / "a")


def test_a_truncated_checkpoint_is_refused(workspace: Workspace, tmp_path: Path) -> None:
    data = workspace.checkpoint.read_bytes()
    for size in (4, 100, len(data) // 2, len(data) - 1):
        (tmp_path / "a").write_bytes(data[:size])
        with pytest.raises(CheckpointRejected):
            load_checkpoint(tmp_path / "a")


def test_safetensors_without_a_configuration_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointRejected, match="no configuration"):
        load_checkpoint(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("head.bias"), "head.bias is missing"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "extra is not expected"),
        (lambda tensors: tensors.update({"head.bias": torch.zeros(7)}), "head.bias has shape"),
        (lambda tensors: tensors["head.bias"].fill_(float("nan")), "not every weight is finite: head.bias"),
    ],
)
def test_weights_that_do_not_fit_are_listed(tmp_path: Path, change: object, message: str) -> None:
    from vit_edge import tensor_file as module

    save_checkpoint(tmp_path / "a", small_checkpoint())
    tensors = load_file(tmp_path / "a")
    header, _, _ = module.read_tensors(tmp_path / "a", key="vit_edge.checkpoint")
    change(tensors)  # type: ignore[operator]
    header["sha256"] = module.tensor_digest(header, tensors)
    save_file(tensors, tmp_path / "b", metadata={"vit_edge.checkpoint": json.dumps(header, sort_keys=True)})
    with pytest.raises(CheckpointRejected, match=message):
        load_checkpoint(tmp_path / "b")


def test_labels_and_classes_must_agree() -> None:
    good = small_checkpoint()
    with pytest.raises(ValueError, match="labels"):
        Checkpoint(name="x", model=good.model, preprocessing=good.preprocessing, labels=("one",))
