"""The tables of a report: rows of text from the values that commands print."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vit_edge.report.sources import Given, Verified, VerifiedEncoder

__all__ = [
    "PRECISIONS",
    "Table",
    "accuracy_table",
    "benchmark_table",
    "changes_table",
    "classes_table",
    "coverage_table",
    "encoder_table",
    "layers_table",
    "speed_table",
    "stages_table",
]

# What a precision is called in a sentence.
PRECISIONS = {"float32": "float32", "float16": "float16", "int8": "INT8", "int8-dynamic": "dynamic INT8"}
_NUMBER = re.compile(r"-|[-+]?[\d.,]+( ?%| dB| ms| MB)?( \(.*\))?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Rows of text under columns; `numeric` says of each column whether it reads as numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        for cell in (cell for row in self.rows for cell in row):
            if not isinstance(cell, str):
                raise TypeError(f"{str(cell)[:60]!r} is not a text, in the table {self.title!r}")

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Return of each column whether all of its cells are numbers."""
        cells = zip(*self.rows, strict=True) if self.rows else ((),) * len(self.columns)
        return tuple(bool(column) and all(_NUMBER.fullmatch(cell) for cell in column) for column in cells)


def accuracy_table(verified: Verified) -> Table:
    """Return one row for each engine."""
    rows = tuple(
        (
            entry["engine"],
            f"{entry['images']:,}",
            _number(entry["reference_top1"], "{:.2f} %"),
            _number(entry["candidate_top1"], "{:.2f} %"),
            f"{'at most ' if entry['unlabelled'] else ''}{entry['drop_points']:.2f}",
            f"{entry['drop_upper_bound_points']:.2f}",
            f"{entry['worse']} / {entry['better']}",
            _number(entry["mcnemar_p"], "{:.3g}"),
            _agreement(entry),
            _number(entry["sqnr_db"], "{:.1f}"),
            entry["verdict"],
        )
        for entry in verified.engines
    )
    columns = (
        "engine",
        "images",
        "top-1, reference",
        "top-1, candidate",
        "drop, points",
        "bound, 95 %",
        "worse / better",
    )
    return Table(
        title=verified.title,
        columns=(*columns, "McNemar p", "agreement (95 %)", "SQNR, dB", "verdict"),
        rows=rows,
    )


def encoder_table(verified: VerifiedEncoder) -> Table:
    """Return one row for each engine: the neighbours that an encoder keeps, and how far its vectors moved."""
    rows = tuple(
        (
            entry["engine"],
            f"{entry['images']:,}",
            *(f"{kept['percent']:.2f} % ({kept['lower_bound']:.2f})" for kept in entry["neighbours"]),
            f"{entry['cosine_mean']:.5f}",
            f"{entry['cosine_q05']:.5f}",
            f"{entry['cosine_worst']:.5f}",
            _number(entry["sqnr_db"], "{:.1f}"),
            "-" if entry["knn"] is None else f"{entry['knn']['drop_points']:.2f}",
            entry["verdict"],
        )
        for entry in verified.engines
    )
    kept = tuple(f"neighbours kept, k = {one['k']} (95 % bound)" for one in verified.engines[0]["neighbours"])
    cosines = ("cosine, mean", "5 % quantile", "worst")
    columns = ("engine", "images", *kept, *cosines, "SQNR, dB", "k-NN drop, points", "verdict")
    return Table(title=verified.title, columns=columns, rows=rows)


def classes_table(verified: Verified) -> Table | None:
    """Return the classes that lost correct predictions, in the engine that lost most; None if none did."""
    worst = verified.worst
    if not worst.get("worst_classes"):
        return None
    names = ("label", "lost", "images", "reference_right", "candidate_right")
    rows = tuple(tuple(_plain(entry[name]) for name in names) for entry in worst["worst_classes"])
    title = f"Classes that lost most, in {worst['engine']}"
    return Table(
        title=title, columns=("class", "lost", "images", "correct, reference", "correct, candidate"), rows=rows
    )


def changes_table(verified: Verified) -> Table:
    """Return every prediction that changed in each engine."""
    rows = tuple(
        (
            entry["engine"],
            each["path"],
            each["reference"],
            each["candidate"],
            f"{each['reference_margin']:.2f}",
            f"{each['candidate_margin']:.2f}",
            _plain(each["label"]),
            _plain(each["effect"]),
        )
        for entry in verified.engines
        for each in entry["changed"]
    )
    columns = ("engine", "image", "reference", "candidate", "margin, reference", "margin, candidate", "label", "effect")
    return Table(title=f"All {len(rows)} changed predictions, engine by engine", columns=columns, rows=rows)


def benchmark_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """Return one row for each candidate of a run of `vit-edge benchmark`."""
    on = any("on" in entry for entry in results)
    rows = tuple(
        (
            *((f"{entry['device_name']}{' (emulated)' if entry.get('emulated') else ''}",) if on else ()),
            Path(str(entry["model"])).name,
            f"{entry['engine']} {entry['engine_version']}",
            _precision(entry),
            f"{entry['batch_size']}",
            f"{entry['threads']}" if entry["workers"] == 1 else f"{entry['workers']} x {entry['threads']}",
            *(f"{entry['latency_ms'][name]:.2f}" for name in ("min", "p50", "p90", "p99")),
            f"{entry['throughput_per_s']:,.0f}",
            _ratio(entry["ratio"]),
            _number(entry["top1"], "{:.2f}"),
            _number(entry["share_of_peak"], "{:.0%}"),
            f"{entry['peak_rss_bytes'] / 1e6:.0f}",
            f"{entry['size_bytes'] / 1e6:.2f}",
        )
        for entry in results
    )
    times = ("min, ms", "p50, ms", "p90, ms", "p99, ms", "images/s", "times as fast as the first (95 %)")
    columns = (
        "model",
        "engine",
        "precision",
        "batch",
        "threads",
        *times,
        "top-1, %",
        "of peak",
        "memory, MB",
        "file, MB",
    )
    scenarios = " and ".join(dict.fromkeys(entry["scenario"] for entry in results))
    cpus = ", ".join(dict.fromkeys(f"{entry['cpu']} ({entry['instruction_set']})" for entry in results))
    return Table(title=f"{scenarios}, {cpus}", columns=(*(("on",) if on else ()), *columns), rows=rows)


def speed_table(engines: Sequence[Mapping[str, Any]]) -> Table:
    """Return the times of the float32 file and the quantized one, from `vit-edge quantize` or a deployment."""
    rows = tuple(
        (
            entry["engine"],
            f"{entry['float_ms']:.2f}",
            f"{entry['integer_ms']:.2f}",
            f"{entry['ratio']:.2f} ({entry['ratio_interval'][0]:.2f} to {entry['ratio_interval'][1]:.2f})",
        )
        for entry in engines
    )
    columns = ("engine", "float32, ms", "candidate, ms", "times as fast (95 %)")
    return Table(title="Batch 1, one thread, median", columns=columns, rows=rows)


def coverage_table(given: Given) -> Table:
    """Return how much of the file each engine runs in INT8."""
    rows = tuple(
        (entry["engine"], f"{entry['percent']:.1f} %", f"{entry['percent_of_all']:.1f} %", str(len(entry["alone"])))
        for entry in given.values["coverage"]
    )
    columns = ("engine", "of constant-weight GMAC", "of all GMAC", "Q/DQ left alone")
    return Table(title=f"Runs in INT8: {Path(given.values['model']).name}", columns=columns, rows=rows)


def stages_table(explain: Mapping[str, Any]) -> Table:
    """Return where the error comes from, stage by stage."""
    rows = tuple(
        (
            stage["name"],
            stage["engine"],
            _number(stage["sqnr_db"], "{:.1f}"),
            _number(stage["sqnr_before_db"], "{:.1f}"),
            _number(stage["agreement"], "{:.1f} %"),
            stage["note"],
        )
        for stage in explain["stages"]
    )
    columns = ("stage", "engine", "SQNR, dB", "against the stage before, dB", "agreement", "what changed")
    return Table(title=f"Error by stage, on {explain['images']} images", columns=columns, rows=rows)


def layers_table(explain: Mapping[str, Any]) -> Table:
    """Return the noise of each layer, and its milliseconds in each engine."""
    engines = list(dict.fromkeys(name for layer in explain["layers"] for name in layer["engines"]))
    rows = tuple(
        (
            layer["node"],
            _number(layer["sqnr_db"], "{:.1f}"),
            _number(layer["noise_share"], "{:.1f} %"),
            *(cell for name in engines for cell in _times(layer["engines"].get(name))),
        )
        for layer in explain["layers"]
    )
    times = (f"{name}: {kind}" for name in engines for kind in ("reference, ms", "candidate, ms"))
    return Table(title="By layer", columns=("layer", "SQNR, dB", "share of the noise", *times), rows=rows)


def _agreement(entry: Mapping[str, Any]) -> str:
    low, high = entry["agreement_interval"]
    return f"{entry['agreement']:.2f} % ({low:.1f} to {high:.1f})"


def _times(times: Mapping[str, Any] | None) -> tuple[str, str]:
    if times is None:
        return "-", "-"
    return _number(times["reference_ms"], "{:.3f}"), _number(times["candidate_ms"], "{:.3f}")


def _precision(entry: Mapping[str, Any]) -> str:
    is_plain = entry["float_precision"] in ("float32", "unknown", "none")
    return str(entry["precision"]) if is_plain else f"{entry['precision']} {entry['float_precision']}"


def _ratio(ratio: Mapping[str, Any] | None) -> str:
    if ratio is None:
        return "-"
    low, high = ratio["interval"]
    return f"{ratio['by_round']:.2f} ({low:.2f} to {high:.2f})"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _plain(value: object) -> str:
    return "-" if value is None else str(value)
