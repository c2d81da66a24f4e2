"""From an image's file to its labels: how long each stage takes, for several candidates in turn."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vit_edge.data import find_images
from vit_edge.errors import DataRejected, ImageRejected
from vit_edge.progress import Progress, silent
from vit_edge.runtime.benchmark.candidate import Candidate
from vit_edge.runtime.benchmark.statistics import Latency, latency
from vit_edge.runtime.classifier import Classifier, Timings
from vit_edge.runtime.loaded_model import LoadedModel

__all__ = ["EndToEnd", "measure_stages"]

_MOST_IMAGES = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class EndToEnd:
    """Medians of the stages in milliseconds, one image at a time, and the latency from file to labels."""

    num_images: int
    num_rejected: int
    decode_ms: float
    resize_ms: float
    inference_ms: float
    answer_ms: float
    total_ms: Latency


def measure_stages(
    candidates: Sequence[Candidate], folder: str | os.PathLike[str], *, progress: Progress = silent
) -> list[EndToEnd]:
    """Return the stages of every candidate over the first 200 images below `folder`, each image in turn.

    Images that cannot be used are counted; raises DataRejected where none can be.
    """
    paths = find_images(Path(folder))[:_MOST_IMAGES]
    found: list[list[Timings]] = [[] for _ in candidates]
    rejected = 0
    for number, path in enumerate(paths):
        try:
            timings = [_timings(candidate.classifier, path) for candidate in candidates]
        except ImageRejected:
            rejected += 1
            continue
        for kept, one in zip(found, timings, strict=True):
            kept.append(one)
        progress("measuring end to end", number + 1, len(paths))
    if not found[0]:
        reason = f"none of its {len(paths)} images can be used"
        raise DataRejected("cannot measure", file=folder, reason=reason, remedy="give a folder with images")
    return [_summary(each, rejected) for each in found]


def _timings(model: LoadedModel, path: Path) -> Timings:
    """Return the stages of one image; an encoder has no labels to find."""
    if isinstance(model, Classifier):
        return model(path).timings
    prepared = model.prepare(path)
    started = time.perf_counter()
    model.run(prepared.pixels[None])
    inference_ms = (time.perf_counter() - started) * 1000
    return Timings(decode_ms=prepared.decode_ms, resize_ms=prepared.resize_ms, inference_ms=inference_ms, answer_ms=0.0)


def _summary(timings: Sequence[Timings], rejected: int) -> EndToEnd:
    def median(stage: str) -> float:
        return float(np.median([getattr(one, stage) for one in timings]))

    return EndToEnd(
        num_images=len(timings),
        num_rejected=rejected,
        decode_ms=median("decode_ms"),
        resize_ms=median("resize_ms"),
        inference_ms=median("inference_ms"),
        answer_ms=median("answer_ms"),
        total_ms=latency([round(one.total_ms * 1e6) for one in timings]),
    )
