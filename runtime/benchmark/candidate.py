"""One file in one engine with one batch size and number of threads, and every latency observed of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vit_edge.image import Pixels
from vit_edge.model_file.artifact import ModelFile
from vit_edge.progress import Progress, silent
from vit_edge.runtime.benchmark.energy import Meter
from vit_edge.runtime.benchmark.statistics import Floats, Latency, latency
from vit_edge.runtime.benchmark.timing import time_calls, turns
from vit_edge.runtime.checks.golden import golden_images
from vit_edge.runtime.engines.protocol import EngineOptions, Model
from vit_edge.runtime.loaded_model import LoadedModel
from vit_edge.runtime.loading import load_model

__all__ = ["UNMEASURED", "Candidate", "Round", "WarmUp", "sample_in_turns"]

_ROUNDS = 12
# The first queries of a round are not measured: the candidate before has pushed these weights out of the caches.
UNMEASURED = 3
_WINDOW_S, _WINDOW_QUERIES = 0.1, 3
_SETTLED, _MOST_WARM_UP_S = 0.03, 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """What one turn of a candidate gave: the latency of every query in nanoseconds, the images and their time."""

    samples_ns: Sequence[int]
    num_images: int
    wall_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmUp:
    """How long a candidate ran before it was measured, and whether its latency had settled by then."""

    seconds: float
    num_queries: int
    is_settled: bool


class Candidate:
    """A loaded model that is asked one query after the other: MLPerf's single-stream, or multi-stream with batches."""

    def __init__(self, path: str, model: Model, engine: str, options: EngineOptions, batch_size: int) -> None:
        self.path, self.model, self.options, self.batch_size = path, model, options, batch_size
        self.classifier = load_model(model, engine=engine, options=options)
        self.prepared = _prepared(self.classifier, batch_size)
        self.rounds: list[Round] = []
        self.warmed: WarmUp | None = None
        self.joules: float | None = None

    @property
    def size_bytes(self) -> int:
        """Return the size of the file, and of the weights next to it."""
        own = self.model.data if isinstance(self.model, ModelFile) else self.model.xml
        return len(own) + len(self.model.weights or b"")

    @property
    def classifiers(self) -> list[LoadedModel]:
        """Return the models that answer side by side."""
        return [self.classifier]

    def ask(self, number: int) -> None:
        """Run one of the prepared batches."""
        self.classifier.run(self.prepared[number % len(self.prepared)])

    def warm_up(self) -> None:
        """Answer without measuring until the median of a window is within 3 % of the one before, twice in a row."""
        started, medians, count = time.perf_counter(), list[float](), 0
        while time.perf_counter() - started < _MOST_WARM_UP_S and not _is_settled(medians):
            window = time_calls(self.ask, seconds=_WINDOW_S, queries=_WINDOW_QUERIES)
            medians.append(float(np.median(window)))
            count += len(window)
        seconds = time.perf_counter() - started
        self.warmed = WarmUp(seconds=seconds, num_queries=count, is_settled=_is_settled(medians))

    def sample(self, seconds: float, queries: int) -> None:
        """Measure one round: at least so many queries, for at least so many seconds."""
        for number in range(UNMEASURED):
            self.ask(number)
        started = time.perf_counter()
        samples_ns = time_calls(self.ask, seconds=seconds, queries=queries)
        wall_s = time.perf_counter() - started
        self.rounds.append(Round(samples_ns=samples_ns, num_images=len(samples_ns) * self.batch_size, wall_s=wall_s))

    @property
    def samples_ns(self) -> list[int]:
        """Return every latency observed."""
        return [sample for one in self.rounds for sample in one.samples_ns]

    @property
    def latency(self) -> Latency:
        """Return the percentiles of what was observed."""
        return latency(self.samples_ns)

    @property
    def throughput_per_s(self) -> float:
        """Return the images a second, of the time in which queries ran."""
        return len(self.samples_ns) * self.batch_size / (sum(self.samples_ns) / 1e9)

    @property
    def costs_ms(self) -> list[Floats]:
        """Return for every round what an image costs, in milliseconds: what ratios are made of."""
        return [np.asarray(one.samples_ns, dtype=np.float64) / 1e6 / self.batch_size for one in self.rounds]

    def close(self) -> None:
        """Free the model."""
        self.classifier.close()


def sample_in_turns(
    candidates: Sequence[Candidate],
    *,
    min_seconds: float,
    min_queries: int,
    progress: Progress = silent,
    meter: Meter | None = None,
    after_round: Callable[[], None] = lambda: None,
) -> None:
    """Warm every candidate up, then measure each a little in every round, so that drift hits all alike.

    `meter` counts the energy of each.
    """
    for position, candidate in enumerate(candidates):
        progress("warming up", position, len(candidates))
        candidate.warm_up()
    progress("warming up", len(candidates), len(candidates))
    for number, order in enumerate(turns(len(candidates), _ROUNDS)):
        for position in order:
            candidate = candidates[position]
            before = meter.joules() if meter else 0.0
            candidate.sample(min_seconds / _ROUNDS, math.ceil(min_queries / _ROUNDS))
            if meter:
                candidate.joules = (candidate.joules or 0.0) + meter.joules() - before
        after_round()
        progress("measuring", number + 1, _ROUNDS)


def _prepared(classifier: LoadedModel, batch_size: int) -> list[Pixels]:
    """Return several different batches, to be asked in turn."""
    height, width = classifier.manifest.preprocessing.crop
    images = golden_images(range(4 * batch_size), height=height, width=width)
    return list(images.reshape(4, batch_size, height, width, 3))


def _is_settled(medians: Sequence[Any]) -> bool:
    pairs = list(zip(medians[-3:-1], medians[-2:], strict=True)) if len(medians) >= 3 else []
    return bool(pairs) and all(abs(later - sooner) <= _SETTLED * sooner for sooner, later in pairs)
