"""`vit-edge benchmark`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vit_edge.cli.output import Result, command, file_argument, make_table, megabytes, progress_bar, threads_option
from vit_edge.cli.remote import measured, on_devices

if TYPE_CHECKING:
    from rich.table import Table

    from vit_edge.runtime.benchmark import Measurement


@command("benchmark")
@file_argument("models", many=True)
@click.option(
    "--engine", "engines", multiple=True, help="onnxruntime or openvino, repeatable  [default: all installed]."
)
@click.option("--batch-size", type=click.IntRange(1), default=1, show_default=True, help="Pictures a query.")
@click.option(
    "--min-seconds", type=float, default=3.0, show_default=True, help="Shortest time each candidate is measured."
)
@click.option(
    "--min-queries", type=click.IntRange(1), default=200, show_default=True, help="Fewest queries for each candidate."
)
@threads_option()
@on_devices(uploads=("models",), shown=measured)
def benchmark(
    models: tuple[Path, ...],
    engines: tuple[str, ...],
    batch_size: int,
    min_seconds: float,
    min_queries: int,
    threads: int | None,
) -> Result:
    """Measure how fast MODELS answer, each in every engine, alternately in rounds.

    Latency is that of one query with its input prepared; percentiles are samples that occurred. Load time and memory
    are those of a fresh process. Figures hold for this machine as it is now: compare within one table.

    \b
    Example:
      vit-edge benchmark model.onnx model.int8.onnx --threads 1
    """
    from vit_edge.runtime.benchmark import measure

    with progress_bar() as progress:
        results = measure(
            models,
            engines=engines,
            batch_size=batch_size,
            threads=threads,
            min_seconds=min_seconds,
            min_queries=min_queries,
            progress=progress,
        )
    return Result(data={"results": [asdict(r) for r in results]}, shown=[_table(results)])


def _table(results: list[Measurement]) -> Table:
    first = results[0]
    rows = [
        (
            Path(r.model).name,
            f"{r.engine} {r.engine_version}",
            r.precision,
            f"{r.latency_ms.min:.3f}",
            f"{r.latency_ms.p50:.3f}",
            f"{r.latency_ms.p90:.3f}",
            f"{r.latency_ms.p99:.3f}",
            f"{r.throughput_per_s:.0f}",
            f"{r.load_ms:.0f}",
            megabytes(r.peak_rss_bytes),
            megabytes(r.size_bytes),
        )
        for r in results
    ]
    columns = (
        "model",
        "engine",
        "precision",
        "min ms",
        "p50 ms",
        "p90 ms",
        "p99 ms",
        "images/s",
        "load ms",
        "peak RSS",
        "file",
    )
    title = (
        f"{first.scenario}, batch {first.batch_size}, {first.threads} threads, {first.cpu} ({first.instruction_set})"
    )
    return make_table(title, columns, rows)
