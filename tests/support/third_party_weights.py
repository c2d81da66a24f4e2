"""Small networks of other libraries, saved as those libraries save them; shared by the tests of the converter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.converter_table import randomise

CLASSES = ("cat", "dog", "owl")


def timm_model(name: str = "vit_tiny_patch16_224", **arguments: Any) -> nn.Module:
    """Return a random network of timm with two blocks, for 64 pixels."""
    timm = pytest.importorskip("timm")
    return randomise(timm.create_model(name, **{"depth": 2, "img_size": 64, "num_classes": 3} | arguments))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def save_timm(folder: Path, model: nn.Module, **settings: Any) -> Path:
    """Save a network as timm does for its hub: config.json and model.safetensors."""
    from timm.models._hub import save_for_hf

    save_for_hf(model, str(folder), safe_serialization=True, **settings)
    return folder


def bare(path: Path, state: dict[str, Tensor]) -> Path:
    """Save nothing but tensors."""
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    else:
        torch.save(state, path)
    return path


def random_images(size: tuple[int, int], count: int = 2) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(3))


def same_logits(model: nn.Module, other: Any, size: tuple[int, int]) -> float:
    """Return the largest difference of logits, relative to the largest."""
    images = random_images(size)
    with torch.no_grad():
        expected, found = other(images), model(images)
    return float((found - getattr(expected, "logits", expected)).abs().max() / found.abs().max())


def labelled_images(folder: Path, images: list[np.ndarray], names: list[str]) -> Path:
    """Write images into class folders."""
    for number, (image, name) in enumerate(zip(images, names, strict=True)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / name / f"{number:03}.png")
    return folder
