"""A recipe is validated, printed and read back; and what it says about rates, decay and images is what happens."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.conftest import vit_edge
from tests.training.test_train import small
from vit_edge.data import LabelledImages
from vit_edge.errors import UsageError
from vit_edge.image import Preprocessing
from vit_edge.progress import silent
from vit_edge.training.batches import TrainingBatches, load_split, seed_of
from vit_edge.training.optimisation import MovingAverage, learning_rate, make_optimiser, training_loss
from vit_edge.training.recipe import RECIPES, Recipe, load_recipe


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_written_as_toml_comes_back_equal(name: str, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(RECIPES[name].to_toml())
    assert load_recipe(tmp_path / "r.toml") == RECIPES[name] == load_recipe(name)


def test_a_file_may_start_from_a_named_recipe(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('recipe = "deit"\nepochs = 5\n')
    assert load_recipe(tmp_path / "r.toml") == replace(RECIPES["deit"], epochs=5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs = ", "Invalid"),
        ('recipe = "cake"', "no recipe is named 'cake'"),
        ("epoch = 3", "has no 'epoch'"),
        ("epochs = 0", "epochs is 0"),
        ("epochs = 1.5", "whole number"),
        ("flip_probability = true", "flip_probability is True"),
        ("learning_rate = nan", "learning_rate is nan"),
        ('compile = "yes"', "must be true or false"),
        ('precision = "int4"', "choose one of float32"),
        ("accumulation_steps = 64\nbatch_size = 8", "over batch_size"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(UsageError, match=message):
        load_recipe(tmp_path / "r.toml")


def test_the_command_line_prints_and_changes_recipes() -> None:
    arguments = ("train", "--show-recipe", "--recipe", "deit", "--epochs", "7", "--set", "ema_decay=0.99")
    done = vit_edge(*arguments, "--set", "crop_area=none", "--json")
    assert done.returncode == 0, done.stderr
    changed = replace(RECIPES["deit"], epochs=7, ema_decay=0.99, crop_area=None)
    assert Recipe(**json.loads(done.stdout)["recipe"]) == changed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train",), "DATA is not given"),
        (("train", "."), "--out is not given"),
        (("train", ".", "--out", "x", "--set", "epochs"), "has no ="),
        (("train", ".", "--out", "x", "--set", "cake=1"), "a recipe has no 'cake'"),
        (("train", ".", "--out", "x", "--recipe", "cake"), "choose one of scratch-small"),
        (("train", ".", "--out", "x", "--image-size", "wide"), "224 or 192x256"),
    ],
)
def test_wrong_options_are_one_sentence_and_exit_2(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    done = vit_edge(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert not list(tmp_path.iterdir())


@settings(deadline=None)
@given(num_steps=st.integers(1, 2000), warmup=st.floats(0.0, 0.9))
def test_the_rate_rises_to_its_peak_and_falls_to_nothing(num_steps: int, warmup: float) -> None:
    recipe = Recipe(learning_rate=0.01, warmup_fraction=warmup)
    rates = [learning_rate(step, num_steps, recipe) for step in range(num_steps)]
    top = int(np.argmax(rates))
    assert all(0 < rate <= 0.01 for rate in rates)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert top <= warmup * num_steps
    assert learning_rate(num_steps, num_steps, recipe) < 1e-9


def test_norms_biases_and_tokens_do_not_decay_and_lower_layers_learn_slower() -> None:
    model = small(num_registers=2, layer_scale=0.1).model
    optimiser = make_optimiser(model, Recipe(layer_decay=0.5, weight_decay=0.1))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        names[id(parameter)]: (group["weight_decay"], group["rate_factor"])
        for group in optimiser.param_groups
        for parameter in group["params"]
    }
    assert set(found) == set(names.values())
    assert found["blocks.0.attn.qkv.weight"] == (0.1, 0.25)
    assert found["blocks.1.mlp.fc2.weight"] == (0.1, 0.5)
    assert found["head.weight"] == (0.1, 1.0)
    assert found["patch_embed.proj.weight"] == (0.1, 0.125)
    for name in ("pos_embed", "cls_token", "reg_token", "blocks.0.norm1.weight", "blocks.1.ls1.gamma", "head.bias"):
        assert found[name][0] == 0.0, name


def test_soft_distillation_ends_where_student_and_teacher_agree() -> None:
    recipe = Recipe(distillation="soft", distillation_weight=1.0, distillation_temperature=3.0)
    logits, targets = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    assert training_loss((logits,), targets, logits, recipe).abs() < 1e-5
    assert training_loss((logits,), targets, -logits, recipe) > 0.1


def test_the_moving_average_forgets_its_start() -> None:
    model = torch.nn.Linear(2, 2)
    average = MovingAverage(model, decay=0.5)
    with torch.no_grad():
        model.weight.fill_(3.0)
    for _ in range(40):
        average.update(model)
    assert torch.allclose(average.state["weight"], torch.full((2, 2), 3.0))


@pytest.fixture
def split_images(tmp_path: Path) -> LabelledImages:
    paths = []
    for number in range(11):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(pixels).save(paths[-1])
    return LabelledImages(paths=tuple(paths), labels=tuple(n % 3 for n in range(11)), class_names=("a", "b", "c"))


@pytest.mark.parametrize("name", ["finetune", "deit", "scratch-small"])
@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_many_processes_see_what_one_sees(split_images: LabelledImages, name: str, world_size: int) -> None:
    recipe = replace(RECIPES[name], batch_size=7, epochs=2)
    preprocessing = Preprocessing(resize=16, crop=(16, 16))
    cropped = recipe.crop_area is None
    loaded = load_split(split_images, preprocessing, cropped=cropped, stage="", progress=silent)
    alone = TrainingBatches(loaded, recipe, num_classes=3)
    many = [
        TrainingBatches(loaded, recipe, num_classes=3, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    assert len(alone) == 4
    for step in range(4):
        images, targets = alone[step]
        parts = [one[step] for one in many]
        assert torch.equal(torch.cat([part[0].to(images.dtype) for part in parts]), images)
        assert torch.equal(torch.cat([part[1] for part in parts if len(part[1])]), targets)


def test_every_image_is_seen_once_an_epoch_in_another_order(split_images: LabelledImages) -> None:
    recipe = Recipe(batch_size=4, epochs=2)
    loaded = load_split(
        split_images, Preprocessing(resize=16, crop=(16, 16)), cropped=True, stage="", progress=silent
    )  # fmt: skip
    batches = TrainingBatches(loaded, recipe, num_classes=3)
    all_pixels = {tuple(loaded.pixels(i).flatten().tolist()) for i in range(11)}
    epochs = [
        [tuple(image.flatten().tolist()) for step in range(first, first + 3) for image in batches[step][0]]
        for first in (0, 3)
    ]
    assert set(epochs[0]) == set(epochs[1]) == all_pixels
    assert len(epochs[0]) == len(epochs[1]) == 11
    assert epochs[0] != epochs[1]


def test_mixed_targets_still_sum_to_one_image(split_images: LabelledImages) -> None:
    recipe = Recipe(batch_size=11, mixup_alpha=0.8, cutmix_alpha=1.0)
    loaded = load_split(
        split_images, Preprocessing(resize=16, crop=(16, 16)), cropped=True, stage="", progress=silent
    )  # fmt: skip
    images, targets = TrainingBatches(loaded, recipe, num_classes=3)[0]
    assert images.dtype == torch.float32
    assert torch.allclose(targets.sum(dim=1), torch.ones(11))
    assert ((targets > 0) & (targets < 1)).any()
    assert sorted(targets[-1].tolist()) == [0.0, 0.0, 1.0]  # the odd one is left as it is


def test_images_that_do_not_fit_into_memory_are_read_again(
    split_images: LabelledImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    preprocessing = Preprocessing(resize=16, crop=(16, 16))
    whole = load_split(split_images, preprocessing, cropped=True, stage="", progress=silent)
    monkeypatch.setattr("vit_edge.training.batches._KEPT_BYTES", 2000)
    some = load_split(split_images, preprocessing, cropped=True, stage="", progress=silent)
    assert [kept is None for kept in some.kept] == [False] * 2 + [True] * 9
    assert all(torch.equal(whole.pixels(i), some.pixels(i)) for i in range(11))


def test_seeds_differ_and_repeat() -> None:
    seeds = {seed_of(a, b, c) for a in range(4) for b in range(4) for c in range(100)}
    assert len(seeds) == 1600
    assert seed_of(1, 2, 3) == seed_of(1, 2, 3)
    assert all(0 <= seed < 2**63 for seed in seeds)
