"""The families of `zoo.py`: how a small network of each is made, with random weights like those of trained ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

__all__ = ["FAMILIES", "Family", "Library", "save_family"]

Library: TypeAlias = Literal["transformers", "timm", "torchvision"]
_NUM_CLASSES = 5
_SIDE = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """A network of a library: the configuration class, the name or the factory, and what makes it small."""

    name: str
    library: Library
    of: str
    arguments: dict[str, Any] = field(default_factory=dict)
    side: int = _SIDE


_PLAIN = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96, "image_size": 64,
    "patch_size": 16,
}  # fmt: skip
_TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
_TOWERS = {"vision_config": _PLAIN, "text_config": _TEXT}
_WINDOWS = {
    "image_size": 64, "patch_size": 4, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4
}  # fmt: skip
_STAGES = {"image_size": 64, "hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1]}
_HEADS = {**_STAGES, "num_attention_heads": [1, 2, 2, 4]}
_CONVNEXT = {"image_size": 64, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1]}

_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "ViT": _PLAIN,
    "DeiT": _PLAIN,
    "Dinov2": {**_PLAIN, "mlp_ratio": 2},
    "Dinov2WithRegisters": _PLAIN,
    "ViTMSN": _PLAIN,
    "IJepa": _PLAIN,
    "Beit": {**_PLAIN, "use_relative_position_bias": True, "use_mean_pooling": True, "out_indices": [1, 2]},
    "Data2VecVision": {**_PLAIN, "use_shared_relative_position_bias": True, "out_indices": [1, 2, 1, 2]},
    "CLIP": _TOWERS,
    "Siglip": _TOWERS,
    "MetaClip2": _TOWERS,
    "Swin": _WINDOWS,
    "Swinv2": _WINDOWS,
    "DonutSwin": _WINDOWS,
    "ConvNext": _CONVNEXT,
    "ConvNextV2": _CONVNEXT,
    "FocalNet": {
        "image_size": 64, "embed_dim": 24, "depths": [1, 2], "hidden_sizes": [24, 48], "focal_levels": [2, 2],
        "focal_windows": [3, 3],
    },
    "Hiera": {
        "image_size": [64, 64], "embed_dim": 24, "depths": [1, 1, 2], "num_heads": [1, 2, 4], "num_query_pool": 2,
        "masked_unit_size": [4, 4],
    },
    "Levit": {
        "image_size": 64, "hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4], "key_dim": [8, 8, 8],
        "depths": [1, 1, 1],
    },
    "MobileViT": {"image_size": 64, "hidden_sizes": [24, 32, 40], "neck_hidden_sizes": [8, 16, 24, 32, 40, 48, 64]},
    "MobileViTV2": {"image_size": 64, "width_multiplier": 0.25},
    "PoolFormer": {"depths": [1, 1, 2, 1], "hidden_sizes": [16, 24, 32, 40]},
    "Pvt": _HEADS,
    "PvtV2": _HEADS,
    "Segformer": _HEADS,
    "SwiftFormer": {"image_size": 64, "depths": [1, 1, 1, 1], "embed_dims": [16, 24, 32, 40]},
    "Cvt": {"embed_dim": [16, 32, 48], "num_heads": [1, 2, 3], "depth": [1, 1, 2]},
    "ResNet": {**_STAGES, "embedding_size": 16, "layer_type": "basic"},
    "RegNet": {**_STAGES, "embedding_size": 16, "groups_width": 8},
    "Bit": {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 1], "num_groups": 8},
    "EfficientNet": {"image_size": 64, "width_coefficient": 0.5, "depth_coefficient": 0.2, "hidden_dim": 640},
    "MobileNetV1": {"image_size": 64, "depth_multiplier": 0.25},
    "MobileNetV2": {"image_size": 64, "depth_multiplier": 0.35},
    "ImageGPT": {"n_embd": 32, "n_layer": 1, "n_head": 2},
    "Perceiver": {"num_latents": 8, "d_latents": 32, "image_size": 64, "num_self_attends_per_block": 1},
}  # fmt: skip

_SMALL = {"depth": 2, "img_size": 64}
_NARROW = {**_SMALL, "embed_dim": 48, "num_heads": 3}
_FOUR = {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 40)}
_PATCH_14 = {"depth": 2, "img_size": 56}
_TIMM: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": _SMALL,
    "deit_tiny_distilled_patch16_224": _SMALL,
    "deit3_small_patch16_224": _SMALL,
    "vit_small_patch14_reg4_dinov2": _PATCH_14,
    "vit_small_patch16_dinov3": _SMALL,
    "vit_base_patch16_siglip_224": _NARROW,
    "vit_base_patch32_clip_224": _NARROW,
    "vit_relpos_small_patch16_224": _SMALL,
    "eva02_tiny_patch14_224": _PATCH_14,
    "beit_base_patch16_224": _NARROW,
    "cait_xxs24_224": _SMALL,
    "convit_tiny": {"depth": 3, "img_size": 64},
    "flexivit_small": {"depth": 2, "img_size": 64},
    "mixer_s32_224": {"num_blocks": 2, "img_size": 64},
    "test_vit": {},
    "swin_tiny_patch4_window7_224": {
        "depths": (2, 2), "embed_dim": 24, "num_heads": (2, 4), "img_size": 64, "window_size": 4
    },
    "swinv2_tiny_window8_256": {
        "depths": (2, 2), "embed_dim": 24, "num_heads": (2, 4), "img_size": 64, "window_size": 4
    },
    "convnext_atto": _FOUR,
    "convnextv2_atto": _FOUR,
    "caformer_s18": {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 64)},
    "poolformer_s12": _FOUR,
    "davit_tiny": {"depths": (1, 1), "embed_dims": (24, 48), "num_heads": (2, 4)},
    "focalnet_tiny_srf": {"depths": (1, 1), "embed_dim": 24},
    "levit_128s": {"img_size": 128},
    "coat_lite_tiny": {"img_size": 64},
    "hiera_tiny_224": {"img_size": 64},
    "mvitv2_tiny": {"depths": (1, 1, 1, 1)},
    "nest_tiny": {"depths": (1, 1, 1), "img_size": 128},
    "mobilevit_xxs": {},
    "mobilevitv2_050": {},
    "mobilenetv4_conv_small": {},
    "efficientformer_l1": {},
    "efficientvit_b0": {},
    "efficientvit_m0": {},
    "edgenext_xx_small": {},
    "fastvit_t8": {},
    "inception_next_atto": {},
    "mambaout_femto": {},
    "pit_ti_224": {},
    "pvt_v2_b0": {},
    "repvit_m0_9": {},
    "resnet18": {},
    "shvit_s1": {},
    "starnet_s1": {},
    "swiftformer_xs": {},
    "tiny_vit_5m_224": {},
    "tnt_s_legacy_patch16_224": {"depth": 2},
    "visformer_tiny": {},
    "xcit_nano_12_p16_224": {},
    "crossvit_tiny_240": {},
}  # fmt: skip

_TORCHVISION: dict[str, dict[str, Any]] = {
    "VisionTransformer": {
        "image_size": 64, "patch_size": 16, "num_layers": 2, "num_heads": 3, "hidden_dim": 48, "mlp_dim": 96
    },
    "SwinTransformer": {
        "patch_size": [4, 4], "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": [4, 4]
    },
    "resnet18": {},
    "efficientnet_b0": {},
    "mobilenet_v3_small": {},
    "regnet_y_400mf": {},
    "shufflenet_v2_x0_5": {},
    "convnext_tiny": {},
}  # fmt: skip

FAMILIES: dict[str, Family] = {
    f"{library}/{of}": Family(name=f"{library}/{of}", library=library, of=of, arguments=arguments)
    for library, table in (("transformers", _TRANSFORMERS), ("timm", _TIMM), ("torchvision", _TORCHVISION))
    for of, arguments in table.items()
}


def save_family(family: Family, folder: Path) -> Path | tuple[nn.Module, int]:
    """Save a random network as its library does and return the folder; of torchvision return network and image side."""
    torch.manual_seed(0)
    if family.library == "transformers":
        return _save_transformers(family, folder)
    if family.library == "timm":
        return _save_timm(family, folder)
    import torchvision

    network = getattr(torchvision.models, family.of)(num_classes=_NUM_CLASSES, **family.arguments)
    return _livened(network, family.side), family.side


def _save_transformers(family: Family, folder: Path) -> Path:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as HEADS

    config = getattr(transformers, f"{family.of}Config")(num_labels=_NUM_CLASSES, **family.arguments)
    head = HEADS[config.model_type]
    network = getattr(transformers, head if isinstance(head, str) else head[0])(config)
    _livened(network, family.side, run=lambda images: network(pixel_values=images))
    network.save_pretrained(folder)
    processor = {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "resample": 3, "do_rescale": True,
        "size": {"height": family.side, "width": family.side}, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def _save_timm(family: Family, folder: Path) -> Path:
    import timm
    from timm.models._hub import save_for_hf

    network = timm.create_model(family.of, pretrained=False, num_classes=_NUM_CLASSES, **family.arguments)
    side = family.arguments.get("img_size", timm.data.resolve_data_config(model=network)["input_size"][-1])
    _livened(network, side)
    arguments = {**family.arguments, "num_classes": _NUM_CLASSES} if family.arguments else None
    save_for_hf(network, str(folder), safe_serialization=True, model_args=arguments)
    return folder


def _livened(network: nn.Module, side: int, *, run: Callable[[Tensor], Any] | None = None) -> nn.Module:
    """Return the network with weights, norm gains and statistics as they are after training: nothing is zero or one."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.8, 1.2)
            module.momentum = None  # type: ignore[assignment]
        elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            nn.init.uniform_(module.weight, 0.7, 1.3)
            nn.init.normal_(module.bias, std=0.1)
        elif isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.02)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if any(part in name for part in ("token", "pos", "lambda", "gamma", "layer_scale")):
                nn.init.normal_(parameter, std=0.3)
        network.train()
        (run or network)(torch.randn(8, 3, side, side))  # what batch norms count
    return network.eval()
