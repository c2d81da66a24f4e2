"""Plots of a run of `vit-edge benchmark`: latencies, throughput against batch, accuracy against latency."""

from __future__ import annotations

import io
import math
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vit_edge.errors import require

__all__ = ["draw_benchmark"]

_DPI = 110
_LINES, _MARKERS = ("-", "--", ":", "-."), ("o", "s", "^", "D", "v", "P", "X")
_FILLS = ("full", "none", "left", "right", "top", "bottom")
# Values as `vit-edge benchmark --json` prints them: a saved run is drawn like a new one.
Result = Mapping[str, Any]
Style = dict[str, Any]


def draw_benchmark(results: Sequence[Result], invalid_because: Sequence[str] = ()) -> bytes:
    """Return one PNG with every panel that the results have data for; raises MissingExtra without matplotlib."""
    require("matplotlib", extra="train", what="draw the results")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [_latencies, _throughputs]
    if any(result["top1"] is not None for result in results):
        panels.append(_pareto)
    num_columns = 2 * len(panels)
    height = 4.2 + 0.15 * math.ceil(len(results) / num_columns)
    figure = Figure(figsize=(5.2 * len(panels), height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)  # no window, and nothing of the application's own matplotlib is touched
    styles = _styles(results)
    for axis, panel in zip(figure.subplots(1, len(panels)), panels, strict=True):
        panel(axis, results, styles)
        axis.grid(alpha=0.3)
    # One legend below all panels: two dozen lines inside a panel would hide the data.
    named = figure.axes[0].get_lines()
    figure.legend(handles=named, loc="outside lower center", ncols=num_columns, fontsize=6, handlelength=4)
    if invalid_because:
        figure.suptitle("INVALID: " + "; ".join(invalid_because), color="tab:red", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _styles(results: Sequence[Result]) -> list[Style]:
    """Return the style of each result: file by colour, engine by line, threads by marker, batch by its fill."""
    seen: list[dict[Hashable, int]] = [{}, {}, {}, {}]
    found = []
    for result in results:
        ran_as = (result["model"], result["float_precision"], result["device"], result.get("device_name"))
        keys = (ran_as, result["engine"], (result["workers"], result["threads"]), result["batch_size"])
        colour, line, marker, fill = (kinds.setdefault(key, len(kinds)) for kinds, key in zip(seen, keys, strict=True))
        found.append(
            {
                "color": f"C{colour % 10}",
                "linestyle": _LINES[line % len(_LINES)],
                "marker": _MARKERS[marker % len(_MARKERS)],
                "fillstyle": _FILLS[fill % len(_FILLS)],
                "linewidth": 1.2,
                "markersize": 5,
            }
        )
    return found


def _latencies(axis: Any, results: Sequence[Result], styles: Sequence[Style]) -> None:
    """Draw the share of queries that finished within each time; the last percent is left out."""
    for result, style in zip(results, styles, strict=True):
        axis.plot(result["quantiles_ms"][:100], range(100), label=_label(result), markevery=[50], **style)
    axis.set(title="latency of a query", xlabel="milliseconds; the marker is the median", ylabel="finished by then, %")
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:g}")


def _throughputs(axis: Any, results: Sequence[Result], styles: Sequence[Style]) -> None:
    lines: dict[str, list[tuple[int, float, Style]]] = {}
    for result, style in zip(results, styles, strict=True):
        size, rate = result["batch_size"], result["throughput_per_s"]
        axis.plot(size, rate, **{**style, "linestyle": ""})
        lines.setdefault(_label(result, with_batch=False), []).append((size, rate, style))
    for points in lines.values():
        ordered = sorted(points, key=lambda point: point[0])
        axis.plot([x for x, _, _ in ordered], [y for _, y, _ in ordered], **{**points[0][2], "marker": ""})
    sizes = sorted({result["batch_size"] for result in results})
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.set_ylim(bottom=0)
    axis.set(title="throughput", xlabel="images a query", ylabel="images a second")


def _pareto(axis: Any, results: Sequence[Result], styles: Sequence[Style]) -> None:
    """Draw accuracy against time per image; the line joins the named results that no other beats in both."""
    points = []
    for result, style in zip(results, styles, strict=True):
        if result["top1"] is not None:
            points.append((_cost_ms(result), result["top1"], result))
            axis.plot(_cost_ms(result), result["top1"], **{**style, "linestyle": ""})
    points.sort(key=lambda point: (point[0], -point[1]))
    best: list[tuple[float, float]] = []
    for cost_ms, top1, result in points:
        if not best or top1 > best[-1][1]:
            best.append((cost_ms, top1))
            axis.annotate(_label(result), best[-1], fontsize=6, xytext=(0, 6), textcoords="offset points")
    axis.plot(*zip(*best, strict=True), linewidth=0.8, color="gray", drawstyle="steps-post")
    axis.margins(0.12)
    axis.set(title="accuracy against time (Pareto)", xlabel="milliseconds an image, median", ylabel="top-1, %")


def _cost_ms(result: Result) -> float:
    return float(result["latency_ms"]["p50"]) / int(result["batch_size"])


def _label(result: Result, *, with_batch: bool = True) -> str:
    batch = f", batch {result['batch_size']}" if with_batch else ""
    workers = "" if result["workers"] == 1 else f"{result['workers']} x "
    threads = f"{workers}{result['threads']} {'thread' if result['threads'] == 1 else 'threads'}"
    precision = "" if result["float_precision"] in ("float32", "unknown", "none") else f" {result['float_precision']}"
    on = f" on {result['device_name']}" if "device_name" in result else ""
    return f"{Path(result['model']).stem}{precision}, {result['engine']}, {threads}{batch}{on}"
