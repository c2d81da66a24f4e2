"""Settings that shapes do not show come from the source that specifies them, or are assumed, with a warning."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.converter_table import randomise
from tests.support.third_party_weights import CLASSES, bare, same_logits, save_timm, state_of, timm_model
from vit_edge.checkpoint import load_checkpoint, save_checkpoint
from vit_edge.conversion.label_names import read_labels
from vit_edge.convert import convert, open_source, read_source
from vit_edge.errors import CheckpointRejected, InputError, UsageError
from vit_edge.image import Preprocessing

EVERYTHING = {
    "num_heads", "activation", "layer_norm_eps", "pooling", "preprocessing.mean", "preprocessing.std",
    "preprocessing.interpolation", "preprocessing.resize", "labels",
}  # fmt: skip


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder as transformers saves it."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("hf")
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=100, image_size=32, patch_size=8,
        hidden_act="gelu_new", layer_norm_eps=1e-4, qkv_bias=False, id2label=dict(enumerate(CLASSES)),
    )  # fmt: skip
    randomise(transformers.ViTForImageClassification(config)).save_pretrained(folder)
    transformers.ViTImageProcessor(
        size={"height": 40, "width": 32}, resample=3, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]
    ).save_pretrained(folder)
    return folder


def changed(folder: Path, target: Path, name: str, **changes: Any) -> Path:
    """Return a copy of a folder with some values of one of its JSON files changed; None takes a key out."""
    shutil.copytree(folder, target)
    values = json.loads((target / name).read_text()) | changes
    (target / name).write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return target


def test_bare_weights_are_assumed_to_be_usual_and_every_load_warns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = bare(tmp_path / "a.safetensors", state_of(timm_model()))
    with caplog.at_level(logging.WARNING, logger="vit_edge"):
        report = convert(source, out=tmp_path / "out")
    assert set(report.assumed) == EVERYTHING
    assert report.known == {}
    assert "assumed, not specified: num_heads" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="vit_edge"):
        checkpoint = load_checkpoint(tmp_path / "out")
    assert "assumed, not specified: num_heads" in caplog.text
    assert checkpoint.labels == ("0", "1", "2")
    assert checkpoint.model.config.num_heads == 3


def test_timm_tells_heads_activation_eps_and_preprocessing_by_name(tmp_path: Path) -> None:
    model = timm_model("vit_base_patch16_clip_quickgelu_224")
    source = bare(tmp_path / "a.pth", state_of(model))
    report = convert(source, out=tmp_path / "out", like="timm:vit_base_patch16_clip_quickgelu_224")
    assert report.assumed == ("labels",)
    checkpoint = load_checkpoint(tmp_path / "out")
    config = checkpoint.model.config
    assert (config.num_heads, config.activation, config.layer_norm_eps) == (12, "quick_gelu", 1e-5)
    assert checkpoint.preprocessing.mean[0] == pytest.approx(0.48145466)
    assert checkpoint.preprocessing.resize == 64  # its crop is the whole image
    assert same_logits(checkpoint.model, model, (64, 64)) < 1e-5


def test_a_network_of_another_width_tells_nothing(tmp_path: Path) -> None:
    source = bare(tmp_path / "a.pth", state_of(timm_model()))
    with pytest.raises(
        CheckpointRejected, match="width is 768 by --like timm:vit_base_patch16_224, 192 by the tensors"
    ):
        open_source(source, like="timm:vit_base_patch16_224")


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ("vit_tiny_patch16_224", "write timm:NAME"),
        ("timm:vit_tinny_patch16_224", "did you mean vit_tiny_patch16_224"),
        ("timm:hf-hub:someone/something", "no network"),
        ("timm:vit_base_patch16_siglip_224", "no plain Vision Transformer"),
        ("timm:resnet18", "no plain Vision Transformer"),
    ],
)
def test_a_name_that_cannot_tell_is_refused(tmp_path: Path, like: str, message: str) -> None:
    source = bare(tmp_path / "a.pth", state_of(timm_model()))
    with pytest.raises(UsageError, match=message):
        open_source(source, like=like)


def test_a_folder_of_timm_tells_everything(tmp_path: Path) -> None:
    model = timm_model("deit3_small_patch16_224", num_heads=4)
    save_timm(tmp_path / "a", model, model_config={"label_names": list(CLASSES)})
    made = read_source(tmp_path / "a")
    assert made.report.assumed == ()
    assert made.report.known["num_heads"] == "config.json"
    assert made.checkpoint.labels == CLASSES
    assert made.checkpoint.license == "apache-2.0"
    assert made.checkpoint.model.config.num_heads == 4
    assert made.checkpoint.preprocessing.resize == int(64 / 0.9)
    assert same_logits(made.checkpoint.model, model, (64, 64)) < 1e-5


def test_a_folder_of_transformers_tells_everything(vit_folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = changed(vit_folder, tmp_path / "a", "preprocessor_config.json", size={"height": 32, "width": 32})
    made = read_source(folder)
    config = made.checkpoint.model.config
    assert made.report.assumed == ()
    assert (config.num_heads, config.activation, config.layer_norm_eps) == (4, "gelu_tanh", 1e-4)
    assert (config.mlp_width, config.qkv_bias) == (100, False)
    assert made.checkpoint.labels == CLASSES
    assert made.checkpoint.preprocessing == Preprocessing(
        resize=(32, 32), crop=(32, 32), interpolation="bicubic", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)
    )
    model = transformers.ViTForImageClassification.from_pretrained(folder).eval()
    assert same_logits(made.checkpoint.model, model, (32, 32)) < 1e-5


def test_the_newer_spelling_of_transformers_is_read_too(vit_folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.ViTForImageClassification.from_pretrained(vit_folder).eval()
    folder = changed(vit_folder, tmp_path / "a", "config.json")
    (folder / "model.safetensors").unlink()
    torch.save({f"module.{name}": tensor for name, tensor in model.state_dict().items()}, folder / "pytorch_model.bin")
    made = read_source(folder)
    assert "prefix 'module.' stripped from the keys" in made.report.notes
    assert same_logits(made.checkpoint.model, model, (32, 32)) < 1e-5


def test_weights_in_shards_are_joined(vit_folder: Path, tmp_path: Path) -> None:
    folder = changed(vit_folder, tmp_path / "a", "config.json")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    files = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(names)}
    for file in set(files.values()):
        bare(folder / file, {name: state[name] for name in names if files[name] == file})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    made = read_source(folder)
    assert "2 shards joined" in made.report.notes
    whole = read_source(vit_folder).checkpoint.model.state_dict()
    assert all(torch.equal(whole[name], tensor) for name, tensor in made.checkpoint.model.state_dict().items())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    with pytest.raises(CheckpointRejected, match="outside of its folder"):
        read_source(folder)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"do_normalize": False}, {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}),
        ({"do_rescale": False}, {"mean": (0.1 / 255, 0.2 / 255, 0.3 / 255)}),
        ({"size": 32}, {"resize": (32, 32)}),
        ({"size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": 32}, {"resize": 40}),
        ({"size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": 32}, {"crop_rounding": "floor"}),
        ({"size": 40, "default_to_square": False, "do_center_crop": True, "crop_size": 32}, {"resize": 40}),
        ({"resample": 2}, {"interpolation": "bilinear"}),
    ],
)
def test_settings_of_an_image_processor_are_taken_over(
    vit_folder: Path, tmp_path: Path, changes: dict[str, Any], expected: dict[str, Any]
) -> None:
    folder = changed(vit_folder, tmp_path / "a", "preprocessor_config.json", **changes)
    preprocessing = open_source(folder).preprocessing
    for name, value in expected.items():
        assert getattr(preprocessing, name) == pytest.approx(value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"do_resize": False}, "do_resize is false"),
        ({"size": {"shortest_edge": 40}}, "no fixed size"),
        ({"size": {"longest_edge": 40}}, "cannot be represented"),
        ({"resample": 4}, "resample 4"),
        ({"rescale_offset": True}, "rescale_offset"),
        ({"image_mean": [1, 2]}, "three numbers"),
        ({"do_pad": True}, "do_pad"),
        ({"crop_pct": 0.9}, "crop_pct"),
        ({"include_top": True}, "include_top"),
        ({"do_flip_channel_order": True}, "do_flip_channel_order"),
        ({"do_something_new": True}, "do_something_new"),
    ],
)
def test_settings_that_cannot_be_represented_are_refused(
    vit_folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = changed(vit_folder, tmp_path / "a", "preprocessor_config.json", **changes)
    with pytest.raises(UsageError, match=message):
        open_source(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "beit"}, "model_type is 'beit'"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"hidden_size": 64}, "width is 64 by config.json, 48 by the tensors"),
        ({"num_hidden_layers": 3}, "depth is 3 by config.json, 2 by the tensors"),
        ({"num_attention_heads": 5}, "not a multiple of num_heads 5"),
        ({"use_swiglu_ffn": True}, "gated"),
        ({"image_size": "large"}, "is no size"),
    ],
)
def test_a_configuration_that_does_not_fit_names_its_field(
    vit_folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = changed(vit_folder, tmp_path / "a", "config.json", **changes)
    with pytest.raises(CheckpointRejected, match=message):
        open_source(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"problem_type": "multi_label_classification"}, "problem_type is 'multi_label_classification'"),
        ({"problem_type": "regression"}, "problem_type is 'regression'"),
    ],
)
def test_a_head_that_softmax_would_misread_is_refused_unless_replaced(
    vit_folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = changed(vit_folder, tmp_path / "a", "config.json", **changes)
    with pytest.raises(CheckpointRejected, match=message):
        open_source(folder)
    assert open_source(folder, num_classes=4).labels == ("0", "1", "2", "3")
    plain = changed(vit_folder, tmp_path / "b", "config.json", problem_type="single_label_classification")
    assert open_source(plain).labels == CLASSES


def test_one_logit_is_refused(tmp_path: Path) -> None:
    state = state_of(timm_model())
    state |= {name: tensor[:1].clone() for name, tensor in state.items() if name.startswith("head.")}
    source = bare(tmp_path / "a.safetensors", state)
    with pytest.raises(CheckpointRejected, match="one logit"):
        open_source(source)


def test_labels_that_a_library_made_up_are_nobodys(vit_folder: Path, tmp_path: Path) -> None:
    made_up = {str(index): f"LABEL_{index}" for index in range(3)}
    folder = changed(vit_folder, tmp_path / "a", "config.json", id2label=made_up)
    assert read_source(folder).report.assumed == ("labels",)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '{"resize": 40, "crop": [32, 32], "interpolation": "lanczos", "mean": [0, 0, 0], "std": [1, 1, 1]}'),
        ("a.toml", 'resize = 40\ncrop = [32, 32]\ninterpolation = "lanczos"\nmean = [0, 0, 0]\nstd = [1, 1, 1]\n'),
    ],
)
def test_what_the_user_says_of_preprocessing_counts_most(
    vit_folder: Path, tmp_path: Path, name: str, text: str
) -> None:
    (tmp_path / name).write_text(text)
    (tmp_path / "labels.txt").write_text("ant\nbee\ncow\n")
    made = read_source(vit_folder, preprocessing=tmp_path / name, labels=tmp_path / "labels.txt")
    assert made.checkpoint.preprocessing == Preprocessing(
        resize=40, crop=(32, 32), interpolation="lanczos", mean=(0, 0, 0), std=(1, 1, 1)
    )
    assert made.checkpoint.labels == ("ant", "bee", "cow")
    assert made.report.known["preprocessing.mean"] == "--preprocessing"
    assert made.report.known["labels"] == "--labels"


def test_a_part_of_the_preprocessing_leaves_the_rest_assumed(tmp_path: Path) -> None:
    source = bare(tmp_path / "a.safetensors", state_of(timm_model()))
    (tmp_path / "p.json").write_text('{"mean": [0.5, 0.5, 0.5], "std": 0.5}')
    report = read_source(source, preprocessing=tmp_path / "p.json").report
    assert set(report.assumed) == EVERYTHING - {"preprocessing.mean", "preprocessing.std"}


@pytest.mark.parametrize(
    "text", ['{"mean": [1, 2]}', '{"resizze": 3}', "[]", "{", '{"crop": 3}', '{"resize": 9999999}']
)
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, text: str) -> None:
    source = bare(tmp_path / "a.safetensors", state_of(timm_model()))
    (tmp_path / "p.json").write_text(text)
    with pytest.raises((UsageError, InputError)):
        open_source(source, preprocessing=tmp_path / "p.json")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ant\nbee\n\n", ("ant", "bee")),
        ('["ant", "bee"]', ("ant", "bee")),
        ('{"id2label": {"1": "bee", "0": "ant"}}', ("ant", "bee")),
        ('{"bee": 1, "ant": 0}', ("ant", "bee")),
    ],
)
def test_labels_are_read_in_every_usual_form(tmp_path: Path, text: str, expected: tuple[str, ...]) -> None:
    (tmp_path / "labels").write_text(text)
    assert read_labels(tmp_path / "labels") == expected


@pytest.mark.parametrize("text", ["", "ant\n\nbee\n", '{"0": "ant", "2": "bee"}', "[1, 2]", '{"a": "b"}'])
def test_labels_that_cannot_be_meant_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "labels").write_text(text)
    with pytest.raises(InputError, match="labels"):
        read_labels(tmp_path / "labels")


def test_class_folders_name_the_labels(tmp_path: Path) -> None:
    for name in ("owl", "cat", "dog"):
        (tmp_path / "images" / "train" / name).mkdir(parents=True)
    assert read_labels(tmp_path / "images") == ("cat", "dog", "owl")
    source = bare(tmp_path / "a.safetensors", state_of(timm_model()))
    assert open_source(source, labels=tmp_path / "images").labels == ("cat", "dog", "owl")


def test_labels_of_another_number_are_refused(tmp_path: Path) -> None:
    source = bare(tmp_path / "a.safetensors", state_of(timm_model()))
    (tmp_path / "labels").write_text("ant\nbee\n")
    with pytest.raises(InputError, match="2 names, the network has 3 classes"):
        open_source(source, labels=tmp_path / "labels")


def test_dinov2_is_used_at_the_size_of_its_processor(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    settings = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 70, "patch_size": 14}
    model = randomise(transformers.Dinov2ForImageClassification(transformers.Dinov2Config(num_labels=3, **settings)))
    model.save_pretrained(tmp_path)
    transformers.BitImageProcessor(
        size={"shortest_edge": 64}, crop_size={"height": 42, "width": 42}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(tmp_path)
    made = read_source(tmp_path)
    assert made.checkpoint.model.config.image_size == (42, 42)
    assert (made.checkpoint.preprocessing.resize, made.checkpoint.preprocessing.crop) == (64, (42, 42))
    assert made.checkpoint.model.config.pooling == "class_mean"
    assert same_logits(made.checkpoint.model, model, (42, 42)) < 1e-5


def test_a_configuration_beside_the_only_weights_counts_whatever_they_are_called(
    vit_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(vit_folder, tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "hf" / "mine.safetensors")
    made = read_source(tmp_path / "hf" / "mine.safetensors")
    assert made.checkpoint.labels == CLASSES
    assert made.checkpoint.assumed == ()


def test_labels_come_from_a_network_of_timm_that_ends_in_imagenet(tmp_path: Path) -> None:
    source = bare(tmp_path / "a.safetensors", state_of(timm_model(num_classes=1000)))
    checkpoint = open_source(source, like="timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    assert checkpoint.labels[1].startswith("goldfish")
    assert "labels" not in checkpoint.assumed


def test_the_same_weights_in_another_folder_have_the_same_name(tmp_path: Path) -> None:
    names = set()
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        names.add(open_source(bare(tmp_path / folder / "model.safetensors", state_of(timm_model()))).name)
    assert len(names) == 1


def test_an_accuracy_is_not_carried_over_to_another_head(tmp_path: Path) -> None:
    source = bare(tmp_path / "a.safetensors", state_of(timm_model()))
    checkpoint = dataclasses.replace(open_source(source), evaluation={"top1": 99.0})
    save_checkpoint(tmp_path / "ours", checkpoint)
    assert open_source(tmp_path / "ours").evaluation == {"top1": 99.0}
    assert open_source(tmp_path / "ours", num_classes=5).evaluation is None
