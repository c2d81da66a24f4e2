"""What `vit-edge benchmark` shows a person, and its CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_edge.cli.output import make_table, megabytes

if TYPE_CHECKING:
    from rich.table import Table

    from vit_edge.runtime.benchmark.results import Benchmark, Measurement

__all__ = ["csv_text", "tables"]

_FIELDS = (
    "model",
    "engine",
    "engine_version",
    "device",
    "precision",
    "float_precision",
    "batch_size",
    "threads",
    "workers",
    "scenario",
    "num_queries",
    "seconds",
    "throughput_per_s",
    "load_ms",
    "cold_start_ms",
    "peak_rss_bytes",
    "size_bytes",
    "millijoules_per_image",
    "share_of_peak",
    "top1",
)
_LATENCIES = ("min", "p50", "p90", "p99")


def tables(run: Benchmark) -> list[Any]:
    """Return the verdict of a run in a sentence, then its tables."""
    shown: list[Any] = [_headline(run), _latencies(run), _costs(run)]
    if any(result.end_to_end for result in run.results):
        shown.append(_stages(run))
    shown += [
        f"{Path(result.model).name} in {result.engine}: no rate stays within {result.latency_bound_ms:g} ms"
        for result in run.results
        if result.latency_bound_ms is not None and not result.throughput_per_s
    ]
    return [*shown, _harness(run)]


def _headline(run: Benchmark) -> str:
    """Return which candidate is fastest, or that the figures do not count and why."""
    if run.invalid_because:
        return f"INVALID: {'; '.join(run.invalid_because)}. Measure again on a quiet machine."
    first, best = run.results[0], max(run.results, key=lambda result: result.throughput_per_s)
    what = f"{_candidate(best)}: {best.latency_ms.p50:.2f} ms per query (median), {best.throughput_per_s:.0f} images/s"
    if best.ratio is None:
        return f"Fastest: {what}." if len(run.results) > 1 else f"{what}."
    return f"Fastest: {what}, {_ratio(best)} times the speed of {_candidate(first)}."


def csv_text(results: Sequence[Mapping[str, Any]], *, is_valid: bool) -> str:
    """Return one line for each result, as --json has it, under a line of names; `on` is the device, if any."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    ratios = ("ratio", "ratio_low", "ratio_high")
    writer.writerow((*_FIELDS, *(f"latency_{name}_ms" for name in _LATENCIES), *ratios, "valid", "on"))
    for result in results:
        ratio = result["ratio"]
        interval = (ratio["by_round"], *ratio["interval"]) if ratio else ("", "", "")
        own = [result[name] for name in _FIELDS]
        times = [result["latency_ms"][name] for name in _LATENCIES]
        values = ("" if value is None else value for value in (*own, *times))
        writer.writerow((*values, *interval, is_valid, result.get("device_name", "")))
    return text.getvalue()


def _latencies(run: Benchmark) -> Table:
    first = run.results[0]
    rows = [
        (
            _candidate(result),
            *(f"{getattr(result.latency_ms, name):.3f}" for name in _LATENCIES),
            f"{result.throughput_per_s:.0f}",
            "1" if result is first else _ratio(result),
        )
        for result in run.results
    ]
    columns = ("candidate", *(f"{name} ms" for name in _LATENCIES))
    bound = "" if first.latency_bound_ms is None else f" within {first.latency_bound_ms:g} ms at p99"
    title = f"{_scenarios(run)}{bound}, {first.cpu} ({first.instruction_set})"
    return make_table(title, (*columns, "images/s", "speed-up (95 %)"), rows)


def _scenarios(run: Benchmark) -> str:
    return " and ".join(dict.fromkeys(result.scenario for result in run.results))


def _candidate(result: Measurement) -> str:
    """Return the file and how it ran, in words between which a line may end."""
    device = "" if result.device == "cpu" else f" on {result.device}"
    is_plain = result.float_precision in ("float32", "unknown", "none")
    precision = result.precision if is_plain else f"{result.precision} with {result.float_precision}"
    threads = f"{result.threads} {'thread' if result.threads == 1 else 'threads'}"
    workers = "" if result.workers == 1 else f"{result.workers} workers of "
    engine = f"{result.engine} {result.engine_version}{device}"
    return f"{Path(result.model).name} in {engine}, {precision}, batch {result.batch_size}, {workers}{threads}"


def _ratio(result: Measurement) -> str:
    if result.ratio is None:
        return "-"
    low, high = result.ratio.interval
    return f"{result.ratio.by_round:.2f} ({low:.2f} to {high:.2f})"


def _costs(run: Benchmark) -> Table:
    rows = [
        (
            _candidate(result),
            f"{result.load_ms:.0f}",
            f"{result.cold_start_ms:.0f}",
            megabytes(result.peak_rss_bytes),
            megabytes(result.size_bytes),
            _or_unknown(result.share_of_peak, "{:.0%}"),
            _or_unknown(result.millijoules_per_image, "{:.1f} mJ"),
        )
        for result in run.results
    ]
    columns = ("candidate", "load ms", "cold start ms", "peak memory", "file")
    return make_table(f"energy: {run.energy_meter}", (*columns, "of CPU peak", "energy per image"), rows)


def _stages(run: Benchmark) -> Table:
    found = [(result, result.end_to_end) for result in run.results if result.end_to_end]
    rows = [
        (
            _candidate(result),
            *(f"{ms:.2f}" for ms in (one.decode_ms, one.resize_ms, one.inference_ms, one.answer_ms)),
            *(f"{ms:.2f}" for ms in (one.total_ms.p50, one.total_ms.p90, one.total_ms.p99)),
        )
        for result, one in found
    ]
    stages = ("decode ms", "resize ms", "inference ms", "labels ms", "p50 ms", "p90 ms", "p99 ms")
    one = found[0][1]
    rejected = f", {one.num_rejected} more cannot be read" if one.num_rejected else ""
    title = f"from file to labels, one image at a time, {one.num_images} images{rejected}"
    return make_table(title, ("candidate", *stages), rows)


def _harness(run: Benchmark) -> str:
    peaks = "; ".join(
        f"{peak.engine} with {peak.threads} {'thread' if peak.threads == 1 else 'threads'} "
        f"{_or_unknown(peak.integer_gmac_per_s, '{:.0f}')} in INT8, "
        f"{_or_unknown(peak.float_gmac_per_s, '{:.0f}')} in float32"
        for peak in run.peaks
    )
    own = f"Overhead of the benchmark: {run.harness.p50_us:.1f} microseconds per query (null engine, median)."
    return f"{own}\nPeak of large matrix products, GMAC/s: {peaks}." if peaks else own


def _or_unknown(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
