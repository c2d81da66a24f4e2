"""What the converter changes, it says: prefixes, heads, positions; and each change is the right one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.converter_table import randomise
from tests.support.third_party_weights import bare, same_logits, save_timm, state_of, timm_model
from vit_edge.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from vit_edge.conversion.positions import Resampling, resample_positions
from vit_edge.convert import convert, open_source, read_source
from vit_edge.errors import CheckpointRejected
from vit_edge.image import Preprocessing
from vit_edge.vit import VisionTransformer, ViTConfig


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return timm_model()


@pytest.mark.parametrize("prefix", ["module.", "model.", "net.", "_orig_mod.", "module._orig_mod.", "backbone.vit."])
def test_the_prefix_of_a_wrapper_is_stripped_and_said(tmp_path: Path, model: nn.Module, prefix: str) -> None:
    state = {prefix + name: tensor for name, tensor in state_of(model).items()}
    made = read_source(bare(tmp_path / "a.ckpt", state))
    assert f"prefix {prefix!r} stripped from the keys" in made.report.notes
    assert made.report.mapped[0].sources[0].startswith(prefix)
    assert same_logits(made.checkpoint.model, model, (64, 64)) < 1e-5


@pytest.mark.parametrize("key", ["state_dict_ema", "model_ema", "ema"])
def test_averaged_weights_come_before_the_last_ones(tmp_path: Path, model: nn.Module, key: str) -> None:
    last = {name: torch.zeros_like(tensor) for name, tensor in state_of(model).items()}
    torch.save({"state_dict": last, key: state_of(model), "epoch": 3}, tmp_path / "a.pth.tar")
    made = read_source(tmp_path / "a.pth.tar")
    assert f"averaged weights ({key}) taken; those in state_dict left out" in made.report.notes
    assert same_logits(made.checkpoint.model, model, (64, 64)) < 1e-5


def test_averaged_weights_in_the_same_dictionary_are_told_apart_by_prefix(tmp_path: Path, model: nn.Module) -> None:
    state = {f"ema_model.module.{name}": tensor for name, tensor in state_of(model).items()}
    state |= {f"model.{name}": torch.zeros_like(tensor) for name, tensor in state_of(model).items()}
    state["ema_model.n_averaged"] = torch.tensor(7)
    torch.save({"state_dict": state, "pytorch-lightning_version": "2.5"}, tmp_path / "a.ckpt")
    made = read_source(tmp_path / "a.ckpt")
    assert made.report.unused["ema_model.n_averaged"] == "it counts, it is no weight"
    assert made.report.unused["model.head.bias"] == "other weights of the same network, not averaged"
    assert same_logits(made.checkpoint.model, model, (64, 64)) < 1e-5


def test_torchs_own_averaged_model_is_read(tmp_path: Path, model: nn.Module) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(model)
    made = read_source(bare(tmp_path / "a.pt", averaged.state_dict()))
    assert made.report.unused == {"n_averaged": "it counts, it is no weight"}
    assert same_logits(made.checkpoint.model, model, (64, 64)) < 1e-5


def test_two_networks_in_one_file_are_refused(tmp_path: Path, model: nn.Module) -> None:
    state = {f"{who}.{name}": tensor for who in ("student", "teacher") for name, tensor in state_of(model).items()}
    with pytest.raises(CheckpointRejected, match=r"2 networks: under 'student\.', 'teacher\.'"):
        open_source(bare(tmp_path / "a.pt", state))


def test_a_head_is_replaced_on_request_only_and_said(tmp_path: Path, model: nn.Module) -> None:
    source = bare(tmp_path / "a.safetensors", state_of(model))
    made = read_source(source, num_classes=5)
    assert "the head of 3 classes was replaced: 5 classes, zeros, to be trained" in made.report.notes
    assert set(made.report.new) == {"head.weight", "head.bias"}
    assert not made.checkpoint.model.head.weight.any()
    assert made.checkpoint.labels == tuple("01234")
    kept = read_source(source, num_classes=3)
    assert kept.report.new == ()
    assert torch.equal(kept.checkpoint.model.head.weight, model.state_dict()["head.weight"])


def test_a_backbone_without_a_head_gets_one_on_request_only(tmp_path: Path) -> None:
    backbone = save_timm(tmp_path, timm_model("vit_small_patch14_dinov2", img_size=56, num_classes=0))
    with pytest.raises(CheckpointRejected, match="add --num-classes N"):
        open_source(backbone)
    made = read_source(backbone, num_classes=4)
    assert "there was no head; it got one: 4 classes, zeros, to be trained" in made.report.notes
    with torch.no_grad():
        images = torch.randn(1, 3, 56, 56)
        expected = timm_model("vit_small_patch14_dinov2", img_size=56, num_classes=0)(images)
        found = made.checkpoint.model.forward_features(images)[:, 0]
    assert torch.allclose(found, expected, atol=1e-5)


def test_both_heads_of_a_distilled_network_are_replaced(tmp_path: Path) -> None:
    source = bare(tmp_path / "a.pt", state_of(timm_model("deit_tiny_distilled_patch16_224")))
    made = read_source(source, num_classes=7)
    assert made.checkpoint.model.config.distilled
    assert set(made.report.new) == {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}


@pytest.mark.parametrize("size", [(96, 96), (48, 48), (64, 96), (96, 32)])
def test_another_resolution_is_that_of_timm(tmp_path: Path, model: nn.Module, size: tuple[int, int]) -> None:
    timm = pytest.importorskip("timm")
    made = read_source(bare(tmp_path / "a.pt", state_of(model)), image_size=size, like="timm:vit_tiny_patch16_224")
    config = made.checkpoint.model.config
    expected = timm.layers.resample_abs_pos_embed(
        model.state_dict()["pos_embed"], new_size=list(config.grid), num_prefix_tokens=1
    )
    assert config.image_size == made.checkpoint.preprocessing.crop == size
    assert torch.allclose(made.checkpoint.model.pos_embed, expected, atol=1e-6, rtol=0)
    assert "resampled from 4x4" in next(m.change for m in made.report.reshaped if m.target == "pos_embed")
    resized = timm_model(img_size=size)
    resized.load_state_dict({**state_of(model), "pos_embed": expected})
    assert same_logits(made.checkpoint.model, resized, size) < 1e-5


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "vit_medium_patch16_reg4_gap_256"])
def test_another_resolution_keeps_what_stands_before_the_patches(tmp_path: Path, name: str) -> None:
    timm = pytest.importorskip("timm")
    model = timm_model(name)
    made = read_source(bare(tmp_path / "a.pt", state_of(model)), image_size=(96, 96))
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    expected = timm.layers.resample_abs_pos_embed(
        model.state_dict()["pos_embed"], new_size=[6, 6], num_prefix_tokens=prefix
    )
    assert torch.allclose(made.checkpoint.model.pos_embed, expected, atol=1e-6, rtol=0)


def test_another_resolution_is_that_of_torchvision(tmp_path: Path) -> None:
    from torchvision.models import vision_transformer

    model = randomise(vision_transformer.VisionTransformer(64, 16, 1, 12, 768, 96, num_classes=3))
    made = read_source(bare(tmp_path / "a.pth", state_of(model)), image_size=(112, 112))
    larger = vision_transformer.VisionTransformer(112, 16, 1, 12, 768, 96, num_classes=3).eval()
    larger.load_state_dict(vision_transformer.interpolate_embeddings(112, 16, model.state_dict()))
    assert torch.allclose(made.checkpoint.model.pos_embed, larger.encoder.pos_embedding, atol=1e-6, rtol=0)
    assert same_logits(made.checkpoint.model, larger, (112, 112)) < 1e-5


@pytest.mark.parametrize("kind", ["ViT", "DeiT", "Dinov2", "Dinov2WithRegisters"])
def test_another_resolution_is_that_of_transformers(tmp_path: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=40, patch_size=8, num_labels=3
    )
    model = randomise(getattr(transformers, f"{kind}ForImageClassification")(config))
    if kind in ("ViT", "DeiT"):  # theirs divides by the whole patch size, which has to be a number for that
        model.base_model.embeddings.patch_size = 8
    model.save_pretrained(tmp_path)
    made = read_source(tmp_path, image_size=(64, 64))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        extra = {"interpolate_pos_encoding": True} if kind in ("ViT", "DeiT") else {}
        expected, found = model(images, **extra).logits, made.checkpoint.model(images)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_grid_that_is_not_square_is_resampled_by_row_and_column() -> None:
    timm = pytest.importorskip("timm")
    positions = torch.randn(1, 2 + 3 * 5, 8)
    found = resample_positions(positions, old=(3, 5), new=(6, 4), resampling=Resampling(antialias=True))
    expected = timm.layers.resample_abs_pos_embed(positions, new_size=[6, 4], old_size=[3, 5], num_prefix_tokens=2)
    assert torch.allclose(found, expected, atol=1e-6, rtol=0)
    assert torch.equal(found[:, :2], positions[:, :2])


def test_a_network_that_is_not_square_is_read_where_its_size_is_told(tmp_path: Path) -> None:
    model = timm_model(img_size=(48, 96))
    source = bare(tmp_path / "a.pt", state_of(model))
    with pytest.raises(CheckpointRejected, match="HEIGHTxWIDTH"):
        open_source(source)
    assert same_logits(open_source(source, image_size=(48, 96)).model, model, (48, 96)) < 1e-5
    folder = save_timm(tmp_path / "folder", model)
    assert open_source(folder).model.config.image_size == (48, 96)
    assert open_source(folder, image_size=(96, 48)).model.config.grid == (6, 3)
    with pytest.raises(CheckpointRejected, match="not a multiple of the patch size"):
        open_source(folder, image_size=(50, 48))


def own_checkpoint(path: Path, **fields: object) -> tuple[Path, Checkpoint]:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=(32, 32), patch_size=(8, 8), width=24, depth=2, num_heads=3, mlp_width=40, num_classes=3,
        activation="gelu_tanh", layer_norm_eps=1e-3, dropout=0.1, stochastic_depth=0.2, **fields,
    )  # type: ignore[arg-type]  # fmt: skip
    checkpoint = Checkpoint(
        name="ours",
        model=randomise(VisionTransformer(config)),  # type: ignore[arg-type]
        preprocessing=Preprocessing(resize=40, crop=(32, 32), interpolation="bilinear"),
        labels=("a", "b", "c"),
        license="MIT",
        assumed=("labels", "preprocessing.mean"),
        evaluation={"top1": 50.0},
    )
    save_checkpoint(path, checkpoint)
    return path, checkpoint


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_registers": 5, "layer_scale": 0.1, "position_slots": "patches"},
        {"num_registers": 5, "position_slots": "all"},
        {"pooling": "mean", "final_norm": "after_pooling", "pre_norm": True, "patch_bias": False, "qkv_bias": False},
        {"class_token": False, "pooling": "mean"},
        {"pooling": "class_mean"},
        {"distilled": True},
    ],
)
def test_a_checkpoint_of_ours_comes_back_as_it_is(tmp_path: Path, fields: dict[str, object]) -> None:
    path, checkpoint = own_checkpoint(tmp_path / "a", **fields)
    made = read_source(path)
    found = made.checkpoint
    assert found.model.config == checkpoint.model.config
    for name in ("name", "preprocessing", "labels", "license", "evaluation"):
        assert getattr(found, name) == getattr(checkpoint, name)
    assert set(found.assumed) == set(checkpoint.assumed)
    for name, tensor in checkpoint.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], tensor)
    assert made.report.library == "vit-edge"
    assert found.training == checkpoint.training
    assert found.sha256 == load_checkpoint(path).sha256


def test_a_checkpoint_of_ours_can_be_resampled_and_get_a_head(tmp_path: Path) -> None:
    path, _ = own_checkpoint(tmp_path / "a")
    convert(path, out=tmp_path / "out", image_size=(64, 64), num_classes=2)
    found = load_checkpoint(tmp_path / "out")
    assert found.model.config.image_size == found.preprocessing.crop == (64, 64)
    assert found.preprocessing.resize == 80
    assert found.model.config.num_classes == 2


def test_the_same_source_gives_the_same_bytes(tmp_path: Path, model: nn.Module) -> None:
    source = bare(tmp_path / "a.safetensors", state_of(model))
    for name in ("b", "c"):
        convert(source, out=tmp_path / name)
    assert (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()
    assert str(tmp_path).encode() not in (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("change", [{"num_heads": 4}, {"activation": "quick_gelu"}, {"layer_norm_eps": 1e-3}])
def test_the_comparison_with_the_library_sees_a_wrong_fact(
    tmp_path: Path, model: nn.Module, change: dict[str, object]
) -> None:
    right = open_source(bare(tmp_path / "a.pt", state_of(model)))
    wrong = VisionTransformer(dataclasses.replace(right.model.config, **change)).eval()  # type: ignore[arg-type]
    wrong.load_state_dict(right.model.state_dict())
    assert same_logits(right.model, model, (64, 64)) < 1e-5 < 1e-4 < same_logits(wrong, model, (64, 64))


def test_weights_as_their_authors_published_them_are_read(tmp_path: Path) -> None:
    deit3: dict[str, Tensor] = {
        name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): tensor
        for name, tensor in state_of(timm_model("deit3_small_patch16_224")).items()
    }
    torch.save({"model": deit3}, tmp_path / "deit_3_small_224_1k.pth")
    made = read_source(tmp_path / "deit_3_small_224_1k.pth")
    assert same_logits(made.checkpoint.model, timm_model("deit3_small_patch16_224"), (64, 64)) < 1e-5
    assert made.report.name == "deit_3_small_224_1k"
