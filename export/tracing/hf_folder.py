"""A folder as Optimum and transformers.js read it: config.json, preprocessor_config.json, onnx/model.onnx."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from typing import Any

from vit_edge.errors import UsageError
from vit_edge.image import Preprocessing
from vit_edge.model_file.artifact import Manifest, ModelFile
from vit_edge.vit_config import ViTConfig

__all__ = ["folder_of", "require_expressible"]

_log = logging.getLogger(__name__)
# PIL's numbers for its filters, which these configurations use.
_RESAMPLING = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu"}


def require_expressible(architecture: Mapping[str, Any], preprocessing: Preprocessing) -> None:
    """Raise UsageError for a network or preprocessing that the folder cannot express; log where it is one pixel off."""
    reason = ""
    if architecture.get("family") != "vit":
        reason = "transformers has no class for a network that is no Vision Transformer"
    elif preprocessing.keep_ratio:
        reason = "no image processor resizes as timm does for inputs that are not square (keep_ratio)"
    if reason:
        raise UsageError("cannot export", reason=reason, remedy="use --format onnx")
    if preprocessing.crop_rounding == "half-even" and not _crops_whole_pixels(preprocessing):
        _log.warning(
            "image processors round the offset of the crop down: some images are cropped one pixel away from ours"
        )


def _crops_whole_pixels(preprocessing: Preprocessing) -> bool:
    """Return whether both ways to round the offset of the crop agree for every image."""
    if isinstance(preprocessing.resize, int):
        return False  # the long side may have any length
    offsets = [(side - crop) / 2 for side, crop in zip(preprocessing.resize, preprocessing.crop, strict=True)]
    return all(round(offset) == math.floor(offset) for offset in offsets)


def folder_of(model: ModelFile) -> dict[str, bytes]:
    """Return the files of the folder by their path in it.

    `config.json` says "vit" for every relative: the class that reads it decides how images come in and logits out, and
    the network itself is in the ONNX file.
    """
    weights_file = {} if model.weights is None else {"onnx/model.onnx.data": model.weights}
    return {
        **weights_file,
        "config.json": _json(_config(model.manifest)),
        "preprocessor_config.json": _json(_preprocessor(model.manifest.preprocessing)),
        "onnx/model.onnx": model.data,
    }


def _config(manifest: Manifest) -> dict[str, Any]:
    fields = {key: value for key, value in manifest.architecture.items() if key != "family"}
    config = ViTConfig(**fields)
    height, width = config.image_size
    return {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification"],
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_width,
        "hidden_act": _ACTIVATIONS[config.activation],
        "layer_norm_eps": config.layer_norm_eps,
        "qkv_bias": config.qkv_bias,
        "image_size": height if height == width else [height, width],
        "patch_size": config.patch_size[0] if len(set(config.patch_size)) == 1 else list(config.patch_size),
        "num_channels": 3,
        "id2label": {str(number): label for number, label in enumerate(manifest.labels)},
        "label2id": {label: number for number, label in enumerate(manifest.labels)},
    }


def _preprocessor(preprocessing: Preprocessing) -> dict[str, Any]:
    """Return the configuration of CLIP's processor: of those that all tools know, it resizes and crops as ours does."""
    height, width = preprocessing.crop
    resize = preprocessing.resize
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": resize}
        if isinstance(resize, int)
        else dict(zip(("height", "width"), resize, strict=True)),
        "resample": _RESAMPLING[preprocessing.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
