"""`vit-edge tune`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from vit_edge.cli.output import Result, command, file_argument, make_table, progress_bar


@command("tune")
@file_argument("model")
@click.option("--min-seconds", type=float, default=2.0, show_default=True, help="Measure each choice at least so long.")
@click.option("--min-queries", type=int, default=50, show_default=True, help="And at least so many images.")
def tune(model: Path, min_seconds: float, min_queries: int) -> Result:
    """Find the fastest engine and number of threads for MODEL on this machine, and save them.

    `classify` and `load(...)` use the saved configuration when no engine is named. A configuration applies to the
    same file, engine releases, CPU and number of usable threads.

    \b
    Example:
      vit-edge tune model.int8.onnx
    """
    from vit_edge.runtime.benchmark.tuning import tune as measure_choices

    with progress_bar() as progress:
        tuning = measure_choices(model, min_seconds=min_seconds, min_queries=min_queries, progress=progress)
    rows = [
        (one.engine, str(one.threads), f"{one.latency_ms.p50:.3f}", f"{one.latency_ms.min:.3f}") for one in tuning.tried
    ]
    configuration = tuning.configuration
    kept = "" if tuning.is_kept else "; it could not be kept: the cache folder cannot be written"
    shown = [
        make_table("", ("engine", "threads", "p50 ms", "min ms"), rows),
        f"configuration: {configuration.engine}, {configuration.threads} threads{kept}",
    ]
    return Result(data={"model": str(model), **asdict(tuning)}, shown=shown)
