"""Pictures of a run of `vit-edge benchmark`: latencies, throughput against batch, accuracy against latency."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vit_edge.errors import require

__all__ = ["draw_benchmark"]

_DPI = 110
# Values as `vit-edge benchmark --json` prints them: a saved run is drawn as the one just made.
Result = Mapping[str, Any]


def draw_benchmark(results: Sequence[Result], invalid_because: Sequence[str] = ()) -> bytes:
    """Return every panel that the results have data for, as one PNG; raises MissingExtra without matplotlib."""
    require("matplotlib", extra="train", what="draw the results")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [_latencies, _throughputs]
    if any(result["top1"] is not None for result in results):
        panels.append(_pareto)
    figure = Figure(figsize=(5.2 * len(panels), 4.4), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)  # no window, and nothing of the application's own matplotlib is touched
    for axis, panel in zip(figure.subplots(1, len(panels)), panels, strict=True):
        panel(axis, results)
        axis.grid(alpha=0.3)
    if invalid_because:
        figure.suptitle("INVALID: " + "; ".join(invalid_because), color="tab:red", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _latencies(axis: Any, results: Sequence[Result]) -> None:
    """Draw the share of queries that were answered by each time; the last per cent is left out of the picture."""
    for result in results:
        axis.plot(result["quantiles_ms"][:100], range(100), label=_label(result), linewidth=1.2)
    axis.set(title="latency of a query", xlabel="milliseconds", ylabel="answered by then, %")
    axis.set_xscale("log")
    axis.legend(fontsize=6)


def _throughputs(axis: Any, results: Sequence[Result]) -> None:
    lines: dict[str, list[tuple[int, float]]] = {}
    for result in results:
        point = (result["batch_size"], result["throughput_per_s"])
        lines.setdefault(_label(result, with_batch=False), []).append(point)
    for label, points in lines.items():
        axis.plot(*zip(*sorted(points), strict=True), marker="o", label=label, linewidth=1.2)
    sizes = sorted({result["batch_size"] for result in results})
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.set_ylim(bottom=0)
    axis.set(title="throughput", xlabel="images a query", ylabel="images a second")
    axis.legend(fontsize=6)


def _pareto(axis: Any, results: Sequence[Result]) -> None:
    """Draw accuracy against an image's time; the line joins those that no other beats in both."""
    points = [(_cost_ms(result), result["top1"], result) for result in results if result["top1"] is not None]
    points.sort(key=lambda point: (point[0], -point[1]))
    for cost_ms, top1, result in points:
        axis.scatter([cost_ms], [top1], s=22)
        axis.annotate(_label(result), (cost_ms, top1), fontsize=6, xytext=(3, 3), textcoords="offset points")
    best: list[tuple[float, float]] = []
    for cost_ms, top1, _ in points:
        if not best or top1 > best[-1][1]:
            best.append((cost_ms, top1))
    axis.plot(*zip(*best, strict=True), linewidth=0.8, color="gray", drawstyle="steps-post")
    axis.set(title="accuracy against time (Pareto)", xlabel="milliseconds an image, median", ylabel="top-1, %")


def _cost_ms(result: Result) -> float:
    return float(result["latency_ms"]["p50"]) / int(result["batch_size"])


def _label(result: Result, *, with_batch: bool = True) -> str:
    batch = f", batch {result['batch_size']}" if with_batch else ""
    workers = "" if result["workers"] == 1 else f"{result['workers']} x "
    threads = f"{workers}{result['threads']} {'thread' if result['threads'] == 1 else 'threads'}"
    precision = "" if result["float_precision"] in ("f32", "unknown", "none") else f" {result['float_precision']}"
    on = f" on {result['device_name']}" if "device_name" in result else ""
    return f"{Path(result['model']).stem}{precision}, {result['engine']}, {threads}{batch}{on}"
