"""The fused inference graph is the same function as the network, for every configuration there is, and does less."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.networks import FAMILIES, random_network, small_config
from vit_edge.export.tracing.fused_vit import DeployedViT
from vit_edge.image import Preprocessing
from vit_edge.vit import VisionTransformer, ViTConfig


@st.composite
def configurations(draw: st.DrawFn) -> ViTConfig:
    """Draw any valid configuration of a small network: every field that the fused inference graph reads."""
    class_token = draw(st.booleans())
    pooling = draw(st.sampled_from(["class", "mean", "class_mean"])) if class_token else "mean"
    distilled = draw(st.booleans()) if pooling == "class" else False
    after = draw(st.booleans()) if pooling != "class_mean" and not distilled else False
    patch, heads = draw(st.sampled_from([(4, 4), (8, 4), (4, 6)])), draw(st.integers(1, 3))
    return ViTConfig(
        image_size=(draw(st.integers(1, 3)) * patch[0], draw(st.integers(1, 3)) * patch[1]),
        patch_size=patch,
        width=8 * heads,
        depth=draw(st.integers(1, 3)),
        num_heads=heads,
        mlp_width=20,
        num_classes=draw(st.integers(1, 5)),
        pooling=pooling,  # type: ignore[arg-type]
        class_token=class_token,
        distilled=distilled,
        num_registers=0 if distilled else draw(st.integers(0, 3)),
        position_slots=draw(st.sampled_from(["all", "patches"])),
        patch_bias=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
        pre_norm=draw(st.booleans()),
        final_norm="after_pooling" if after else "before_pooling",
        layer_scale=draw(st.sampled_from([None, 0.1])),
        activation=draw(st.sampled_from(["gelu", "gelu_tanh", "quick_gelu"])),
        layer_norm_eps=draw(st.sampled_from([1e-6, 1e-5])),
    )


def _both(model: VisionTransformer, images_BYXC: Tensor) -> tuple[Tensor, Tensor]:
    size = model.config.image_size
    preprocessing = Preprocessing(resize=size, crop=size)
    with torch.no_grad():
        expected_BK = model(torch.from_numpy(preprocessing.normalise(images_BYXC.numpy())))
        return expected_BK, DeployedViT(model, preprocessing)(images_BYXC)


def _is_the_same_function(model: VisionTransformer, *, batch: int) -> None:
    images_BYXC = torch.randint(0, 256, (batch, *model.config.image_size, 3), dtype=torch.uint8)
    expected_BK, found_BK = _both(model, images_BYXC)
    allowed = 1e-5 * max(1.0, float(expected_BK.abs().max()))
    assert found_BK.shape == expected_BK.shape
    assert (found_BK - expected_BK).abs().max() <= allowed
    # Where two logits are equal up to rounding, either may be the larger.
    chosen_B1 = found_BK.argmax(dim=1, keepdim=True)
    assert (expected_BK.gather(1, chosen_B1)[:, 0] >= expected_BK.max(dim=1).values - 2 * allowed).all()


@settings(max_examples=150, deadline=None)
@given(config=configurations(), batch=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_the_fused_graph_is_the_same_function(config: ViTConfig, batch: int, seed: int) -> None:
    _is_the_same_function(random_network(config, seed=seed), batch=batch)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_its_fused_graph(family: str) -> None:
    _is_the_same_function(random_network(small_config(**FAMILIES[family]), seed=0), batch=3)


@pytest.mark.parametrize(
    ("family", "tokens"),
    [
        ("class_token", 1),
        ("deit_distilled", 2),
        ("registers", 1),
        ("mean_without_class_token", 6),
        ("mean_beside_class_token", 6),
        ("dinov2_linear", 7),
    ],
)
def test_the_last_block_computes_only_what_pooling_reads(family: str, tokens: int) -> None:
    model = random_network(small_config(**FAMILIES[family]), seed=0)
    deployed = DeployedViT(model, Preprocessing(resize=(24, 16), crop=(24, 16)))
    seen: list[tuple[int, ...]] = []
    for block in deployed.block:
        op = block.get_submodule("fc1")
        op.register_forward_hook(lambda _module, inputs, _output: seen.append(tuple(inputs[0].shape)))
    deployed(torch.zeros(5, 24, 16, 3, dtype=torch.uint8))
    all_tokens = model.config.num_prefix_tokens + model.config.num_patches
    assert seen == [(5, all_tokens, 24), (5, tokens, 24)]


def test_no_tensor_has_more_than_four_axes() -> None:
    for changes in FAMILIES.values():
        model = random_network(small_config(**changes), seed=0)
        deployed = DeployedViT(model, Preprocessing(resize=(24, 16), crop=(24, 16)))
        traced = torch.export.export(deployed.eval(), (torch.zeros(5, 24, 16, 3, dtype=torch.uint8),))
        values = [node.meta["val"] for node in traced.graph.nodes if isinstance(node.meta.get("val"), Tensor)]
        assert max(value.ndim for value in values) <= 4
