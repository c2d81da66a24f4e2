"""The options of `measure`, and its results."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vit_edge.errors import UsageError
from vit_edge.image import Preprocessing
from vit_edge.machine.noise import Noise
from vit_edge.model_file.artifact import MOST_BATCH
from vit_edge.runtime.benchmark.candidate import WarmUp
from vit_edge.runtime.benchmark.end_to_end import EndToEnd
from vit_edge.runtime.benchmark.peak_rate import Peak
from vit_edge.runtime.benchmark.scenarios import Scenario
from vit_edge.runtime.benchmark.server_scenario import Trial
from vit_edge.runtime.benchmark.statistics import Latency, Ratio
from vit_edge.runtime.engines.devices import FloatPrecision
from vit_edge.runtime.notebook import html_table

__all__ = ["Benchmark", "BenchmarkOptions", "Harness", "Measurement"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkOptions:
    """What to measure: every mix of these; raises UsageError on what cannot be.

    No engine named is all that are installed. `threads` None is what the container grants, `float_precisions` None what
    `load` takes. `scenario` None is single-stream for batch 1, else multi-stream. Each candidate gets at least
    `min_seconds` and `min_queries`. `latency_bound_ms` is for the server scenario. `images` is a folder of images to
    measure end to end with; `has_peak` measures the engine's own peak. `preprocessing` and `labels` describe
    third-party ONNX models, as in `load`.
    """

    engines: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu",)
    float_precisions: tuple[FloatPrecision | None, ...] = (None,)
    batch_sizes: tuple[int, ...] = (1,)
    threads: tuple[int | None, ...] = (None,)
    scenario: Scenario | None = None
    min_seconds: float = 3.0
    min_queries: int = 200
    latency_bound_ms: float | None = None
    images: str | os.PathLike[str] | None = None
    has_peak: bool = True
    preprocessing: Preprocessing | Mapping[str, Any] | None = None
    labels: Sequence[str] | None = None

    def __post_init__(self) -> None:
        sizes, most = self.batch_sizes, MOST_BATCH
        if not all((self.devices, self.float_precisions, sizes, self.threads)):
            raise _refused(
                "a list of values is empty", "give at least one device, precision, batch size and number of threads"
            )
        fits = all(1 <= size <= most for size in sizes) and 1 <= self.min_queries <= 1_000_000
        if not (fits and 0 < self.min_seconds <= 3600):
            reason = f"batch size {', '.join(map(str, sizes))}, {self.min_seconds} seconds, {self.min_queries} queries"
            raise _refused(reason, "give a batch of 1 to 1,024, up to 3,600 seconds, up to 1,000,000 queries")
        if self.scenario in ("single-stream", "server") and set(sizes) != {1}:
            reason = f"{self.scenario} is one image a query, not {', '.join(map(str, sizes))}"
            raise _refused(reason, "omit the batch size, or choose multi-stream or offline")
        bound = self.latency_bound_ms
        if (self.scenario == "server") != (bound is not None):
            reason = "the server scenario needs a latency bound, and no other scenario takes one"
            raise _refused(reason, "give --scenario server and --latency-bound MS together")
        if bound is not None and not (math.isfinite(bound) and bound > 0):
            raise _refused(f"the latency bound is {bound} ms", "give a positive number of milliseconds")


def _refused(reason: str, remedy: str) -> UsageError:
    return UsageError("cannot measure", reason=reason, remedy=remedy)


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Measurement:
    """One candidate: what ran, and how long it took.

    `throughput_per_s` is images a second: of the time in which queries ran, offline of all the time, as a server the
    highest rate that held the bound. `by_round_ms` is what an image cost in each round; `ratio` how many times as fast
    as the first candidate, an image for an image. `load_ms`, `cold_start_ms` and `peak_rss_bytes` are those of a fresh
    process. `share_of_peak` is the share of an image's time that its multiplications alone would take at the engine's
    peak. `top1` is in per cent, from the evaluation that `vit-edge quantize --data` left in a file.
    """

    model: str
    name: str
    sha256: str
    engine: str
    engine_version: str
    device: str
    precision: str
    float_precision: str
    batch_size: int
    threads: int
    workers: int
    scenario: Scenario
    instruction_set: str
    cpu: str
    num_queries: int
    seconds: float
    warm_up: WarmUp
    latency_ms: Latency
    quantiles_ms: tuple[float, ...]
    throughput_per_s: float
    by_round_ms: tuple[float, ...]
    ratio: Ratio | None
    load_ms: float
    cold_start_ms: float
    peak_rss_bytes: int
    size_bytes: int
    millijoules_per_image: float | None
    macs: Mapping[str, int] | None
    share_of_peak: float | None
    top1: float | None
    end_to_end: EndToEnd | None
    latency_bound_ms: float | None
    trials: tuple[Trial, ...]

    def row(self) -> tuple[object, ...]:
        """Return the main values as text: file, engine, precision, batch, threads, latency, throughput, speed-up."""
        ratio = "1" if self.ratio is None else f"{self.ratio.by_round:.2f}"
        times = (f"{self.latency_ms.p50:.3f}", f"{self.latency_ms.p99:.3f}", f"{self.throughput_per_s:.0f}", ratio)
        return (Path(self.model).name, self.engine, self.precision, self.batch_size, self.threads, *times)

    def __repr__(self) -> str:
        name, engine, precision, batch, threads, p50, p99, rate, ratio = self.row()
        what = f"{name} in {engine}, {precision}, batch {batch}, threads {threads}"
        return f"<Measurement {what}: p50 {p50} ms, p99 {p99} ms, {rate} images/s, speed-up {ratio}>"


@dataclass(frozen=True, kw_only=True, slots=True)
class Harness:
    """What the harness itself takes for a query: the null engine, asked as the candidates are, in microseconds."""

    p50_us: float
    p99_us: float
    num_queries: int


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Benchmark:
    """All measurements of a run, and what they share: noise, the overhead of the benchmark, peaks, the energy meter.

    `invalid_because` has the reasons why the figures do not count; it is empty if they do.
    """

    results: tuple[Measurement, ...]
    noise: Noise
    invalid_because: tuple[str, ...]
    harness: Harness
    peaks: tuple[Peak, ...]
    energy_meter: str

    def __repr__(self) -> str:
        lines = [f"<Benchmark {'INVALID: ' + '; '.join(self.invalid_because) if self.invalid_because else 'valid'}"]
        return "\n  ".join([*lines, *map(repr, self.results)]) + ">"

    def _repr_html_(self) -> str:
        columns = ("model", "engine", "precision", "batch", "threads", "p50 ms", "p99 ms", "images/s", "speed-up")
        caption = f"INVALID: {'; '.join(self.invalid_because)}" if self.invalid_because else "valid"
        return html_table(caption, columns, [result.row() for result in self.results])
