"""The same candidate under MLCommons LoadGen, the program that MLPerf Inference is measured with."""

from __future__ import annotations

import json
import queue
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vit_edge.errors import VitEdgeError, require
from vit_edge.runtime.benchmark.candidate import Candidate
from vit_edge.runtime.benchmark.scenarios import Scenario, SideBySide
from vit_edge.runtime.benchmark.server_scenario import ServerCandidate
from vit_edge.runtime.classifier import Classifier

__all__ = ["LoadgenRun", "check_loadgen", "run_loadgen"]

_NAMES = {"single-stream": "SingleStream", "multi-stream": "MultiStream", "offline": "Offline", "server": "Server"}
_DETAIL, _PREFIX = "mlperf_log_detail.txt", ":::MLLOG "
_MILLIONTHS = 1e6
_lock = threading.Lock()  # LoadGen has one logger a process


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadgenRun:
    """What LoadGen reports in its own log: percentiles in milliseconds, `is_valid` by its rules for a run.

    Of the offline scenario it reports images a second only.
    """

    version: str
    scenario: Scenario
    is_valid: bool
    num_queries: int
    p50_ms: float | None
    p90_ms: float | None
    p99_ms: float | None
    throughput_per_s: float | None


def check_loadgen() -> Any:
    """Return LoadGen; raises MissingExtra where it is not installed."""
    return require("mlperf_loadgen", extra="loadgen", what="measure with LoadGen")


def run_loadgen(candidate: Candidate, scenario: Scenario, *, min_seconds: float, min_queries: int) -> LoadgenRun:
    """Return what LoadGen measures of a candidate, whose inputs are prepared; raises MissingExtra without LoadGen.

    A server is asked at the rate that our own scheduler found, and LoadGen says whether the bound holds there.
    """
    loadgen = check_loadgen()
    settings = _settings(loadgen, candidate, scenario, min_seconds=min_seconds, min_queries=min_queries)
    asked = _Asked(loadgen, candidate)
    with _lock, tempfile.TemporaryDirectory(prefix="vit-edge.") as folder:
        system = loadgen.ConstructSUT(asked.issue, lambda: None)
        library = loadgen.ConstructQSL(asked.num_images, asked.num_images, lambda _: None, lambda _: None)
        try:
            loadgen.StartTestWithLogSettings(system, library, settings, _log_settings(loadgen, folder))
        finally:
            asked.close()
            loadgen.DestroyQSL(library)
            loadgen.DestroySUT(system)
        if asked.failed:
            raise asked.failed[0]
        return _read(Path(folder) / _DETAIL, scenario)


class _Asked:
    """What LoadGen calls with queries: one worker answers at once, several take them from a queue."""

    def __init__(self, loadgen: Any, candidate: Candidate) -> None:
        self._loadgen, self._batch_size = loadgen, candidate.batch_size
        self._images, self._first = np.concatenate(candidate.prepared), candidate.classifier
        self._queue: queue.SimpleQueue[Sequence[Any] | None] = queue.SimpleQueue()
        self.failed: list[Exception] = []
        workers = candidate.classifiers if isinstance(candidate, SideBySide) else []
        self._threads = [threading.Thread(target=self._work, args=(worker,), daemon=True) for worker in workers]
        for thread in self._threads:
            thread.start()

    @property
    def num_images(self) -> int:
        return len(self._images)

    def issue(self, samples: Sequence[Any]) -> None:
        """Take what LoadGen asks, in batches."""
        for start in range(0, len(samples), self._batch_size):
            part = samples[start : start + self._batch_size]
            if self._threads:
                self._queue.put(part)
            else:
                self._answer(self._first, part)

    def close(self) -> None:
        """End the workers."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self, classifier: Classifier) -> None:
        while (part := self._queue.get()) is not None:
            self._answer(classifier, part)

    def _answer(self, classifier: Classifier, part: Sequence[Any]) -> None:
        try:
            classifier.logits(_picked(self._images, [sample.index for sample in part]))
        except Exception as error:  # it must not pass through LoadGen's own thread
            self.failed.append(error)
        complete, response = self._loadgen.QuerySamplesComplete, self._loadgen.QuerySampleResponse
        complete([response(sample.id, 0, 0) for sample in part])


def _picked(images: Any, indices: Sequence[int]) -> Any:
    """Return the prepared images: a view of them where they lie together, so that nothing is copied."""
    first = indices[0]
    if list(indices) == list(range(first, first + len(indices))):
        return images[first : first + len(indices)]
    return images[list(indices)]


def _settings(loadgen: Any, candidate: Candidate, scenario: Scenario, *, min_seconds: float, min_queries: int) -> Any:
    settings = loadgen.TestSettings()
    settings.scenario = getattr(loadgen.TestScenario, _NAMES[scenario])
    settings.mode = loadgen.TestMode.PerformanceOnly
    settings.min_duration_ms = round(min_seconds * 1000)
    settings.min_query_count = min_queries
    expected_ns = max(1, round(candidate.latency.p50 * _MILLIONTHS))
    settings.single_stream_expected_latency_ns = expected_ns
    settings.multi_stream_expected_latency_ns = expected_ns
    settings.multi_stream_samples_per_query = candidate.batch_size
    if scenario == "offline":
        # One query with as many samples as this rate gives in the shortest duration.
        settings.min_query_count = 1
        settings.offline_expected_qps = max(1.0, candidate.throughput_per_s, min_queries / min_seconds)
    if isinstance(candidate, ServerCandidate):
        settings.server_target_qps = candidate.throughput_per_s
        settings.server_target_latency_ns = round(candidate.latency_bound_ms * _MILLIONTHS)
        settings.server_target_latency_percentile = 0.99
    return settings


def _log_settings(loadgen: Any, folder: str) -> Any:
    output = loadgen.LogOutputSettings()
    output.outdir, output.copy_summary_to_stdout, output.copy_detail_to_stdout = folder, False, False
    settings = loadgen.LogSettings()
    settings.log_output, settings.enable_trace = output, False
    return settings


def _read(path: Path, scenario: Scenario) -> LoadgenRun:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    entries = [json.loads(line.removeprefix(_PREFIX)) for line in lines if line.startswith(_PREFIX)]
    told = {entry["key"]: entry["value"] for entry in entries}
    if "result_validity" not in told:
        reason = next((str(value) for key, value in told.items() if "error" in key), "its log has no result")
        raise VitEdgeError("LoadGen measured nothing", reason=reason, remedy="give it more time with --min-seconds")
    percentiles = [told.get(f"result_{number}.00_percentile_{_of(scenario)}_ns") for number in (50, 90, 99)]
    # Offline, a latency counts from the beginning of the run: it says nothing.
    p50, p90, p99 = (None if value is None or scenario == "offline" else value / _MILLIONTHS for value in percentiles)
    rates = [told.get(key) for key in ("result_samples_per_second", "result_completed_samples_per_sec")]
    rates.append(told.get("result_qps_without_loadgen_overhead"))
    return LoadgenRun(
        version=str(told.get("loadgen_version", "unknown")).split(" ")[0],
        scenario=scenario,
        is_valid=told["result_validity"] == "VALID",
        num_queries=int(told.get("result_query_count", 0)),
        p50_ms=p50,
        p90_ms=p90,
        p99_ms=p99,
        throughput_per_s=next((float(rate) for rate in rates if rate is not None), None),
    )


def _of(scenario: Scenario) -> str:
    return "per_query_latency" if scenario == "multi-stream" else "latency"
