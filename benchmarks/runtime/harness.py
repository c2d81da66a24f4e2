"""Is our harness right? Against LoadGen, a bare loop of `session.run`, and OpenVINO's benchmark_app.

    python benchmarks/runtime/harness.py MODEL.onnx... [--rounds 30] [--queries 64]

Batch 1, one thread, the same loaded model wherever one process allows it: in each round our single-stream loop, a bare
loop over the engine's own call, and a LoadGen run of as many queries; benchmark_app runs in processes of its own, in
turn with blocks of ours, on the same bytes with the same settings. The null engine shows what the harness itself takes.
Needs `pip install mlcommons-loadgen`. Writes a section of docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from support.contestants import measure_and_write
from support.loadgen import LoadgenRun, import_loadgen, run_loadgen
from support.results import machine, versions
from support.timing import Samples, Watch, block

from vit_edge.errors import MissingExtra, VitEdgeError
from vit_edge.model_file.artifact import ModelFile, open_model
from vit_edge.runtime.benchmark.candidate import Candidate
from vit_edge.runtime.benchmark.statistics import latency, ratio
from vit_edge.runtime.engines import ov, ov_graph
from vit_edge.runtime.engines.ort import make_session
from vit_edge.runtime.engines.ov import compile_model
from vit_edge.runtime.engines.protocol import EngineOptions, installed_engines

SECTION = "harness"
ONE = EngineOptions(threads=1)
MOST_LOADGEN, MOST_OTHERS, MOST_NULL_US = 3.0, 5.0, 20.0
# LoadGen's own rules want 64 queries at least for a 90th percentile.
_LEAST_LOADGEN_QUERIES = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL.onnx")
    parser.add_argument("--app-seconds", type=int, default=3, help="of benchmark_app in each of its rounds")
    parser.add_argument("--app-rounds", type=int, default=5)
    measure_and_write(parser, SECTION, run, table)


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    import_loadgen()
    app = shutil.which("benchmark_app", path=str(Path(sys.executable).parent))
    if app is None:
        raise MissingExtra(
            "cannot compare", reason="benchmark_app is not installed", remedy='pip install "vit-edge[openvino]"'
        )
    models = {path.name: open_model(path) for path in arguments.models}
    arguments.queries = max(arguments.queries, _LEAST_LOADGEN_QUERIES)  # the same for all
    watch = Watch(is_busy=False)  # while benchmark_app runs this process waits
    rows = []
    for path, (name, model) in zip(arguments.models, models.items(), strict=True):
        for engine in installed_engines():
            print(f"measuring: {name} in {engine}", file=sys.stderr, flush=True)
            rows += against_loadgen_and_bare(name, path, model, engine, arguments)
        if "openvino" in installed_engines():
            rows.append(against_app(name, path, model, (app, folder), arguments))
    load = watch.stop()
    return {
        "rows": rows,
        "null": null_overhead(arguments.models[0], next(iter(models.values()))),
        "load": load.to_dict(),
        "machine": machine(),
        "versions": versions(),
        "rounds": arguments.rounds,
        "queries": arguments.queries,
    }


def against_loadgen_and_bare(
    name: str, path: Path, model: ModelFile, engine: str, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return our medians and LoadGen's, of the same loaded model, and those of a bare loop over the same graph."""
    candidate = Candidate(str(path), model, engine, ONE, 1)
    bare = bare_loop(model, engine, candidate)
    candidate.warm_up()
    ours, theirs, plain = [], [], []
    for number in range(arguments.rounds):
        turns: list[Callable[[], None]] = [
            lambda: ours.append(our_block(candidate, arguments.queries)),
            lambda: plain.append(block(bare, arguments.queries)),
            lambda: theirs.append(loadgen_block(candidate, arguments.queries)),
        ]
        for position in range(len(turns)):
            turns[(number + position) % len(turns)]()
    candidate.close()
    ours_RQ, plain_RQ = np.array(ours), np.array(plain)
    found = latency((ours_RQ * 1e6).ravel())
    rows = []
    for percentile, own_ms in (("p50", found.p50), ("p90", found.p90)):
        other_ms = float(np.median([getattr(one, f"{percentile}_ms") for one in theirs]))
        own_median_ms = float(np.median([getattr(latency(block_Q * 1e6), percentile) for block_Q in ours_RQ]))
        rows.append(row(name, engine, f"LoadGen, {percentile}", own_median_ms, other_ms, limit=MOST_LOADGEN))
        rows[-1]["of_all_ms"] = own_ms
    rows.append(
        {
            **row(name, engine, "bare loop, p50", found.p50, float(np.median(plain_RQ)), limit=MOST_OTHERS),
            "interval": ratio(plain_RQ, ours_RQ).interval,
        }
    )
    return rows


def our_block(candidate: Candidate, queries: int) -> Samples:
    """Return the milliseconds of one round of our single-stream scenario."""
    candidate.rounds.clear()
    candidate.sample(0.0, queries)
    return np.array(candidate.samples_ns) / 1e6


def loadgen_block(candidate: Candidate, queries: int) -> LoadgenRun:
    """Return a LoadGen run of at least as many queries."""
    if not candidate.rounds:
        candidate.sample(0.0, 3)  # LoadGen wants to know what to expect
    return run_loadgen(candidate, min_seconds=0.001, min_queries=queries)


def bare_loop(model: ModelFile, engine: str, candidate: Candidate) -> Callable[[int], object]:
    """Return a call of the engine's own function for prepared inputs, of a session made with the same settings."""
    given = [np.ascontiguousarray(model.manifest.network_input(batch)) for batch in candidate.prepared]
    name = model.manifest.input["name"]
    if engine == "onnxruntime":
        session = make_session(model, ONE)
        return lambda number: session.run(["logits"], {name: given[number % len(given)]})
    request = compile_model(model, ONE).create_infer_request()
    return lambda number: request.infer({name: given[number % len(given)]})


def against_app(
    name: str, path: Path, model: ModelFile, app: tuple[str, Path], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Return our median and that of benchmark_app's synchronous mode; both with a static batch of one.

    It gets the graph as our runtime gives it to OpenVINO: what the manifest leaves out for OpenVINO is left out.
    """
    program, folder = app
    graph = folder / "graph.xml"
    openvino.save_model(ov_graph.read_graph(ov._core(), model), graph, compress_to_fp16=False)
    candidate = Candidate(str(path), model, "openvino", EngineOptions(threads=1, batch_size=1), 1)
    candidate.warm_up()
    ours, theirs = [], []
    for _ in range(arguments.app_rounds):
        candidate.rounds.clear()
        candidate.sample(arguments.app_seconds, 20)
        ours.append(candidate.latency.p50)
        theirs.append(app_median_ms(program, graph, model, arguments.app_seconds))
    candidate.close()
    return row(
        name, "openvino", "benchmark_app, p50", float(np.median(ours)), float(np.median(theirs)), limit=MOST_OTHERS
    )


def app_median_ms(program: str, graph: Path, model: ModelFile, seconds: int) -> float:
    """Return the median that benchmark_app reports, in milliseconds."""
    side = ",".join(str(size) for size in model.manifest.preprocessing.crop)
    shape = f"[1,{side},3]" if model.manifest.input["dtype"] == "uint8" else f"[1,3,{side}]"
    command = [program, "-m", str(graph), "-d", "CPU", "-api", "sync", "-hint", "none", "-nstreams", "1"]
    command += ["-nthreads", "1", "-infer_precision", "f32", "-shape", shape, "-t", str(seconds)]
    command += ["-report_type", "no_counters", "-report_folder", str(graph.parent), "-json_stats"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 300, check=False)
    report = graph.parent / "benchmark_report.json"
    if done.returncode != 0 or not report.is_file():
        reason = f"benchmark_app ended with {done.returncode}: {(done.stderr or done.stdout).strip()[-300:]}"
        raise VitEdgeError("cannot compare", file=graph, reason=reason, remedy="run it by itself")
    results = json.loads(report.read_text(encoding="utf-8"))["execution_results"]
    report.unlink()
    return float(results["latency (ms)"])  # the median


def row(name: str, engine: str, beside: str, ours_ms: float, theirs_ms: float, *, limit: float) -> dict[str, Any]:
    apart = 100 * (ours_ms / theirs_ms - 1)
    return {
        "model": name,
        "engine": engine,
        "beside": beside,
        "ours_ms": ours_ms,
        "theirs_ms": theirs_ms,
        "apart_percent": apart,
        "limit_percent": limit,
        "holds": abs(apart) <= limit,
    }


def null_overhead(path: Path, model: ModelFile) -> dict[str, float]:
    """Return what a query takes in the null engine, in microseconds."""
    null = Candidate(str(path), model, "null", ONE, 1)
    null.sample(1.0, 10_000)
    found = null.latency
    return {"p50_us": found.p50 * 1000, "p99_us": found.p99 * 1000, "queries": len(null.samples_ns)}


def table(result: dict[str, Any]) -> str:
    null = result["null"]
    what = f"Single-stream, batch 1, 1 thread, {result['rounds']} rounds of {result['queries']} queries in turn."
    times = f"p50 {null['p50_us']:.1f}, p99 {null['p99_us']:.1f} microseconds a query, of {null['queries']:,}"
    lines = [
        f"{what} {result['machine']}, {result['versions']}. The machine: {result['load']['said']}.",
        "",
        f"The null engine: {times} (bound: {MOST_NULL_US:g}).",
        "",
        "| model | engine | beside | ours | theirs | apart | bound |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [_line(one) for one in result["rows"]]
    return "\n".join(lines)


def _line(one: dict[str, Any]) -> str:
    missed = "" if one["holds"] else " **missed**"
    times = f"{one['ours_ms']:.3f} ms | {one['theirs_ms']:.3f} ms | {one['apart_percent']:+.1f} %"
    return f"| {one['model']} | {one['engine']} | {one['beside']} | {times} | {one['limit_percent']:g} %{missed} |"


if __name__ == "__main__":
    main()
