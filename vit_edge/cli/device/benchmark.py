"""`vit-edge benchmark`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vit_edge.cli.device.benchmark_outputs import OUTPUTS, begin
from vit_edge.cli.device.benchmark_tables import tables
from vit_edge.cli.device.remote import measured as shown_of_devices
from vit_edge.cli.device.remote import on_devices
from vit_edge.cli.output import Result, command, file_argument, progress_bar
from vit_edge.cli.third_party_options import read_third_party_options, third_party_options
from vit_edge.errors import UsageError
from vit_edge.machine.cpu import MOST_THREADS

if TYPE_CHECKING:
    from vit_edge.runtime.benchmark.results import Benchmark

_MOST_PERCENT = 1000


def _percent(_context: click.Context, _parameter: click.Parameter, text: str | None) -> float | None:
    """Return the number in "5%" or "5"."""
    if text is None:
        return None
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = -1.0
    if not 0 <= value <= _MOST_PERCENT:
        raise UsageError("cannot use --fail-if-slower", reason=f"it is {text!r}", remedy="write per cent, such as 5%")
    return value


@command("benchmark")
@file_argument("models", many=True)
@click.option(
    "--engine", "engines", multiple=True, help="onnxruntime or openvino, repeatable  [default: all installed]."
)
@click.option("--device", "devices", multiple=True, default=("cpu",), show_default=True, help="Repeatable.")
@click.option(
    "--float-precision",
    "float_precisions",
    multiple=True,
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Precision of the float part; repeatable  [default: float32 on a CPU].",
)
@click.option("--batch-size", "batch_sizes", multiple=True, type=click.IntRange(1), help="Images a query, repeatable.")
@click.option(
    "--threads",
    multiple=True,
    type=click.IntRange(1, MOST_THREADS),
    help="Repeatable  [default: the CPUs the container grants].",
)
@click.option(
    "--scenario",
    type=click.Choice(["single-stream", "multi-stream", "offline", "server"]),
    help="In MLPerf's terms  [default: single-stream for batch 1, else multi-stream].",
)
@click.option("--latency-bound", type=float, metavar="MS", help="What 99 % of a server's answers must hold.")
@click.option(
    "--min-seconds", type=float, default=3.0, show_default=True, help="Shortest time each candidate is measured."
)
@click.option(
    "--min-queries", type=click.IntRange(1), default=200, show_default=True, help="Fewest queries for each candidate."
)
@click.option("--images", type=click.Path(path_type=Path), metavar="DIR", help="Measure from file to labels too.")
@third_party_options
@click.option("--no-peak", is_flag=True, help="Leave out the peak of the CPU.")
@click.option("--csv", type=click.Path(path_type=Path), metavar="FILE", help="Write the results as CSV.")
@click.option("--save", type=click.Path(path_type=Path), metavar="FILE", help="Write what --json prints.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Draw the results.")
@click.option("--force", is_flag=True, help="Replace files that exist.")
@click.option("--compare", type=click.Path(path_type=Path), metavar="OLD.json", help="Compare with a saved run.")
@click.option(
    "--fail-if-slower",
    callback=_percent,
    metavar="PERCENT",
    help="With --compare: exit with code 6 if a result is slower by more than this, with 95 % confidence.",
)
@click.option("--allow-invalid", is_flag=True, help="Let --fail-if-slower compare runs that are marked INVALID.")
@click.option("--fail-if-noisy", is_flag=True, help="Exit with code 6 if the machine was too noisy (INVALID).")
@on_devices(uploads=("models", "labels", "preprocessing"), shown=shown_of_devices, here=OUTPUTS, begin=begin)
def benchmark(models: tuple[Path, ...], **values: Any) -> Result:
    """Measure how fast MODELS answer, in every mix of the options, alternately in rounds.

    Latency is that of one query with its input prepared; percentiles are samples that occurred; a ratio is that to the
    first line. Load time, cold start and memory are those of a fresh process. Figures hold for this machine as it is
    now: compare within one table. A run on a machine that others used too is marked invalid.

    \b
    Example:
      vit-edge benchmark model.onnx model.int8.onnx --threads 1 --threads 2
      vit-edge benchmark model.int8.onnx --threads 1 --scenario server --latency-bound 30
      vit-edge benchmark model.int8.onnx --compare last.json --fail-if-slower 5%
    """
    finish = begin(values)
    run = _measure(models, values)
    return finish(Result(data=_data(run), shown=tables(run)))


def _measure(models: tuple[Path, ...], measured: dict[str, Any]) -> Benchmark:
    from vit_edge.runtime import BenchmarkOptions, measure

    scenario = measured["scenario"]
    # Eight images a query is what MLPerf's multi-stream has.
    batch_sizes = measured["batch_sizes"] or ((8,) if scenario == "multi-stream" else (1,))
    options = BenchmarkOptions(
        engines=measured["engines"],
        devices=measured["devices"],
        float_precisions=measured["float_precisions"] or (None,),
        batch_sizes=batch_sizes,
        threads=measured["threads"] or (None,),
        scenario=scenario,
        min_seconds=measured["min_seconds"],
        min_queries=measured["min_queries"],
        latency_bound_ms=measured["latency_bound"],
        images=measured["images"],
        has_peak=not measured["no_peak"],
        **read_third_party_options(measured),
    )
    with progress_bar() as progress:
        return measure(models, options, progress=progress)


def _data(run: Benchmark) -> dict[str, Any]:
    return {
        "results": [asdict(result) for result in run.results],
        "valid": not run.invalid_because,
        "invalid_because": list(run.invalid_because),
        "noise": run.noise.to_dict(),
        "harness": asdict(run.harness),
        "peaks": [asdict(peak) for peak in run.peaks],
        "energy_meter": run.energy_meter,
    }
