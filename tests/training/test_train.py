"""Training learns, stops and goes on exactly, and says what it did."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import ROOT, Workspace, vit_edge
from vit_edge.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from vit_edge.errors import (
    CheckpointRejected,
    DataRejected,
    EngineUnavailable,
    Interrupted,
    UsageError,
)
from vit_edge.image import Preprocessing
from vit_edge.train import TrainOptions, TrainProgress, train
from vit_edge.training.recipe import RECIPES, Recipe
from vit_edge.vit import VisionTransformer, ViTConfig

# Everything random at once: what resumes exactly here resumes exactly anywhere.
BUSY = Recipe(
    epochs=3, batch_size=8, accumulation_steps=2, ema_decay=0.9, dropout=0.1, stochastic_depth=0.2, crop_area=0.5,
    flip_probability=0.5, rand_augment_operations=1, random_erasing_probability=0.5, mixup_alpha=0.8, cutmix_alpha=1.0,
    rotate_degrees=5.0, layer_decay=0.8,
)  # fmt: skip
QUICK = Recipe(epochs=2, batch_size=8)


def small(classes: int = 10, **changes: object) -> Checkpoint:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=(16, 16), patch_size=(8, 8), width=12, depth=2, num_heads=2, mlp_width=24, num_classes=classes,
        **changes,  # type: ignore[arg-type]
    )  # fmt: skip
    return Checkpoint(
        name="small",
        model=VisionTransformer(config).eval(),
        preprocessing=Preprocessing(resize=16, crop=(16, 16), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        labels=tuple(map(str, range(classes))),
    )


@pytest.fixture(scope="module")
def few(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return 40 training and 10 test images."""
    folder = tmp_path_factory.mktemp("few")
    for split, count in (("train", 4), ("test", 1)):
        for name in map(str, range(10)):
            target = folder / split / name
            target.mkdir(parents=True)
            for path in sorted((digits / split / name).iterdir())[:count]:
                shutil.copy(path, target)
    return folder


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint small enough to train in a second."""
    path = tmp_path_factory.mktemp("start") / "small.safetensors"
    save_checkpoint(path, small())
    return path


def options(start: Path, **changes: object) -> TrainOptions:
    return replace(TrainOptions(source=start, threads=1, device="cpu"), **changes)  # type: ignore[arg-type]


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["event"] == "step"]


def test_the_digits_are_learned_to_97_percent(workspace: Workspace) -> None:
    printed = workspace.printed["train"]
    assert (printed["split"], printed["num_images"]) == ("test", 360)
    assert 1200 < printed["num_training_images"] < 1437  # a tenth chose the best epoch
    assert printed["top1"] >= 97.0
    checkpoint = load_checkpoint(workspace.checkpoint)
    assert checkpoint.evaluation is not None
    assert checkpoint.evaluation["top1"] == printed["top1"]
    assert checkpoint.labels == tuple("0123456789")


def test_a_run_leaves_everything_that_a_person_looks_for(few: Path, start: Path, tmp_path: Path) -> None:
    result = train(few, out=tmp_path / "run", recipe=QUICK, options=options(start))
    made = {path.name for path in (tmp_path / "run").iterdir()} - {".lock"}
    assert made == {
        "best.safetensors", "last.safetensors", "state.safetensors", "config.toml", "preprocessing.json",
        "metrics.jsonl", "tensorboard", "curves.png", "confusion.png",
    }  # fmt: skip
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*"))
    described = json.loads((tmp_path / "run" / "preprocessing.json").read_text())
    assert Preprocessing.from_dict(described) == load_checkpoint(result.checkpoint).preprocessing
    assert len(losses(tmp_path / "run")) == 8  # 30 images in batches of 8, twice
    assert result.split == "test"
    assert result.num_images == 10
    for name in ("curves.png", "confusion.png"):
        assert (tmp_path / "run" / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("stopped_after", [1, 3, 4, 6, 11])
def test_a_stopped_run_goes_on_to_the_very_same_weights(
    few: Path, start: Path, tmp_path: Path, stopped_after: int
) -> None:
    def stop(at: TrainProgress) -> None:
        if at.step == stopped_after:
            os.kill(os.getpid(), signal.SIGTERM)

    train(few, out=tmp_path / "whole", recipe=BUSY, options=options(start))
    with pytest.raises(Interrupted, match=f"after {stopped_after} of 12 steps"):
        train(few, out=tmp_path / "parts", recipe=BUSY, options=options(start), on_progress=stop)
    train(few, out=tmp_path / "parts", recipe=BUSY, options=options(start, resume=True))
    for name in ("last.safetensors", "best.safetensors", "state.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes(), name
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


def test_resuming_needs_nothing_but_the_folder(few: Path, start: Path, tmp_path: Path) -> None:
    def stop(at: TrainProgress) -> None:
        if at.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    train(few, out=tmp_path / "whole", recipe=BUSY, options=options(start))
    with pytest.raises(Interrupted):
        train(few, out=tmp_path / "parts", recipe=BUSY, options=options(start), on_progress=stop)
    done = vit_edge("train", few, "--out", tmp_path / "parts", "--resume", "--threads", "1", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    whole, parts = (tmp_path / name / "last.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()


def test_a_killed_run_goes_on_from_its_last_save(few: Path, start: Path, tmp_path: Path) -> None:
    def stop(at: TrainProgress) -> None:
        if at.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    train(few, out=tmp_path / "whole", recipe=BUSY, options=options(start))
    with pytest.raises(Interrupted):
        train(few, out=tmp_path / "parts", recipe=BUSY, options=options(start), on_progress=stop)
    script = (
        "import os, signal, sys; from pathlib import Path; from tests.training.test_train import BUSY, options;"
        "from vit_edge.train import train\n"
        "def die(at):\n    os.kill(os.getpid(), signal.SIGKILL) if at.step == 9 else None\n"
        "train(sys.argv[1], out=sys.argv[2], recipe=BUSY, options=options(Path(sys.argv[3]), resume=True),"
        " on_progress=die)"
    )
    arguments = [sys.executable, "-c", script, str(few), str(tmp_path / "parts"), str(start)]
    assert subprocess.run(arguments, cwd=ROOT, check=False).returncode == -signal.SIGKILL
    train(few, out=tmp_path / "parts", recipe=BUSY, options=options(start, resume=True))
    whole, parts = (tmp_path / name / "last.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()


def test_the_same_seed_gives_the_same_bytes_and_the_written_recipe_repeats_the_run(
    few: Path, start: Path, tmp_path: Path
) -> None:
    train(few, out=tmp_path / "a", recipe=BUSY, options=options(start))
    arguments = ("train", few, "--from", start, "--recipe", tmp_path / "a" / "config.toml", "--out", tmp_path / "b")
    done = vit_edge(*arguments, "--threads", "1", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    first, second = ((tmp_path / name / "best.safetensors").read_bytes() for name in ("a", "b"))
    assert first == second
    train(few, out=tmp_path / "c", recipe=replace(BUSY, seed=1), options=options(start))
    assert first != (tmp_path / "c" / "best.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        (replace(BUSY, learning_rate=2e-3), {}, "recipe.learning_rate was 0.001, is 0.002"),
        (BUSY, {"source": None, "arch": "vit_digits_patch8_32"}, "network.width was 12, is 192"),
    ],
)
def test_another_run_is_not_resumed_and_the_difference_is_shown(
    few: Path, start: Path, tmp_path: Path, recipe: Recipe, changes: dict[str, object], message: str
) -> None:
    train(few, out=tmp_path / "run", recipe=replace(BUSY, epochs=1), options=options(start))
    train(few, out=tmp_path / "run", recipe=BUSY, options=options(start, force=True))
    with pytest.raises(UsageError, match=message):
        train(few, out=tmp_path / "run", recipe=recipe, options=options(start, resume=True, **changes))


def test_drift_is_allowed_on_request(few: Path, start: Path, tmp_path: Path) -> None:
    def stop(at: TrainProgress) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(few, out=tmp_path / "run", recipe=BUSY, options=options(start), on_progress=stop)
    changed = replace(BUSY, learning_rate=2e-3)
    result = train(few, out=tmp_path / "run", recipe=changed, options=options(start, resume=True, allow_drift=True))
    assert result.checkpoint.exists()


def test_a_damaged_state_is_refused_and_the_previous_one_offered(few: Path, start: Path, tmp_path: Path) -> None:
    def stop(at: TrainProgress) -> None:
        if at.step in (2, 5):
            os.kill(os.getpid(), signal.SIGTERM)

    for resume in (False, True):
        with pytest.raises(Interrupted):
            train(few, out=tmp_path / "run", recipe=BUSY, options=options(start, resume=resume), on_progress=stop)
    state, previous = (tmp_path / "run" / f"state{name}.safetensors" for name in ("", ".previous"))
    data = bytearray(state.read_bytes())
    data[-5] ^= 1
    state.unlink()  # it shares its bytes with no other name
    state.write_bytes(data)
    with pytest.raises(CheckpointRejected, match=r"state\.previous\.safetensors"):
        train(few, out=tmp_path / "run", recipe=BUSY, options=options(start, resume=True))
    previous.replace(state)
    train(few, out=tmp_path / "run", recipe=BUSY, options=options(start, resume=True))
    train(few, out=tmp_path / "whole", recipe=BUSY, options=options(start))
    whole, mended = (tmp_path / name / "last.safetensors" for name in ("whole", "run"))
    assert whole.read_bytes() == mended.read_bytes()


def test_a_second_run_in_the_folder_is_told_whose_it_is(few: Path, start: Path, tmp_path: Path) -> None:
    refused: list[str] = []

    def second(_: TrainProgress) -> None:
        if not refused:
            done = vit_edge("train", few, "--from", start, "--out", tmp_path / "run")
            assert done.returncode == 2
            refused.append(done.stderr)

    train(few, out=tmp_path / "run", recipe=QUICK, options=options(start), on_progress=second)
    assert f"in use by pid {os.getpid()} on host" in refused[0]


def test_an_existing_run_is_kept_unless_forced(few: Path, start: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "best.safetensors").write_bytes(b"precious")
    with pytest.raises(UsageError, match="--force"):
        train(few, out=tmp_path / "run", recipe=QUICK, options=options(start))
    with pytest.raises(UsageError, match="without --resume"):
        train(few, out=tmp_path / "run", recipe=QUICK, options=options(start, resume=True))
    assert (tmp_path / "run" / "best.safetensors").read_bytes() == b"precious"
    with pytest.raises(DataRejected):  # what was there goes only when there is something to take its place
        train(tmp_path / "nowhere", out=tmp_path / "run", recipe=QUICK, options=options(start, force=True))
    assert (tmp_path / "run" / "best.safetensors").read_bytes() == b"precious"
    train(few, out=tmp_path / "run", recipe=QUICK, options=options(start, force=True))
    load_checkpoint(tmp_path / "run" / "best.safetensors")


def test_sigterm_finishes_the_step_saves_and_exits_with_130(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "vit_edge", "train", str(digits), "--out", str(out), "--epochs", "500"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        deadline = time.monotonic() + 120
        while not (out / "config.toml").exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        time.sleep(3)
        child.send_signal(signal.SIGTERM)
        _, errors = child.communicate(timeout=120)
    assert child.returncode == 130, errors
    assert "--resume to go on" in errors
    checkpoint = load_checkpoint(out / "last.safetensors")
    assert 0 < checkpoint.training["step"] < checkpoint.training["num_steps"]


def test_progress_has_loss_accuracy_rate_speed_and_time_left(few: Path, start: Path, tmp_path: Path) -> None:
    seen: list[TrainProgress] = []
    train(few, out=tmp_path / "run", recipe=QUICK, options=options(start), on_progress=seen.append)
    assert [at.step for at in seen] == list(range(1, 9))
    assert [at.epoch for at in seen] == [1] * 4 + [2] * 4
    assert seen[3].top1 is None
    assert seen[4].top1 is not None
    # The last validation, the test and the drawing are still to come.
    assert seen[-1].seconds_left > 0
    assert all(at.loss > 0 and at.images_per_s > 0 and at.learning_rate >= 0 for at in seen)


def test_a_test_image_among_the_training_images_is_refused(few: Path, start: Path, tmp_path: Path) -> None:
    shutil.copytree(few, tmp_path / "data")
    leaked = next((few / "test" / "3").iterdir())
    shutil.copy(leaked, tmp_path / "data" / "train" / "3" / "other-name.png")
    recipe = replace(QUICK, validation_fraction=0.0)
    with pytest.raises(DataRejected, match=leaked.name):
        train(tmp_path / "data", out=tmp_path / "run", recipe=recipe, options=options(start))


def test_a_image_that_is_there_twice_is_not_learned_and_chosen_by(
    few: Path, start: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for path in (few / "train").rglob("*.png"):
        for copy in ("a", "b"):
            target = tmp_path / "data" / path.parent.name / f"{copy}-{path.name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    result = train(tmp_path / "data", out=tmp_path / "run", recipe=QUICK, options=options(start))
    assert (result.split, result.num_images) == ("validation", 10)
    assert result.num_training_images == 60
    assert "10 training images are also validation images" in caplog.text


def test_an_undivided_folder_holds_out_and_without_any_the_last_epoch_is_kept(
    few: Path, start: Path, tmp_path: Path
) -> None:
    recipe = replace(QUICK, validation_fraction=0.0)
    result = train(few / "train", out=tmp_path / "run", recipe=recipe, options=options(start))
    assert (result.split, result.top1, result.num_training_images, result.best_epoch) == (None, None, 40, 2)
    best, last = (load_checkpoint(path) for path in (result.checkpoint, result.last_checkpoint))
    for name, tensor in best.model.state_dict().items():
        assert torch.equal(tensor, last.model.state_dict()[name])


def test_corrupt_images_are_counted_and_named_and_over_1_percent_refused(
    few: Path, start: Path, tmp_path: Path
) -> None:
    shutil.copytree(few, tmp_path / "data")
    (tmp_path / "data" / "train" / "3" / "broken.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(DataRejected, match=r"over 1 %.*broken\.png"):
        train(tmp_path / "data", out=tmp_path / "run", recipe=QUICK, options=options(start))


def test_the_head_is_kept_for_the_same_classes_and_replaced_for_others(few: Path, tmp_path: Path) -> None:
    checkpoint = small()
    nn.init.normal_(checkpoint.model.head.weight)
    order = tuple(reversed(checkpoint.labels))
    save_checkpoint(tmp_path / "same", replace(checkpoint, labels=order))
    frozen = replace(QUICK, learning_rate=1e-9, weight_decay=0.0)
    result = train(few, out=tmp_path / "run", recipe=frozen, options=options(tmp_path / "same"))
    kept = load_checkpoint(result.checkpoint)
    assert not result.head_replaced
    assert kept.labels == order
    assert torch.allclose(kept.model.head.weight, checkpoint.model.head.weight, atol=1e-6)
    save_checkpoint(tmp_path / "other", replace(checkpoint, labels=tuple("abcdefghij")))
    result = train(few, out=tmp_path / "other-run", recipe=frozen, options=options(tmp_path / "other"))
    replaced = load_checkpoint(result.checkpoint)
    assert result.head_replaced
    assert replaced.labels == tuple("0123456789")
    assert replaced.base_model == "small"
    assert replaced.model.head.weight.abs().max() < 1e-6


def test_a_checkpoint_is_fine_tuned_at_another_resolution(few: Path, start: Path, tmp_path: Path) -> None:
    result = train(few, out=tmp_path / "run", recipe=QUICK, options=options(start, image_size=(24, 32)))
    checkpoint = load_checkpoint(result.checkpoint)
    assert checkpoint.model.config.grid == (3, 4)
    assert checkpoint.preprocessing.crop == (24, 32)


def test_a_network_from_scratch_may_see_images_that_are_not_square(few: Path, tmp_path: Path) -> None:
    chosen = TrainOptions(arch="vit_digits_patch8_32", image_size=(24, 32), threads=1, device="cpu")
    result = train(few, out=tmp_path / "run", recipe=replace(QUICK, epochs=1), options=chosen)
    assert load_checkpoint(result.checkpoint).preprocessing.crop == (24, 32)


def test_one_image_of_each_class_is_trained_on_and_none_held_out(few: Path, start: Path, tmp_path: Path) -> None:
    for folder in (few / "train").iterdir():
        (tmp_path / "one" / folder.name).mkdir(parents=True)
        shutil.copy(sorted(folder.iterdir())[0], tmp_path / "one" / folder.name)
    result = train(tmp_path / "one", out=tmp_path / "run", recipe=QUICK, options=options(start))
    assert (result.num_training_images, result.split) == (10, None)


def test_a_image_of_another_class_or_name_is_another_run(few: Path, start: Path, tmp_path: Path) -> None:
    def stop(at: TrainProgress) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    shutil.copytree(few / "train", tmp_path / "data")
    whole = replace(BUSY, validation_fraction=0.0)
    with pytest.raises(Interrupted):
        train(tmp_path / "data", out=tmp_path / "run", recipe=whole, options=options(start), on_progress=stop)
    moved = sorted((tmp_path / "data" / "3").iterdir())[0]
    moved.rename(tmp_path / "data" / "4" / "moved.png")
    with pytest.raises(UsageError, match="training_images was"):
        train(tmp_path / "data", out=tmp_path / "run", recipe=whole, options=options(start, resume=True))


def test_the_folder_of_another_tool_and_the_checkpoint_to_start_from_are_kept(
    few: Path, start: Path, tmp_path: Path
) -> None:
    (tmp_path / "theirs" / "tensorboard").mkdir(parents=True)
    with pytest.raises(UsageError, match="another tool's files"):
        train(few, out=tmp_path / "theirs", recipe=QUICK, options=options(start))
    assert (tmp_path / "theirs" / "tensorboard").is_dir()
    (tmp_path / "run").mkdir()
    shutil.copy(start, tmp_path / "run" / "best.safetensors")
    again = options(tmp_path / "run" / "best.safetensors", force=True)
    with pytest.raises(UsageError, match="it lies in --out"):
        train(few, out=tmp_path / "run", recipe=QUICK, options=again)
    assert (tmp_path / "run" / "best.safetensors").read_bytes() == start.read_bytes()


def test_weights_from_elsewhere_are_trained_without_a_step_between(few: Path, tmp_path: Path) -> None:
    torch.save({"model": small().model.state_dict()}, tmp_path / "theirs.pth")
    done = vit_edge(
        "train", few, "--from", tmp_path / "theirs.pth", "--out", tmp_path / "run", "--epochs", "1", "--threads", "1"
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "assumed, not specified" in done.stderr
    assert "num_heads" in load_checkpoint(tmp_path / "run" / "best.safetensors").assumed


def test_a_probe_changes_nothing_but_the_head(few: Path, start: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPES["probe"], epochs=1, batch_size=8)
    result = train(few, out=tmp_path / "run", recipe=recipe, options=options(start))
    before, after = (load_checkpoint(path).model.state_dict() for path in (start, result.last_checkpoint))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"head.weight", "head.bias"}


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("distilled", [True, False])
def test_a_student_follows_its_teacher(few: Path, tmp_path: Path, kind: str, distilled: bool) -> None:
    teacher = small()
    with torch.no_grad():
        teacher.model.head.bias[7] = 50.0  # always says 7
    save_checkpoint(tmp_path / "teacher", replace(teacher, labels=tuple(map(str, range(10)))))
    save_checkpoint(tmp_path / "student", small(distilled=distilled))
    recipe = Recipe(
        epochs=6, batch_size=8, learning_rate=0.01, distillation=kind, distillation_weight=1.0, crop_area=0.5
    )  # type: ignore[arg-type]
    result = train(
        few, out=tmp_path / "run", recipe=recipe, options=options(tmp_path / "student", teacher=tmp_path / "teacher")
    )
    model = load_checkpoint(result.last_checkpoint).model
    with torch.no_grad():
        answers = model.forward_heads(torch.rand(20, 3, 16, 16) * 2 - 1)[-1].argmax(dim=1)
    assert (answers == 7).all()


def test_a_teacher_and_distillation_go_together(few: Path, start: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--teacher"):
        train(few, out=tmp_path / "a", recipe=replace(QUICK, distillation="hard"), options=options(start))
    with pytest.raises(UsageError, match="distillation"):
        train(few, out=tmp_path / "b", recipe=QUICK, options=options(start, teacher=start))


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_learns_the_same_direction(few: Path, start: Path, tmp_path: Path, precision: str) -> None:
    for name in ("float32", precision):
        recipe = replace(QUICK, precision=name)  # type: ignore[arg-type]
        train(few, out=tmp_path / name, recipe=recipe, options=options(start))
    full, low = losses(tmp_path / "float32"), losses(tmp_path / precision)
    assert full != low
    assert all(abs(a - b) < 0.05 for a, b in zip(full, low, strict=True))


def test_accumulation_is_the_same_step_in_parts(few: Path, start: Path, tmp_path: Path) -> None:
    for parts in (1, 3):
        recipe = replace(QUICK, accumulation_steps=parts, mixup_alpha=0.8)
        train(few, out=tmp_path / str(parts), recipe=recipe, options=options(start))
    for a, b in zip(losses(tmp_path / "1"), losses(tmp_path / "3"), strict=True):
        assert abs(a - b) < 1e-5


def test_two_processes_take_the_same_steps_as_one(few: Path, start: Path, tmp_path: Path) -> None:
    recipe = replace(
        BUSY, epochs=4, dropout=0.0, stochastic_depth=0.0, batch_size=7
    )  # 7 images are 4 pairs: the processes get 4 and 3
    alone = train(few, out=tmp_path / "one", recipe=recipe, options=options(start))
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "vit_edge", "train", str(few), "--from", str(start), "--recipe", str(tmp_path / "recipe.toml")]
    command += ["--out", str(tmp_path / "two"), "--device", "cpu", "--threads", "1", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)  # one process speaks
    assert printed["top1"] == alone.top1
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 20
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) < 1e-5
    weights = [load_checkpoint(tmp_path / name / "last.safetensors").model.state_dict() for name in ("one", "two")]
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=1e-4) for name in weights[0])


def test_worker_processes_make_the_same_batches(few: Path, start: Path, tmp_path: Path) -> None:
    for workers in (0, 2):
        train(few, out=tmp_path / str(workers), recipe=BUSY, options=options(start, workers=workers))
    alone, ahead = (tmp_path / name / "last.safetensors" for name in "02")
    assert alone.read_bytes() == ahead.read_bytes()


def test_the_moving_average_is_what_is_kept_and_judged(few: Path, start: Path, tmp_path: Path) -> None:
    recipe = replace(QUICK, ema_decay=0.999)
    averaged = train(few, out=tmp_path / "a", recipe=recipe, options=options(start))
    plain = train(few, out=tmp_path / "b", recipe=QUICK, options=options(start))
    begun = load_checkpoint(start).model.pos_embed
    moved = [(load_checkpoint(r.last_checkpoint).model.pos_embed - begun).norm() for r in (averaged, plain)]
    assert 0 < moved[0] < moved[1]


def test_a_loss_that_is_not_a_number_ends_the_run_and_says_so(few: Path, tmp_path: Path) -> None:
    checkpoint = small()
    with torch.no_grad():
        checkpoint.model.norm.weight.fill_(1e38)
        checkpoint.model.head.weight.fill_(1e38)
    save_checkpoint(tmp_path / "huge", checkpoint)
    with pytest.raises(UsageError, match=r"diverged.*loss of step 1"):
        train(few, out=tmp_path / "run", recipe=QUICK, options=options(tmp_path / "huge"))


def test_a_device_that_is_not_there_is_refused_with_those_that_are(few: Path, start: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(EngineUnavailable, match=r"'cuda'; there is cpu"):
        train(few, out=tmp_path / "run", recipe=QUICK, options=options(start, device="cuda"))


def test_a_compiled_network_takes_the_same_steps(
    few: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Captured, differentiated and run as ever; its generated C++, a minute of compiling, is PyTorch's own to test.
    monkeypatch.setattr("torch.compile", partial(torch.compile, backend="aot_eager"))
    for compiled in (False, True):
        recipe = replace(QUICK, compile=compiled)
        train(few, out=tmp_path / str(compiled), recipe=recipe, options=options(start))
    for a, b in zip(losses(tmp_path / "False"), losses(tmp_path / "True"), strict=True):
        assert abs(a - b) < 1e-4


def test_the_best_epoch_is_the_one_that_validation_chose(few: Path, start: Path, tmp_path: Path) -> None:
    result = train(few, out=tmp_path / "run", recipe=replace(QUICK, epochs=6), options=options(start))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if line["event"] == "epoch"]
    best = max(epochs, key=lambda line: (line["top1"], -line["validation_loss"]))
    assert (result.best_epoch, result.validation_top1) == (best["epoch"], best["top1"])
    assert load_checkpoint(result.checkpoint).training["step"] == best["step"]


def test_evaluation_counts_what_a_loop_over_images_counts(few: Path, start: Path, tmp_path: Path) -> None:
    result = train(few, out=tmp_path / "run", recipe=QUICK, options=options(start))
    checkpoint = load_checkpoint(result.checkpoint)
    right = 0
    for path in sorted((few / "test").rglob("*.png")):
        pixels = checkpoint.preprocessing.pixels(path)[None]
        images: Tensor = torch.from_numpy(checkpoint.preprocessing.normalise(pixels))
        right += checkpoint.labels[int(checkpoint.model(images).argmax())] == path.parent.name
    assert result.top1 is not None
    assert math.isclose(result.top1, right * 10.0)
