"""The network is that of the paper, and its configuration is checked."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vit_edge.export.deploy import DeployedViT
from vit_edge.image import Preprocessing
from vit_edge.vit import VARIANTS, VisionTransformer, ViTConfig, variant

GOOD = {
    "image_size": (16, 16), "patch_size": (8, 8), "width": 12, "depth": 1, "num_heads": 2, "mlp_width": 24,
    "num_classes": 3,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("vit_tiny_patch16_224", 5_717_416),
        ("vit_base_patch16_224", 86_567_656),
        ("vit_large_patch16_224", 304_326_632),
        ("vit_huge_patch14_224", 632_045_800),
    ],
)
def test_parameter_counts_are_those_of_the_papers(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = VisionTransformer(variant(name, num_classes=1000))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_every_variant_is_valid_and_unknown_names_are_refused() -> None:
    assert all(VARIANTS[name].num_patches > 0 for name in VARIANTS)
    with pytest.raises(ValueError, match="choose one of"):
        variant("vit_gigantic", num_classes=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": (5, 8)}, "multiple of the patch"),
        ({"num_heads": 5}, "multiple of num_heads"),
        ({"depth": 0}, "depth"),
        ({"pooling": "max"}, "pooling"),
        ({"dropout": 1.0}, "dropout"),
        ({"image_size": 16}, "image_size"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViTConfig(**{**GOOD, **change})  # type: ignore[arg-type]


def test_a_configuration_survives_json() -> None:
    config = ViTConfig(**GOOD)  # type: ignore[arg-type]
    assert ViTConfig(**{**config.to_dict(), "image_size": [16, 16]}) == config


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 3),
    columns=st.integers(1, 3),
    patch=st.sampled_from([(4, 4), (8, 4), (4, 6)]),
    heads=st.integers(1, 3),
    depth=st.integers(1, 3),
    classes=st.integers(1, 5),
    pooling=st.sampled_from(["class", "mean"]),
    batch=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_the_deploy_form_is_the_same_function(
    rows: int, columns: int, patch: tuple[int, int], heads: int, depth: int, classes: int, pooling: str, batch: int,
    seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=(rows * patch[0], columns * patch[1]), patch_size=patch, width=8 * heads, depth=depth,
        num_heads=heads, mlp_width=20, num_classes=classes, pooling=pooling,
    )  # type: ignore[arg-type]  # fmt: skip
    model = VisionTransformer(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    preprocessing = Preprocessing(resize=config.image_size, crop=config.image_size)
    images = torch.randint(0, 256, (batch, *config.image_size, 3), dtype=torch.uint8)
    with torch.no_grad():
        expected = model(torch.from_numpy(preprocessing.normalise(images.numpy())))
        found = DeployedViT(model, preprocessing)(images)
    assert found.shape == (batch, classes)
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


def test_the_last_block_computes_one_token_only() -> None:
    torch.manual_seed(0)
    config = ViTConfig(**{**GOOD, "depth": 2, "image_size": (64, 64)})  # type: ignore[arg-type]
    model = VisionTransformer(config).eval()
    deployed = DeployedViT(model, Preprocessing(resize=64, crop=(64, 64)))
    last = deployed.block[-1]
    shapes: list[tuple[int, ...]] = []
    last.get_submodule("fc1").register_forward_hook(lambda _m, inputs, _o: shapes.append(tuple(inputs[0].shape)))
    deployed(torch.zeros(5, 64, 64, 3, dtype=torch.uint8))
    assert shapes == [(5, 1, 12)]
