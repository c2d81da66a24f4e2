"""Choose the golden vectors of a model: inputs with clear and different predictions, and two small images."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from vit_edge.export.parity.parity import float32_tolerance
from vit_edge.image import Pixels, Preprocessing, pixel_hash
from vit_edge.model_file.artifact import ModelFile, open_model
from vit_edge.runtime.checks.golden import GENERATOR, Tolerance, expectation, golden_images, made_here, top2_gap
from vit_edge.runtime.engines.protocol import EngineOptions, Logits, installed_engines, make_engine

__all__ = ["choose_seeds", "golden_header", "golden_inputs", "promised_engines", "with_answers"]

NUM_INPUTS = 8
_FEWEST_CANDIDATES, _MOST_CANDIDATES, _BATCH = 32, 256, 16
# Multiply-accumulates to spend on candidates: seconds on two cores. DeiT-tiny tries all, ViT-B 48.
_BUDGET = 10**12
_EXIF_ORIENTATION = 0x0112
# Float sums in another order move values across rounding steps: two sets of kernels on one CPU, both right, differ by
# 22.8 to 27.2 dB (DeiT-tiny, 200 photographs; ONNX Runtime against OpenVINO, OpenVINO's dynamic against static shapes).
# Answers changed only where the two largest logits were less than 0.5 apart.
_INTEGER_TOLERANCE = Tolerance(sqnr_db=20.0, top1_gap=0.5)


def choose_seeds(
    run: Callable[[Pixels], Logits],
    *,
    height: int,
    width: int,
    macs_per_image: int | None = None,
) -> list[int]:
    """Return the seeds of 8 inputs whose logits lie as far apart as the network gives, with clear predictions.

    Among the first 256 seeds, fewer of a large network: first the one farthest from the mean, then in turn the one
    farthest from those chosen (Gonzalez, Theoretical Computer Science 38, 1985). On a digits network a weight 1 % off
    moves such inputs by 9.7 times the tolerance in every layer; the clearest of each answer moved by 0.9 to 9.8. Clear
    is a gap of over 3 times the tolerance; where a network gives fewer than 8 of these, the clearest are taken.
    """
    affordable = _MOST_CANDIDATES if not macs_per_image else _BUDGET // macs_per_image // _BATCH * _BATCH
    seeds = range(min(max(affordable, _FEWEST_CANDIDATES), _MOST_CANDIDATES))
    batches = [golden_images(seeds[i : i + _BATCH], height=height, width=width) for i in seeds[::_BATCH]]
    logits = np.concatenate([run(batch) for batch in batches])
    gaps = top2_gap(logits)
    fit = gaps > 3 * np.max(float32_tolerance(logits).allowed(logits), axis=1)
    if fit.sum() < NUM_INPUTS:
        fit = np.isin(seeds, np.argsort(-gaps, kind="stable")[:NUM_INPUTS])
    chosen: list[int] = []
    distance = np.linalg.norm(logits - logits.mean(axis=0), axis=1)
    for _ in range(NUM_INPUTS):
        fit[chosen] = False
        chosen.append(int(np.argmax(np.where(fit, distance, -1.0))))
        from_it = np.linalg.norm(logits - logits[chosen[-1]], axis=1)
        distance = from_it if len(chosen) == 1 else np.minimum(distance, from_it)
    return sorted(chosen)


def golden_header(seeds: list[int], preprocessing: Preprocessing) -> dict[str, Any]:
    """Return a manifest's `golden` without its expected logits: generator, seeds, and the two images."""
    images = [_image(kind, preprocessing) for kind in ("JPEG", "PNG")]
    return {"generator": GENERATOR, "seeds": seeds, "images": images, "expected": []}


def promised_engines(model: ModelFile) -> tuple[str, ...]:
    """Return the installed engines that the file has golden logits for."""
    expected = (model.manifest.golden or {}).get("expected", ())
    promised = {name for entry in expected for name in entry["engines"]}
    return tuple(name for name in installed_engines() if name in promised)


def golden_inputs(model: ModelFile) -> Pixels:
    """Return the golden inputs of a file, uint8 [inputs, height, width, 3]."""
    height, width = model.manifest.preprocessing.crop
    return golden_images((model.manifest.golden or {}).get("seeds", ()), height=height, width=width)


def with_answers(model: ModelFile, source: ModelFile) -> ModelFile:
    """Return an INT8 file with the golden inputs of its float32 file `source` and each engine's logits for them.

    Engines are those installed that the float32 file has golden logits for.
    """
    images_NHWC, expected = golden_inputs(source), []
    for name in promised_engines(source):
        engine = make_engine(name, model, EngineOptions())
        tolerance = _INTEGER_TOLERANCE if model.manifest.chooses_class else replace(_INTEGER_TOLERANCE, top1_gap=None)
        found = engine.run(images_NHWC)
        entry = expectation(found, engines=[name], tolerance=tolerance, output=model.manifest.output)
        expected.append({**entry, "made_on": made_here(engine)})
        engine.close()
    golden = {**(source.manifest.golden or {}), "expected": expected}
    return open_model(model.with_manifest(replace(model.manifest, golden=golden)), warn=False)


def _image(kind: str, preprocessing: Preprocessing) -> dict[str, str]:
    """Return a small image that exercises decoding: a turned JPEG, a PNG with transparency."""
    pixels = golden_images([5], height=40, width=56)[0]
    buffer = io.BytesIO()
    if kind == "JPEG":
        exif = Image.Exif()
        exif[_EXIF_ORIENTATION] = 6
        Image.fromarray(pixels).save(buffer, format="JPEG", quality=90, exif=exif)
    else:
        alpha = np.broadcast_to(np.linspace(0, 255, 56).astype(np.uint8), (40, 56))[..., None]
        Image.fromarray(np.concatenate([pixels, alpha], axis=2)).save(buffer, format="PNG")
    data = buffer.getvalue()
    return {
        "format": kind,
        "data": base64.b64encode(data).decode("ascii"),
        "pixels_sha256": pixel_hash(preprocessing.pixels(data)),
    }
