"""Training reaches its accuracy and leaves a checkpoint that only loads whole."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import Workspace
from vit_edge.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from vit_edge.errors import CheckpointRejected, DataRejected, ResourceExhausted, UsageError
from vit_edge.image import Preprocessing
from vit_edge.train import TrainConfig, TrainProgress, train
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


def test_the_digits_are_learned_to_97_percent(workspace: Workspace) -> None:
    printed = workspace.printed["train"]
    assert printed["num_images"] == 360
    assert printed["num_training_images"] == 1437
    assert printed["top1"] >= 97.0
    checkpoint = load_checkpoint(workspace.checkpoint)
    assert checkpoint.evaluation is not None
    assert checkpoint.evaluation["top1"] == printed["top1"]
    assert checkpoint.labels == tuple("0123456789")


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


@pytest.fixture
def few_digits(digits: Path, tmp_path: Path) -> Path:
    """Return 40 training and 10 test pictures."""
    for split, count in (("train", 4), ("test", 1)):
        for name in map(str, range(10)):
            target = tmp_path / "few" / split / name
            target.mkdir(parents=True)
            for path in sorted((digits / split / name).iterdir())[:count]:
                shutil.copy(path, target)
    return tmp_path / "few"


def test_the_same_seed_gives_the_same_bytes(few_digits: Path, tmp_path: Path) -> None:
    config = TrainConfig(epochs=1, threads=1)
    for name in ("a", "b"):
        train(few_digits, out=tmp_path / name, config=config)
    first, second = ((tmp_path / name / "checkpoint.safetensors").read_bytes() for name in ("a", "b"))
    assert first == second


def test_progress_has_loss_accuracy_speed_and_time_left(few_digits: Path, tmp_path: Path) -> None:
    seen: list[TrainProgress] = []
    train(few_digits, out=tmp_path / "run", config=TrainConfig(epochs=2, batch_size=20), on_progress=seen.append)
    assert [at.step for at in seen] == [1, 2, 3, 4]
    assert seen[-1].num_steps == 4
    assert seen[-1].top1 is not None
    assert seen[-1].seconds_left == 0
    assert all(at.loss > 0 and at.images_per_s > 0 for at in seen)


def test_an_existing_checkpoint_is_kept_unless_forced(few_digits: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.safetensors").write_bytes(b"precious")
    with pytest.raises(UsageError, match="--force"):
        train(few_digits, out=tmp_path / "run", config=TrainConfig(epochs=1))
    assert (tmp_path / "run" / "checkpoint.safetensors").read_bytes() == b"precious"


def test_a_test_picture_among_the_training_pictures_is_refused(few_digits: Path, tmp_path: Path) -> None:
    leaked = next((few_digits / "test" / "3").iterdir())
    shutil.copy(leaked, few_digits / "train" / "3" / "other-name.png")
    with pytest.raises(DataRejected, match=leaked.name):
        train(few_digits, out=tmp_path / "run", config=TrainConfig(epochs=1))


def test_sets_too_large_for_memory_are_refused_first(
    few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vit_edge.train._MAX_DECODED_BYTES", 1000)
    with pytest.raises(ResourceExhausted, match="bytes decoded"):
        train(few_digits, out=tmp_path / "run", config=TrainConfig(epochs=1))


@pytest.mark.parametrize("change", [{"epochs": 0}, {"learning_rate": 2.0}, {"warmup_fraction": 1.0}, {"threads": 0}])
def test_settings_that_make_no_sense_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        TrainConfig(**change)  # type: ignore[arg-type]


def test_sigterm_finishes_the_step_saves_and_exits_with_130(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "vit_edge", "train", str(digits), "--out", str(out), "--epochs", "500"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        deadline = time.monotonic() + 120
        while not (out / ".lock").exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        time.sleep(3)
        child.send_signal(signal.SIGTERM)
        _, errors = child.communicate(timeout=120)
    assert child.returncode == 130, errors
    assert "the weights so far are saved" in errors
    checkpoint = load_checkpoint(out / "checkpoint.safetensors")
    assert 0 < checkpoint.training["step"] < checkpoint.training["num_steps"]
