"""Compare the speed of the INT8 and the float32 file: in turns, in each engine, so that drift hits both alike."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from vit_edge.image import Pixels
from vit_edge.model_file.artifact import ModelFile
from vit_edge.progress import Progress, silent
from vit_edge.runtime.benchmark.statistics import Ratio, ratio
from vit_edge.runtime.benchmark.timing import time_calls
from vit_edge.runtime.checks.golden import golden_images
from vit_edge.runtime.checks.load_policy import without_sandbox
from vit_edge.runtime.engines.protocol import EngineOptions, chosen_engines
from vit_edge.runtime.loaded_model import LoadedModel
from vit_edge.runtime.loading import load_model

__all__ = ["Speed", "compare_speed", "ratio_of_rounds"]

_ROUNDS = 24
_WARM_UP_ROUNDS = 3
# One answer a turn is enough for a large network; small ones take several, so that a turn is not mostly switching.
_TURN_S = 0.02
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """Median milliseconds of one image in one engine, one thread; `ratio` is float over INT8, above 1 is faster.

    `ratio` is the median of the rounds' ratios, `ratio_interval` its 95 % percentile bootstrap. `all_integer_ms` is of
    the file with all ops in INT8, if some stay in float32.
    """

    engine: str
    float_ms: float
    integer_ms: float
    all_integer_ms: float | None
    ratio: float
    ratio_interval: tuple[float, float]


def compare_speed(
    reference: ModelFile,
    candidate: ModelFile,
    all_integer: ModelFile | None = None,
    *,
    engines: Sequence[str] = (),
    progress: Progress = silent,
) -> tuple[Speed, ...]:
    """Return how fast both files answer in each engine (default: all installed); warns where INT8 is no faster."""
    found = []
    for engine in chosen_engines(engines):
        files = [file for file in (reference, candidate, all_integer) if file is not None]
        rounds_FR = _medians(files, engine, progress)
        medians = [float(np.median(each_R)) for each_R in rounds_FR]
        faster = ratio_of_rounds(rounds_FR[0], rounds_FR[1])
        speed = Speed(
            engine=engine,
            float_ms=medians[0],
            integer_ms=medians[1],
            all_integer_ms=medians[2] if all_integer is not None else None,
            ratio=faster.by_round,
            ratio_interval=faster.interval,
        )
        if speed.ratio <= 1:
            text = "INT8 is not faster than float32 in %s on this machine: %.2f times as fast (batch 1, one thread)"
            _log.warning(text, engine, speed.ratio)
        found.append(speed)
    return tuple(found)


def ratio_of_rounds(float_R: npt.ArrayLike, integer_R: npt.ArrayLike) -> Ratio:
    """Return how many times as fast integers are, from the median milliseconds of each round of both."""
    float_R1, integer_R1 = (np.asarray(each_R, dtype=np.float64)[:, None] for each_R in (float_R, integer_R))
    return ratio(float_R1, integer_R1)


def _medians(files: Sequence[ModelFile], engine: str, progress: Progress) -> npt.NDArray[np.float64]:
    """Return the median milliseconds of each file in each round [files, rounds], measured in turns."""
    stage = f"measuring in {engine}"
    options = EngineOptions(threads=1)
    loaded = [
        load_model(file, engine=engine, options=options, verify="hash", warn=False, policy=without_sandbox())
        for file in files
    ]
    try:
        height, width = files[0].manifest.preprocessing.crop
        image_NHWC = golden_images([0], height=height, width=width)
        rounds: list[list[float]] = [[] for _ in files]
        for number in range(_WARM_UP_ROUNDS + _ROUNDS):
            progress(stage, number, _WARM_UP_ROUNDS + _ROUNDS)
            for classifier, kept in zip(loaded, rounds, strict=True):
                taken_ns = time_calls(partial(_ask, classifier, image_NHWC), seconds=_TURN_S)
                kept.append(statistics.median(taken_ns) / 1e6)
        progress(stage, _WARM_UP_ROUNDS + _ROUNDS, _WARM_UP_ROUNDS + _ROUNDS)
        return np.asarray(rounds)[:, _WARM_UP_ROUNDS:]
    finally:
        for classifier in loaded:
            classifier.close()


def _ask(classifier: LoadedModel, image_NHWC: Pixels, _number: int) -> None:
    classifier.run(image_NHWC)
