"""Find the fastest engine and number of threads for a file on this machine; every later load uses them."""

from __future__ import annotations

import os
from dataclasses import dataclass

from vit_edge.errors import EngineUnavailable, UsageError
from vit_edge.machine.cpu import usable_threads
from vit_edge.model_file.artifact import ModelFile, open_model
from vit_edge.progress import Progress, silent
from vit_edge.runtime.benchmark.candidate import Candidate, sample_in_turns
from vit_edge.runtime.benchmark.statistics import Latency
from vit_edge.runtime.engines.protocol import EngineOptions
from vit_edge.runtime.tuned_configuration import TunedConfiguration, promised_engines, save_configuration

__all__ = ["Tried", "Tuning", "tune"]

_MIN_SECONDS, _MIN_QUERIES = 2.0, 50
_AS_FAST = 1.03


@dataclass(frozen=True, kw_only=True, slots=True)
class Tried:
    """One engine and number of threads, and the latency of one image in milliseconds."""

    engine: str
    threads: int
    latency_ms: Latency


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuning:
    """The fastest configuration, all that were tried (fastest first), and whether the fastest could be saved."""

    configuration: TunedConfiguration
    tried: tuple[Tried, ...]
    is_saved: bool


def tune(
    source: str | os.PathLike[str],
    *,
    min_seconds: float = _MIN_SECONDS,
    min_queries: int = _MIN_QUERIES,
    progress: Progress = silent,
) -> Tuning:
    """Measure every installed engine that the file was validated in with 1, 2, 4 ... threads, and save the fastest.

    Every engine must pass the golden vectors first. Fewer threads win if more are less than 3 % faster: the application
    needs the rest. Raises as `load` does, EngineUnavailable if no validated engine is installed.
    """
    if not (0 < min_seconds <= 3600 and 1 <= min_queries <= 1_000_000):
        reason = f"{min_seconds} seconds, {min_queries} queries"
        raise UsageError("cannot tune", reason=reason, remedy="give up to 3,600 seconds and 1,000,000 queries")
    model = open_model(source)
    engines = promised_engines(model)
    if not engines:
        reason = "no engine is installed that the file was validated in"
        raise EngineUnavailable("cannot tune", file=source, reason=reason, remedy='pip install "vit-edge[onnxruntime]"')
    tried = _measured(model, os.fspath(source), engines, (min_seconds, min_queries), progress)
    best = _best(tried)
    configuration = TunedConfiguration(engine=best.engine, threads=best.threads, p50_ms=best.latency_ms.p50)
    ordered = tuple(sorted(tried, key=lambda one: one.latency_ms.p50))
    return Tuning(configuration=configuration, tried=ordered, is_saved=save_configuration(model, configuration))


def _measured(
    model: ModelFile, path: str, engines: tuple[str, ...], least: tuple[float, int], progress: Progress
) -> list[Tried]:
    candidates: list[Candidate] = []
    try:
        for engine in engines:
            for threads in _counts():
                candidates.append(  # noqa: PERF401 - those made are closed if a later one fails
                    Candidate(path, model, engine, EngineOptions(threads=threads), 1)
                )
        sample_in_turns(candidates, min_seconds=least[0], min_queries=least[1], progress=progress)
        described = [candidate.classifier.describe() for candidate in candidates]
        return [
            Tried(engine=what["engine"], threads=what["threads"], latency_ms=candidate.latency)
            for what, candidate in zip(described, candidates, strict=True)
        ]
    finally:
        for candidate in candidates:
            candidate.close()


def _best(tried: list[Tried]) -> Tried:
    """Return the choice with the fewest threads among those nearly as fast as the fastest."""
    fastest = min(one.latency_ms.p50 for one in tried)
    near = [one for one in tried if one.latency_ms.p50 <= fastest * _AS_FAST]
    return min(near, key=lambda one: (one.threads, one.latency_ms.p50))


def _counts() -> list[int]:
    """Return 1, 2, 4 ... up to the usable threads, and these."""
    most = usable_threads()
    return sorted({most, *(2**power for power in range(9) if 2**power <= most)})
