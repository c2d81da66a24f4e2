"""A plot of an explanation: the noise of each layer over its time."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from vit_edge.errors import require
from vit_edge.export.explanation.explainer import Explanation, Layer
from vit_edge.export.explanation.layer_times import EngineTimes
from vit_edge.files import write_atomic

__all__ = ["IMAGE", "draw_layers", "require_matplotlib"]

IMAGE = "layers.png"
_DPI = 110
_PANEL_INCHES, _NAMES_INCHES = 2.6, 1.8
# Wide enough to read each name, up to what viewers open at once; beyond that only some layers are named.
_INCHES_A_LAYER, _LEAST_INCHES, _MOST_INCHES = 0.26, 9.0, 60.0
_FLOAT32, _INT8, _NOISE = "tab:gray", "tab:blue", "tab:red"


def require_matplotlib() -> None:
    """Raise MissingExtra if matplotlib is not installed."""
    require("matplotlib", extra="train", what=f"draw {IMAGE}")


def draw_layers(path: str | os.PathLike[str], explanation: Explanation) -> None:
    """Draw the noise of each layer over its milliseconds in each engine, all panels over one axis of layers.

    The upper panel has the share of the noise, if known, and the SQNR; else the SQNR alone.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers, engines = explanation.layers, explanation.engines
    width = min(_MOST_INCHES, max(_LEAST_INCHES, 2 + _INCHES_A_LAYER * len(layers)))
    height = _PANEL_INCHES * (1 + len(engines)) + _NAMES_INCHES
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)  # no window, and nothing of the application's own matplotlib is touched
    panels = figure.subplots(1 + len(engines), 1, sharex=True, squeeze=False)[:, 0]
    named = ", ".join(f"{entry.engine} {entry.version}" for entry in engines)
    figure.suptitle(
        f"{explanation.name}, {explanation.precision} against float32: {explanation.num_images} images, {named}"
    )
    _draw_noise(panels[0], layers)
    for panel, entry in zip(panels[1:], engines, strict=True):
        _draw_times(panel, entry, explanation.precision)
    every = max(1, -(-len(layers) * _INCHES_A_LAYER // _MOST_INCHES))
    shown = range(0, len(layers), int(every))
    panels[-1].set_xticks(list(shown), [layers[position].node for position in shown], rotation=90, fontsize=7)
    panels[-1].set_xlim(-0.7, len(layers) - 0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    write_atomic(path, buffer.getvalue())


def _draw_noise(panel: Any, layers: Sequence[Layer]) -> None:
    positions = np.arange(len(layers))
    shares = [layer.noise_share for layer in layers]
    levels = np.array([_finite(layer.sqnr_db) for layer in layers])
    panel.grid(axis="y", alpha=0.3)
    if not any(share is not None for share in shares):
        panel.bar(positions, levels, color=_NOISE)
        panel.set_ylabel("SQNR of the output, dB")
        return
    panel.bar(positions, [share or 0.0 for share in shares], color=_NOISE, label="share of the noise")
    panel.set_ylabel("share of the noise\nin the logits, %")
    right_axis = panel.twinx()
    right_axis.plot(positions, levels, color="black", marker=".", linewidth=0.6, label="SQNR of the output")
    right_axis.set_ylabel("SQNR of the output, dB")
    marks = [mark for axis in (panel, right_axis) for mark in axis.get_legend_handles_labels()[0]]
    panel.legend(handles=marks, fontsize=8, loc="upper center", ncols=2)


def _draw_times(panel: Any, entry: EngineTimes, precision: str) -> None:
    positions = np.arange(len(entry.layers))
    before = [layer.reference_ms or 0.0 for layer in entry.layers]
    after = [layer.candidate_ms or 0.0 for layer in entry.layers]
    colours = [_INT8 if layer.precision == "int8" else "tab:orange" for layer in entry.layers]
    panel.grid(axis="y", alpha=0.3)
    panel.bar(positions - 0.2, before, width=0.4, color=_FLOAT32, label="float32 file")
    panel.bar(positions + 0.2, after, width=0.4, color=colours, label=f"{precision} file (orange: runs in float32)")
    panel.set_ylabel("ms")
    panel.legend(fontsize=8, loc="upper right", ncols=2)
    panel.margins(y=0.2)  # room for the legend
    was = f"{sum(before):.2f} of {entry.reference_ms:.2f} ms"
    now = f"{sum(after):.2f} of {entry.candidate_ms:.2f} ms"
    how = f"{entry.engine}, one thread, median of {entry.num_runs}"
    panel.set_title(f"{how}: these layers take {was} in float32, {now} in {precision}", fontsize=9)


def _finite(value: float | None) -> float:
    return np.nan if value is None or not np.isfinite(value) else value
