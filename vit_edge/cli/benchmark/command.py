"""`vit-edge benchmark`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vit_edge.cli.benchmark.outputs import OUTPUTS, begin
from vit_edge.cli.benchmark.tables import tables
from vit_edge.cli.device.remote import measured as shown_of_devices
from vit_edge.cli.device.remote import on_devices
from vit_edge.cli.options import load_options, option_group
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
        raise UsageError(
            "cannot use --fail-if-slower",
            reason=f"{text!r} is not a percentage",
            remedy="write a percentage such as 5%",
        )
    return value


@command("benchmark")
@file_argument("models", many=True)
@option_group(
    "What to measure (repeatable options are combined)",
    click.option(
        "--engine",
        "engines",
        multiple=True,
        type=click.Choice(["onnxruntime", "openvino", "null"]),
        help="Inference engine; repeatable  [default: all installed].",
    ),
    click.option(
        "--batch-size",
        "batch_sizes",
        multiple=True,
        type=click.IntRange(1),
        help="Images per query; repeatable  [default: 1].",
    ),
    click.option(
        "--threads",
        multiple=True,
        type=click.IntRange(1, MOST_THREADS),
        help="Threads; repeatable  [default: the CPUs the container grants].",
    ),
    click.option(
        "--device",
        "devices",
        multiple=True,
        default=("cpu",),
        show_default=True,
        help="cpu, cuda, gpu, npu, ...; repeatable.",
    ),
    click.option(
        "--float-precision",
        "float_precisions",
        multiple=True,
        type=click.Choice(["float32", "bfloat16", "float16"]),
        help="Precision of the float part; repeatable  [default: float32 on a CPU].",
    ),
    click.option(
        "--images",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Also measure from image file to labels, with these images.",
    ),
)
@option_group(
    "How to measure",
    click.option(
        "--scenario",
        type=click.Choice(["single-stream", "multi-stream", "offline", "server"]),
        help="MLPerf scenario  [default: single-stream for batch 1, else multi-stream].",
    ),
    click.option(
        "--latency-bound",
        type=float,
        metavar="MS",
        help="Server scenario: 99 % of the queries must finish within this time.",
    ),
    click.option("--min-seconds", type=float, default=3.0, show_default=True, help="Shortest time per candidate."),
    click.option(
        "--min-queries", type=click.IntRange(1), default=200, show_default=True, help="Fewest queries per candidate."
    ),
    click.option("--no-peak", is_flag=True, help="Do not measure the peak of the CPU."),
)
@option_group(
    "Compare with a saved run",
    click.option(
        "--compare", type=click.Path(path_type=Path), metavar="OLD.json", help="Compare with a run that --save wrote."
    ),
    click.option(
        "--fail-if-slower",
        callback=_percent,
        metavar="PERCENT",
        help="Exit with code 6 if a result is slower by more than this, with 95 % confidence.",
    ),
    click.option("--allow-invalid", is_flag=True, help="Let --fail-if-slower compare runs that are marked INVALID."),
    click.option("--fail-if-noisy", is_flag=True, help="Exit with code 6 if the machine was too noisy (INVALID)."),
)
@option_group(
    "Output files",
    click.option("--save", type=click.Path(path_type=Path), metavar="FILE", help="Write the results as JSON."),
    click.option("--csv", type=click.Path(path_type=Path), metavar="FILE", help="Write the results as CSV."),
    click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Plot the results."),
    click.option("--force", is_flag=True, help="Replace existing files."),
)
@third_party_options
@on_devices(uploads=("models", "labels", "preprocessing"), shown=shown_of_devices, here=OUTPUTS, begin=begin)
@load_options
def benchmark(models: tuple[Path, ...], **values: Any) -> Result:
    """Measure latency, throughput and memory of MODELS for every combination of the options.

    All candidates are measured in turns, so that drift affects all alike. Latency is the time of one query with its
    input prepared; percentiles are observed samples; speed-ups refer to the first row. Load time, cold start and memory
    come from a fresh process. A run is marked INVALID if other programs used the machine.

    \b
    Examples:
      vit-edge benchmark model.onnx model.int8.onnx --threads 1 --threads 2
      vit-edge benchmark model.int8.onnx --threads 1 --scenario server \\
        --latency-bound 30
      vit-edge benchmark model.int8.onnx --compare last.json --fail-if-slower 5%
    """
    finish = begin(values)
    run = _measure(models, values)
    return finish(Result(data=_data(run), shown=tables(run)))


def _measure(models: tuple[Path, ...], values: dict[str, Any]) -> Benchmark:
    from vit_edge.runtime import BenchmarkOptions, measure

    scenario = values["scenario"]
    # Eight images a query is what MLPerf's multi-stream has.
    batch_sizes = values["batch_sizes"] or ((8,) if scenario == "multi-stream" else (1,))
    options = BenchmarkOptions(
        engines=values["engines"],
        devices=values["devices"],
        float_precisions=values["float_precisions"] or (None,),
        batch_sizes=batch_sizes,
        threads=values["threads"] or (None,),
        scenario=scenario,
        min_seconds=values["min_seconds"],
        min_queries=values["min_queries"],
        latency_bound_ms=values["latency_bound"],
        images=values["images"],
        has_peak=not values["no_peak"],
        **read_third_party_options(values),
    )
    with progress_bar("loading the models") as progress:
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
