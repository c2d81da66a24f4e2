"""The network is that of the paper, and its configuration is checked."""

from __future__ import annotations

import pytest
import torch

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
    with pytest.raises(ValueError, match="did you mean vit_huge"):
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
