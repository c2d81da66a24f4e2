"""Measure every candidate in turns, so that drift affects all alike, and keep every sample."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from vit_edge.errors import EngineUnavailable, MissingExtra, UsageError
from vit_edge.image import Preprocessing
from vit_edge.machine.cpu import cpu_name, instruction_set
from vit_edge.machine.noise import Noise, Watch
from vit_edge.model_file.openvino_ir import IrModel
from vit_edge.progress import Progress, silent
from vit_edge.runtime.benchmark.candidate import Candidate, WarmUp, sample_in_turns
from vit_edge.runtime.benchmark.cold_start import cold_start
from vit_edge.runtime.benchmark.end_to_end import EndToEnd, measure_stages
from vit_edge.runtime.benchmark.energy import Meter, open_meter
from vit_edge.runtime.benchmark.peak_rate import Peak, measure_peak, share_of_peak
from vit_edge.runtime.benchmark.results import Benchmark, BenchmarkOptions, Harness, Measurement
from vit_edge.runtime.benchmark.scenarios import OfflineCandidate, Scenario, workers_for
from vit_edge.runtime.benchmark.server_scenario import ServerCandidate, search_in_turns
from vit_edge.runtime.benchmark.statistics import quantiles_ms, ratio
from vit_edge.runtime.engines.protocol import EngineOptions, Model, chosen_engines
from vit_edge.runtime.loading import open_any
from vit_edge.runtime.onnx_import.importer import is_third_party

__all__ = ["measure"]

_NULL_QUERIES, _NULL_S = 2_000, 0.1
_log = logging.getLogger(__name__)


def measure(
    models: Sequence[str | os.PathLike[str]],
    options: BenchmarkOptions | None = None,
    *,
    progress: Progress = silent,
) -> Benchmark:
    """Return one measurement for each combination of model, engine, device, precision, batch size and threads.

    They are measured in turns, after a warm-up, with inputs prepared beforehand. A combination that an engine does not
    support is left out with a warning, unless nothing is left. Raises as `load` does.

        >>> options = BenchmarkOptions(threads=(1,), min_seconds=0.1, min_queries=20)
        >>> run = measure(["model.onnx", "model.int8.onnx"], options)
        >>> run.results[1]
        <Measurement model.onnx in openvino, float32, batch 1, threads 1: p50 ... ms, ...>
    """
    options = options or BenchmarkOptions()
    with ExitStack() as stack:
        third_party = _third_party(models, options)
        opened = _opened(models, third_party)
        candidates = _candidates(opened, options, stack)
        meter, energy_meter = open_meter()
        if meter:
            stack.callback(meter.close)
        noise = _sample(candidates, options, meter, progress)
        extras = replace(_extras(candidates, opened, options, progress), third_party=third_party)
        results = tuple(_result(candidate, candidates[0], extras) for candidate in candidates)
        return Benchmark(
            results=results,
            noise=noise,
            invalid_because=noise.invalid_because,
            harness=_harness(candidates[0]),
            peaks=tuple(extras.peaks.values()),
            energy_meter=energy_meter,
        )


def _opened(models: Sequence[str | os.PathLike[str]], third_party: Mapping[str, dict[str, Any]]) -> dict[str, Model]:
    paths = [os.fspath(model) for model in models]
    for path in dict.fromkeys(path for path in paths if paths.count(path) > 1):
        _log.warning("%s is given more than once and measured once", path)
    return {path: open_any(path, **third_party.get(path, {})) for path in dict.fromkeys(paths)}


def _third_party(models: Sequence[str | os.PathLike[str]], options: BenchmarkOptions) -> dict[str, dict[str, Any]]:
    """Return the arguments of `load` for every third-party ONNX model, as JSON-ready values."""
    preprocessing, labels = options.preprocessing, options.labels
    if preprocessing is None and labels is None:
        return {}
    if isinstance(preprocessing, Preprocessing):
        preprocessing = preprocessing.to_dict()
    paths = [path for path in (os.fspath(model) for model in models) if not path.lower().endswith(".xml")]
    found = {path: {"preprocessing": preprocessing, "labels": labels} for path in paths if is_third_party(path)}
    if not found:
        reason = "preprocessing and labels are for third-party ONNX models, and no file is one"
        raise UsageError("cannot measure", reason=reason, remedy="omit preprocessing and labels")
    return found


def _candidates(opened: dict[str, Model], options: BenchmarkOptions, stack: ExitStack) -> list[Candidate]:
    """Return what can be loaded of every mix; raises what the last one raised where nothing can."""
    found: list[Candidate] = []
    unable: EngineUnavailable | None = None
    engines = chosen_engines(options.engines)
    each = (engines, options.devices, options.float_precisions, options.batch_sizes, options.threads)
    mixes = itertools.product(opened.items(), *(dict.fromkeys(values) for values in each))
    for (path, model), engine, device, precision, batch_size, threads in mixes:
        if isinstance(model, IrModel) and engine == "onnxruntime" and not options.engines:
            continue  # it cannot read it, and it was not asked for
        mix = EngineOptions(device=device, float_precision=precision, threads=threads)
        try:
            candidate = _candidate(path, model, engine, mix, batch_size, options)
        except MissingExtra:
            raise
        except EngineUnavailable as error:
            _log.warning("left out: %s in %s on %s: %s", path, engine, device, error.reason)
            unable = error
            continue
        stack.callback(candidate.close)
        found.append(candidate)
    if unable is not None and not found:
        raise unable
    return found


def _candidate(
    path: str, model: Model, engine: str, mix: EngineOptions, batch_size: int, options: BenchmarkOptions
) -> Candidate:
    fixed = model.manifest.batch
    if fixed is not None and batch_size % fixed:
        _log.warning("%s: its batch is fixed at %d: a query of %d is filled up with black", path, fixed, batch_size)
    side_by_side = replace(mix, streams=workers_for(mix))
    if options.latency_bound_ms is not None:
        return ServerCandidate(path, model, engine, side_by_side, latency_bound_ms=options.latency_bound_ms)
    if options.scenario == "offline":
        return OfflineCandidate(path, model, engine, side_by_side, batch_size)
    return Candidate(path, model, engine, mix, batch_size)


def _sample(
    candidates: Sequence[Candidate], options: BenchmarkOptions, meter: Meter | None, progress: Progress
) -> Noise:
    """Measure all in turn; returns what the machine was like, and warns of what was not as it should be."""
    on_cpu = all(candidate.options.device == "cpu" for candidate in candidates)
    watch = Watch(is_busy=on_cpu and options.scenario != "server")
    least: dict[str, Any] = {"min_seconds": options.min_seconds, "min_queries": options.min_queries}
    servers = [candidate for candidate in candidates if isinstance(candidate, ServerCandidate)]
    if servers:
        search_in_turns(servers, **least, progress=progress, after_round=watch.look)
    else:
        sample_in_turns(candidates, **least, progress=progress, meter=meter, after_round=watch.look)
    noise = watch.stop()
    for reason in noise.said if noise.is_valid else ():
        _log.warning("the machine was not quite quiet: %s", reason)
    for candidate in candidates:
        _warn_unsettled(candidate)
    return noise


def _warn_unsettled(candidate: Candidate) -> None:
    if candidate.warmed is not None and not candidate.warmed.is_settled:
        text = "%s in %s: its latency had not settled after %.1f s"
        _log.warning(text, candidate.path, candidate.classifier.describe()["engine"], candidate.warmed.seconds)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Extras:
    """What is measured next to the latency: by file, by engine with its options, and by candidate."""

    macs: dict[str, Mapping[str, int] | None] = field(default_factory=dict)
    peaks: dict[tuple[str, EngineOptions], Peak] = field(default_factory=dict)
    stages: dict[int, EndToEnd] = field(default_factory=dict)
    top1: dict[tuple[str, str], float] = field(default_factory=dict)
    third_party: dict[str, dict[str, Any]] = field(default_factory=dict)


def _extras(
    candidates: Sequence[Candidate], opened: dict[str, Model], options: BenchmarkOptions, progress: Progress
) -> _Extras:
    extras = _Extras(top1=_accuracies(opened))
    if options.images is not None:
        stages = measure_stages(candidates, options.images, progress=progress)
        extras.stages.update({id(c): found for c, found in zip(candidates, stages, strict=True)})
    if options.has_peak:
        extras.macs.update({path: model.manifest.macs for path, model in opened.items()})
        for candidate in candidates:
            key = _peak_key(candidate)
            if key not in extras.peaks and key[0] != "null" and candidate.options.device == "cpu":
                extras.peaks[key] = measure_peak(*key)
    return extras


def _peak_key(candidate: Candidate) -> tuple[str, EngineOptions]:
    """Return the engine, and options with all the threads that the candidate has: of all its workers."""
    mix = candidate.options
    threads = min(mix.num_threads * len(candidate.classifiers), 256)
    return candidate.classifier.describe()["engine"], replace(mix, threads=threads, streams=1, batch_size=None)


def _accuracies(opened: dict[str, Model]) -> dict[tuple[str, str], float]:
    """Return the top-1 that evaluations in the files tell, by file and engine; of a float file, an INT8 file tells."""
    by_hash = {model.sha256: path for path, model in opened.items()}
    found: dict[tuple[str, str], float] = {}
    for path, model in opened.items():
        reference = by_hash.get(str(model.manifest.provenance.get("float_model_sha256")))
        with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):  # a manifest of somebody's own
            for entry in (model.manifest.evaluation or {}).get("results", ()):
                for where, key in ((path, "candidate_top1"), (reference, "reference_top1")):
                    if where is not None and entry.get(key) is not None:
                        found[where, entry["engine"]] = float(entry[key])
    return found


def _scenario(candidate: Candidate) -> Scenario:
    if isinstance(candidate, ServerCandidate):
        return "server"
    if isinstance(candidate, OfflineCandidate):
        return "offline"
    return "single-stream" if candidate.batch_size == 1 else "multi-stream"


def _harness(candidate: Candidate) -> Harness:
    """Measure the null engine with one image a query, through the same code as every candidate."""
    null = Candidate(candidate.path, candidate.model, "null", EngineOptions(threads=1), 1)
    null.sample(_NULL_S, _NULL_QUERIES)
    found = null.latency
    null.close()
    return Harness(p50_us=found.p50 * 1000, p99_us=found.p99 * 1000, num_queries=len(null.samples_ns))


def _result(candidate: Candidate, first: Candidate, extras: _Extras) -> Measurement:
    what, mix = candidate.classifier.describe(), candidate.options
    cold = cold_start(
        candidate.path,
        what["engine"],
        mix,
        candidate.batch_size,
        third_party=extras.third_party.get(candidate.path, {}),
    )
    same = ("name", "sha256", "engine", "engine_version", "device", "precision", "float_precision", "threads")
    return Measurement(
        model=candidate.path,
        **{key: what[key] for key in same},
        batch_size=candidate.batch_size,
        workers=len(candidate.classifiers),
        scenario=_scenario(candidate),
        instruction_set=instruction_set(),
        cpu=cpu_name(),
        **_observed(candidate, first),
        load_ms=cold.load_ms,
        cold_start_ms=cold.cold_start_ms,
        peak_rss_bytes=cold.peak_rss_bytes,
        size_bytes=candidate.size_bytes,
        macs=extras.macs.get(candidate.path),
        share_of_peak=_share_of_peak(candidate, extras),
        top1=extras.top1.get((candidate.path, what["engine"])),
        end_to_end=extras.stages.get(id(candidate)),
        latency_bound_ms=candidate.latency_bound_ms if isinstance(candidate, ServerCandidate) else None,
        trials=tuple(candidate.trials) if isinstance(candidate, ServerCandidate) else (),
    )


def _observed(candidate: Candidate, first: Candidate) -> dict[str, Any]:
    """Return the fields of a Measurement that come of its samples."""
    costs_ms, base_ms = candidate.costs_ms, first.costs_ms
    num_images = sum(one.num_images for one in candidate.rounds)
    return {
        "num_queries": len(candidate.samples_ns),
        "seconds": sum(one.wall_s for one in candidate.rounds),
        "warm_up": candidate.warmed or WarmUp(seconds=0.0, num_queries=0, is_settled=False),
        "latency_ms": candidate.latency,
        "quantiles_ms": quantiles_ms(candidate.samples_ns),
        "throughput_per_s": candidate.throughput_per_s,
        "by_round_ms": tuple(float(np.median(one)) for one in costs_ms),
        "ratio": None if candidate is first or not costs_ms or not base_ms else ratio(base_ms, costs_ms),
        "millijoules_per_image": None if candidate.joules is None else 1000 * candidate.joules / num_images,
    }


def _share_of_peak(candidate: Candidate, extras: _Extras) -> float | None:
    macs, peak = extras.macs.get(candidate.path), extras.peaks.get(_peak_key(candidate))
    if macs is None or peak is None or isinstance(candidate, ServerCandidate):
        return None
    return share_of_peak(macs, peak, float(np.median([np.median(one) for one in candidate.costs_ms])))
