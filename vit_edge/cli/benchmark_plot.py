"""Pictures of a run of `vit-edge benchmark`: latencies, throughput against batch, accuracy against latency."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_edge.files import write_atomic

if TYPE_CHECKING:
    from vit_edge.runtime.measurement import Benchmark, Measurement

__all__ = ["draw"]

_DPI = 110


def draw(path: Path, run: Benchmark) -> None:
    """Draw every panel that the run has data for into a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [_latencies, _throughputs]
    if any(result.top1 is not None for result in run.results):
        panels.append(_pareto)
    figure = Figure(figsize=(5.2 * len(panels), 4.4), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)  # no window, and nothing of the application's own matplotlib is touched
    for axis, panel in zip(figure.subplots(1, len(panels)), panels, strict=True):
        panel(axis, run)
        axis.grid(alpha=0.3)
    if run.invalid_because:
        figure.suptitle("INVALID: " + "; ".join(run.invalid_because), color="tab:red", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    write_atomic(path, buffer.getvalue())


def _latencies(axis: Any, run: Benchmark) -> None:
    """Draw the share of queries that were answered by each time; the last per cent is left out of the picture."""
    for result in run.results:
        axis.plot(result.quantiles_ms[:100], range(100), label=_label(result), linewidth=1.2)
    axis.set(title="latency of a query", xlabel="milliseconds", ylabel="answered by then, %")
    axis.set_xscale("log")
    axis.legend(fontsize=6)


def _throughputs(axis: Any, run: Benchmark) -> None:
    lines: dict[str, list[tuple[int, float]]] = {}
    for result in run.results:
        lines.setdefault(_label(result, with_batch=False), []).append((result.batch_size, result.throughput_per_s))
    for label, points in lines.items():
        axis.plot(*zip(*sorted(points), strict=True), marker="o", label=label, linewidth=1.2)
    sizes = sorted({result.batch_size for result in run.results})
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.set_ylim(bottom=0)
    axis.set(title="throughput", xlabel="images a query", ylabel="images a second")
    axis.legend(fontsize=6)


def _pareto(axis: Any, run: Benchmark) -> None:
    """Draw accuracy against an image's time; the line joins those that no other beats in both."""
    points = [(_cost_ms(result), result.top1, result) for result in run.results if result.top1 is not None]
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


def _cost_ms(result: Measurement) -> float:
    return result.latency_ms.p50 / result.batch_size


def _label(result: Measurement, *, with_batch: bool = True) -> str:
    batch = f", batch {result.batch_size}" if with_batch else ""
    workers = "" if result.workers == 1 else f"{result.workers} x "
    threads = f"{workers}{result.threads} {'thread' if result.threads == 1 else 'threads'}"
    precision = "" if result.float_precision in ("f32", "unknown", "none") else f" {result.float_precision}"
    return f"{Path(result.model).stem}{precision}, {result.engine}, {threads}{batch}"
