"""MLCommons LoadGen, the program that MLPerf Inference is measured with, asking one of our candidates."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vit_edge.errors import MissingExtra, VitEdgeError
from vit_edge.runtime.benchmark.candidate import Candidate

__all__ = ["LoadgenRun", "import_loadgen", "run_loadgen"]

_DETAIL, _PREFIX = "mlperf_log_detail.txt", ":::MLLOG "
_NS_IN_MS = 1e6


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadgenRun:
    """What LoadGen reports in its log: percentiles in milliseconds, `is_valid` by its own rules for a run."""

    is_valid: bool
    num_queries: int
    p50_ms: float
    p90_ms: float


def import_loadgen() -> Any:
    """Return LoadGen; raises MissingExtra if it is not installed."""
    try:
        import mlperf_loadgen
    except ModuleNotFoundError as error:
        raise MissingExtra(
            "cannot compare with LoadGen",
            reason="the package mlperf_loadgen is not installed",
            remedy="pip install mlcommons-loadgen",
        ) from error
    return mlperf_loadgen


def run_loadgen(candidate: Candidate, *, min_seconds: float, min_queries: int) -> LoadgenRun:
    """Return what LoadGen measures in its single-stream scenario, with the candidate's prepared inputs."""
    loadgen = import_loadgen()
    settings = loadgen.TestSettings()
    settings.scenario, settings.mode = loadgen.TestScenario.SingleStream, loadgen.TestMode.PerformanceOnly
    settings.min_duration_ms, settings.min_query_count = round(min_seconds * 1000), min_queries
    settings.single_stream_expected_latency_ns = max(1, round(candidate.latency.p50 * _NS_IN_MS))
    images, failed = np.concatenate(candidate.prepared), list[Exception]()

    def issue(samples: Sequence[Any]) -> None:
        for sample in samples:
            try:
                candidate.classifier.logits(images[sample.index : sample.index + 1])
            except Exception as error:  # it must not pass through LoadGen's own thread
                failed.append(error)
            loadgen.QuerySamplesComplete([loadgen.QuerySampleResponse(sample.id, 0, 0)])

    with tempfile.TemporaryDirectory(prefix="vit-edge.") as folder:
        system = loadgen.ConstructSUT(issue, lambda: None)
        library = loadgen.ConstructQSL(len(images), len(images), lambda _: None, lambda _: None)
        try:
            loadgen.StartTestWithLogSettings(system, library, settings, _log_settings(loadgen, folder))
        finally:
            loadgen.DestroyQSL(library)
            loadgen.DestroySUT(system)
        if failed:
            raise failed[0]
        return _read(Path(folder) / _DETAIL)


def _log_settings(loadgen: Any, folder: str) -> Any:
    output = loadgen.LogOutputSettings()
    output.outdir, output.copy_summary_to_stdout, output.copy_detail_to_stdout = folder, False, False
    settings = loadgen.LogSettings()
    settings.log_output, settings.enable_trace = output, False
    return settings


def _read(path: Path) -> LoadgenRun:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    entries = [json.loads(line.removeprefix(_PREFIX)) for line in lines if line.startswith(_PREFIX)]
    found = {entry["key"]: entry["value"] for entry in entries}
    if "result_validity" not in found:
        reason = next((str(value) for key, value in found.items() if "error" in key), "its log has no result")
        raise VitEdgeError("cannot compare with LoadGen", reason=reason, remedy="give it more --queries")
    p50, p90 = (found[f"result_{number}.00_percentile_latency_ns"] / _NS_IN_MS for number in (50, 90))
    return LoadgenRun(
        is_valid=found["result_validity"] == "VALID",
        num_queries=int(found.get("result_query_count", 0)),
        p50_ms=p50,
        p90_ms=p90,
    )
