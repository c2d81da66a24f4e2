"""Small networks for tests of export: each exports in a second or two."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn

from vit_edge.checkpoint import Checkpoint, save_checkpoint
from vit_edge.export.tracing.tracer import trace
from vit_edge.image import Preprocessing
from vit_edge.vit import VisionTransformer, ViTConfig

SIZE = (24, 16)
PREPROCESSING = Preprocessing(resize=SIZE, crop=SIZE)

# Every family that the core knows, by what sets it apart.
FAMILIES: dict[str, dict[str, Any]] = {
    "class_token": {},
    "mean_without_class_token": {"pooling": "mean", "class_token": False},
    "mean_beside_class_token": {"pooling": "mean", "final_norm": "after_pooling"},
    "deit_distilled": {"distilled": True},
    "deit3": {"layer_scale": 0.1, "position_slots": "patches"},
    "registers": {"num_registers": 4, "position_slots": "patches", "layer_scale": 0.1},
    "dinov2_linear": {"pooling": "class_mean", "num_registers": 2, "layer_scale": 0.1},
    "clip": {"pre_norm": True, "patch_bias": False, "activation": "quick_gelu", "final_norm": "after_pooling"},
    "siglip_like": {"pooling": "mean", "class_token": False, "activation": "gelu_tanh"},
    "no_qkv_bias": {"qkv_bias": False},
}


def small_config(**changes: Any) -> ViTConfig:
    """Return a network of 2 blocks over 3 x 2 patches."""
    fields = {
        "image_size": SIZE, "patch_size": (8, 8), "width": 24, "depth": 2, "num_heads": 2, "mlp_width": 40,
        "num_classes": 7,
    }  # fmt: skip
    return ViTConfig(**{**fields, **changes})


def random_network(config: ViTConfig, *, seed: int = 0) -> VisionTransformer:
    """Return a network in which nothing is zero or one, so that a fold left out shows."""
    torch.manual_seed(seed)
    model = VisionTransformer(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def write_checkpoint(path: Path, **changes: Any) -> Path:
    """Write a checkpoint of `random_network` and return its path."""
    model = random_network(small_config(**changes))
    labels = tuple("abcdefg"[: model.config.num_classes])
    save_checkpoint(path, Checkpoint(name="small", model=model, preprocessing=PREPROCESSING, labels=labels))
    return path


def damaged_trace(name: str) -> Callable[..., onnx.ModelProto]:
    """Return `trace`, but that one weight of what it gives is a fifth too large."""

    def damaged(*args: Any, **kwargs: Any) -> onnx.ModelProto:
        model = trace(*args, **kwargs)
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.2), name))
        return model

    return damaged
