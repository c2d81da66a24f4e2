"""`vit-edge tune`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from vit_edge.cli.options import load_options
from vit_edge.cli.output import Result, command, file_argument, make_table, progress_bar


@command("tune")
@file_argument("model")
@click.option(
    "--min-seconds", type=float, default=2.0, show_default=True, help="Shortest measuring time for each choice."
)
@click.option("--min-queries", type=int, default=50, show_default=True, help="Fewest images for each choice.")
@load_options
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
    best = tuning.configuration
    threads = "1 thread" if best.threads == 1 else f"{best.threads} threads"
    saved = "saved for later loads" if tuning.is_saved else "not saved: the cache folder is not writable"
    shown = [
        f"Fastest: {best.engine} with {threads}, {best.p50_ms:.3f} ms per image (median); {saved}.",
        make_table("", ("engine", "threads", "p50 ms", "min ms"), rows),
    ]
    return Result(data={"model": str(model), **asdict(tuning)}, shown=shown)
