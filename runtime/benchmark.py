"""How fast is it here? Every candidate in turn, in rounds, so that drift hits all alike; every sample kept."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from vit_edge.artifact import ModelFile, open_model
from vit_edge.cpu import cpu_name, instruction_set
from vit_edge.errors import ResourceExhausted, UsageError, VitEdgeError
from vit_edge.progress import Progress, silent
from vit_edge.runtime.classifier import Classifier
from vit_edge.runtime.engine import EngineOptions, chosen_engines
from vit_edge.runtime.golden import golden_images
from vit_edge.runtime.loading import load_model

__all__ = ["Candidate", "Latency", "Measurement", "Scenario", "measure", "sample_in_turns"]

# MLPerf's terms: single-stream is one image a query, multi-stream several; the next query starts when one ends.
Scenario = Literal["single-stream", "multi-stream"]
_ROUNDS = 8
_WARM_UP_S = 0.3
_CHILD_TIMEOUT_S = 300


@dataclass(frozen=True, kw_only=True, slots=True)
class Latency:
    """Observed times of one query in milliseconds; percentiles are samples that occurred (nearest rank)."""

    min: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One model in one engine: what ran, and how long it took."""

    model: str
    name: str
    engine: str
    engine_version: str
    device: str
    precision: str
    batch_size: int
    threads: int
    scenario: Scenario
    instruction_set: str
    cpu: str
    num_queries: int
    latency_ms: Latency
    throughput_per_s: float
    load_ms: float
    peak_rss_bytes: int
    size_bytes: int


def measure(
    models: Sequence[str | os.PathLike[str]],
    *,
    engines: Sequence[str] = (),
    batch_size: int = 1,
    threads: int | None = None,
    min_seconds: float = 3.0,
    min_queries: int = 200,
    progress: Progress = silent,
) -> list[Measurement]:
    """Return one measurement for each model and engine (default: all installed), measured alternately in rounds.

    Each gets at least `min_seconds` and `min_queries`, after a warm-up. Inputs are prepared beforehand. `load_ms` (file
    to first answer) and `peak_rss_bytes` are those of a fresh process that does nothing else.
    """
    if not (1 <= batch_size <= 1024 and 1 <= min_queries <= 1_000_000 and 0 < min_seconds <= 3600):
        reason = f"batch size {batch_size}, {min_seconds} seconds, {min_queries} queries"
        remedy = "give a batch of 1 to 1,024, up to 3,600 seconds, up to 1,000,000 queries"
        raise UsageError("cannot measure", reason=reason, remedy=remedy)
    chosen = chosen_engines(engines)
    options = EngineOptions(threads=threads)
    candidates: list[Candidate] = []
    try:
        for model in models:
            for engine in chosen:
                candidates.append(  # noqa: PERF401 - those made are closed where a later one fails
                    Candidate(os.fspath(model), open_model(model), engine, options, batch_size)
                )
        sample_in_turns(candidates, min_seconds=min_seconds, min_queries=min_queries, progress=progress)
        return [candidate.result() for candidate in candidates]
    finally:
        for candidate in candidates:
            candidate.close()


def sample_in_turns(
    candidates: Sequence[Candidate], *, min_seconds: float, min_queries: int, progress: Progress = silent
) -> None:
    """Warm every candidate up, then measure each a little in every round, so that drift hits all alike."""
    for position, candidate in enumerate(candidates):
        progress("warming up", position, len(candidates))
        candidate.warm_up()
    for number in range(_ROUNDS):
        for candidate in candidates:
            candidate.sample(min_seconds / _ROUNDS, math.ceil(min_queries / _ROUNDS))
        progress("measuring", number + 1, _ROUNDS)


class Candidate:
    """One file in one engine, and every latency observed of it, in nanoseconds."""

    def __init__(self, path: str, model: ModelFile, engine: str, options: EngineOptions, batch_size: int) -> None:
        self.path, self.size_bytes, self.batch_size = path, len(model.data), batch_size
        self.classifier = load_model(model, engine=engine, options=options)
        self.batches = _inputs(self.classifier, batch_size)
        self.samples_ns: list[int] = []

    def warm_up(self) -> None:
        """Answer for a while without measuring."""
        end = time.perf_counter() + _WARM_UP_S
        while time.perf_counter() < end:
            self.classifier.logits(next(self.batches))

    def sample(self, seconds: float, queries: int) -> None:
        """Measure at least so many queries, for at least so many seconds."""
        end, left = time.perf_counter() + seconds, queries
        while left > 0 or time.perf_counter() < end:
            batch = next(self.batches)
            started = time.perf_counter_ns()
            self.classifier.logits(batch)
            self.samples_ns.append(time.perf_counter_ns() - started)
            left -= 1

    @property
    def latency(self) -> Latency:
        """Return the percentiles of what was observed."""
        return _latency(self.samples_ns)

    def result(self) -> Measurement:
        """Return what ran and how fast, its cold start in a process of its own included."""
        what = self.classifier.describe()
        cold = _cold_start(self.path, what["engine"], what["threads"], self.batch_size)
        return Measurement(
            model=self.path,
            name=what["name"],
            engine=what["engine"],
            engine_version=what["engine_version"],
            device=what["device"],
            precision=what["precision"],
            batch_size=self.batch_size,
            threads=what["threads"],
            scenario="single-stream" if self.batch_size == 1 else "multi-stream",
            instruction_set=instruction_set(),
            cpu=cpu_name(),
            num_queries=len(self.samples_ns),
            latency_ms=self.latency,
            throughput_per_s=len(self.samples_ns) * self.batch_size / (sum(self.samples_ns) / 1e9),
            load_ms=cold["load_ms"],
            peak_rss_bytes=cold["peak_rss_bytes"],
            size_bytes=self.size_bytes,
        )

    def close(self) -> None:
        """Free the model."""
        self.classifier.close()


def _inputs(classifier: Classifier, batch_size: int) -> Iterator[Any]:
    """Yield prepared batches for ever, several different ones in turn."""
    height, width = classifier.manifest.preprocessing.crop
    images = golden_images(range(4 * batch_size), height=height, width=width)
    batches = images.reshape(4, batch_size, height, width, 3)
    while True:
        yield from batches


def _latency(samples_ns: Sequence[int]) -> Latency:
    ordered = np.sort(np.asarray(samples_ns, dtype=np.float64)) / 1e6

    def percentile(share: float) -> float:
        return float(ordered[math.ceil(share * len(ordered)) - 1])

    return Latency(min=float(ordered[0]), p50=percentile(0.5), p90=percentile(0.9), p99=percentile(0.99))


def _cold_start(path: str, engine: str, threads: int, batch_size: int) -> dict[str, Any]:
    """Return load time and peak memory of a fresh process that loads the file and answers once."""
    arguments = (path, engine, str(threads), str(batch_size))
    command = [sys.executable, "-m", "vit_edge.runtime.coldstart", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_CHILD_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        reason = f"a fresh process took over {_CHILD_TIMEOUT_S} s"
        raise ResourceExhausted(
            "cannot measure the cold start", file=path, reason=reason, remedy="try again"
        ) from error
    if done.returncode != 0:
        reason = f"a fresh process ended with {done.returncode}: {done.stderr.strip()[-300:]}"
        raise VitEdgeError("cannot measure the cold start", file=path, reason=reason, remedy="run it again")
    result: dict[str, Any] = json.loads(done.stdout)
    return result
