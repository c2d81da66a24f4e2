"""A small network, its images, and a deployment of it: shared by the tests of deployments and reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.support.networks import PREPROCESSING, SIZE, random_network, small_config, write_checkpoint
from vit_edge.export import DeploymentOptions, QuantizationOptions, deploy
from vit_edge.export.tracing.network import reference_logits

ASKED = QuantizationOptions(effort="fast", max_drop_points=40.0, use_cache=False)


def make_deployment(folder: Path) -> Path:
    """Fill a folder with a checkpoint, images of two kinds, and in `out` what a deployment made of them."""
    random = np.random.default_rng(0)
    answers = reference_logits(random_network(small_config()), PREPROCESSING)
    for number in range(110):
        pixels = random.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
        label = "abcdefg"[int(answers(PREPROCESSING.pixels(pixels)[None]).argmax())]
        path = folder / f"{'calibration' if number < 40 else f'data/{label}'}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    write_checkpoint(folder / "c.safetensors")
    run(folder)
    return folder


def run(folder: Path, quantization: QuantizationOptions = ASKED) -> Any:
    options = DeploymentOptions(quantization=quantization)
    images = {"calibration": folder / "calibration", "data": folder / "data"}
    return deploy(folder / "c.safetensors", **images, out=folder / "out", options=options)
