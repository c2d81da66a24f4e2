"""A small encoder, its INT8 file, and images: made once for the whole run by the fixture `small_encoder`."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from tests.support.networks import SIZE, write_checkpoint
from vit_edge.export import ExportOptions, QuantizationOptions, export_onnx, quantize
from vit_edge.runtime.checks.golden import golden_images

NUM_IMAGES = 120


def make_encoder(folder: Path) -> None:
    """Write `e.onnx`, `e.int8.onnx` and the folders `calibration` and `images`, with two classes, to `folder`."""
    checkpoint = write_checkpoint(folder / "c.safetensors")
    write_images(folder / "calibration", range(1_000, 1_032))
    write_images(folder / "images" / "even", range(0, NUM_IMAGES, 2))
    write_images(folder / "images" / "odd", range(1, NUM_IMAGES, 2))
    options = ExportOptions(outputs=("embedding", "tokens"), normalize=True)
    export_onnx(checkpoint, out=folder / "e.onnx", options=options)
    settings = QuantizationOptions(effort="fast", use_cache=False, measure_speed=False)
    quantize(
        folder / "e.onnx", calibration=folder / "calibration", out=folder / "e.int8.onnx", options=settings,
        data=folder / "images",
    )  # fmt: skip


def write_images(folder: Path, seeds: range) -> None:
    """Write one PNG for each seed."""
    folder.mkdir(parents=True)
    for seed, pixels in zip(seeds, golden_images(seeds, height=SIZE[0], width=SIZE[1]), strict=True):
        Image.fromarray(pixels).save(folder / f"{seed:04}.png")
