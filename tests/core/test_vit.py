"""The network is that of the paper, and its configuration is checked."""

from __future__ import annotations

import pytest
import torch

from vit_edge.vit import VARIANTS, Attention, StochasticDepth, VisionTransformer, ViTConfig, variant

GOOD = {
    "image_size": (16, 16), "patch_size": (8, 8), "width": 12, "depth": 1, "num_heads": 2, "mlp_width": 24,
    "num_classes": 3,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # Table 1 of the paper says 86 M, 307 M and 632 M: base with patches of 16, large of 32, huge of 14.
        ("vit_base_patch16_224", 86_567_656),
        ("vit_large_patch32_224", 306_535_400),
        ("vit_huge_patch14_224", 632_045_800),
        ("vit_large_patch16_224", 304_326_632),
        ("vit_tiny_patch16_224", 5_717_416),
        ("deit_tiny_distilled_patch16_224", 5_910_800),
        ("deit_base_distilled_patch16_224", 87_338_192),
        ("deit3_small_patch16_224", 22_059_496),
        # 22.1 M without a head, to which 1,000 classes add 385,000.
        ("vit_small_patch14_dinov2", 22_056_192 + 385_000),
        ("vit_small_patch14_reg4_dinov2", 22_057_344 + 385_000),
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
        ({"activation": "relu"}, "activation"),
        ({"class_token": False}, "need the class token"),
        ({"distilled": True, "num_registers": 2}, "no registers"),
        ({"distilled": True, "pooling": "mean"}, "pools by its class token"),
        ({"pooling": "class_mean", "final_norm": "after_pooling"}, "norm after it"),
        ({"num_registers": -1}, "num_registers"),
        ({"layer_scale": "small"}, "layer_scale"),
        ({"qkv_bias": 1}, "qkv_bias"),
        ({"stochastic_depth": 1.0}, "stochastic_depth"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViTConfig(**{**GOOD, **change})  # type: ignore[arg-type]


def test_a_configuration_survives_json() -> None:
    config = ViTConfig(**GOOD)  # type: ignore[arg-type]
    assert ViTConfig(**{**config.to_dict(), "image_size": [16, 16]}) == config


def network(**changes: object) -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(ViTConfig(**{**GOOD, "depth": 2, **changes})).eval()  # type: ignore[arg-type]
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


IMAGES = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)


def test_attention_weights_are_those_that_mix_the_values() -> None:
    attention = network().blocks[0].attn
    assert isinstance(attention, Attention)
    x_BTD = torch.randn(2, 5, 12)
    _, _, v_BNTH = attention.queries_keys_values(x_BTD)
    mixed_BTD = (attention.weights(x_BTD) @ v_BNTH).transpose(1, 2).flatten(2)
    assert torch.allclose(attention.proj(mixed_BTD), attention(x_BTD), atol=1e-5)


@torch.no_grad()
def test_the_mean_is_over_patches_and_over_nothing_before_them() -> None:
    model = network(pooling="mean", num_registers=3)
    tokens = model.forward_features(IMAGES)
    assert tokens.shape == (2, 1 + 3 + 4, 12)
    assert torch.allclose(model.head(tokens[:, 4:].mean(dim=1)), model(IMAGES))


@torch.no_grad()
def test_a_distilled_network_answers_with_the_mean_of_its_heads() -> None:
    model = network(distilled=True)
    heads = model.forward_heads(IMAGES)
    assert len(heads) == 2
    assert not torch.allclose(heads[0], heads[1])
    assert torch.allclose(model(IMAGES), (heads[0] + heads[1]) / 2)


@torch.no_grad()
def test_positions_of_patches_only_leave_the_class_token_without_one() -> None:
    model = network(position_slots="patches")
    before = model.embed(IMAGES)
    model.pos_embed += 1.0
    after = model.embed(IMAGES)
    assert torch.equal(before[:, 0], after[:, 0])
    assert torch.allclose(before[:, 1:] + 1.0, after[:, 1:])


def test_stochastic_depth_leaves_out_whole_images_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    layer = StochasticDepth(0.25).train()
    out = layer(torch.ones(20_000, 2, 3))
    assert out.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert (out == out[:, :1, :1]).all()
    assert abs(float(out.mean()) - 1.0) < 0.02
    assert torch.equal(layer.eval()(out), out)


def test_stochastic_depth_rises_from_nothing_to_its_rate() -> None:
    model = VisionTransformer(ViTConfig(**{**GOOD, "depth": 5, "stochastic_depth": 0.4}))  # type: ignore[arg-type]
    rates = [block.stochastic_depth.rate for block in model.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_a_fresh_network_answers_nothing_yet_and_its_patches_know_where_they_are() -> None:
    model = VisionTransformer(ViTConfig(**{**GOOD, "image_size": (32, 32)}))  # type: ignore[arg-type]
    assert not model(torch.randn(2, 3, 32, 32)).any()
    positions = model.pos_embed[0, 1:].detach()
    assert len({tuple(row.tolist()) for row in positions}) == 16
