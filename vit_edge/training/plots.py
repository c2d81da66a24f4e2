"""Images of a training run: its curves, and which class was taken for which."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vit_edge.files import write_atomic

__all__ = ["draw_confusion", "draw_curves"]

_DPI = 110
_MOST_NAMED_CLASSES = 40


def draw_curves(
    path: str | os.PathLike[str], steps: Sequence[Mapping[str, Any]], epochs: Sequence[Mapping[str, Any]]
) -> None:
    """Draw loss, top-1 and learning rate against the step, from the lines of metrics.jsonl."""
    figure = _figure(11, 3.4)
    loss, top1, rate = figure.subplots(1, 3)
    loss.plot(
        [s["step"] for s in steps], [s["loss"] for s in steps], linewidth=0.6, alpha=0.6, label="training, a step"
    )
    validated = [e for e in epochs if e.get("top1") is not None]
    loss.plot([e["step"] for e in validated], [e["validation_loss"] for e in validated], marker=".", label="validation")
    top1.plot([e["step"] for e in validated], [e["top1"] for e in validated], marker=".", color="tab:orange")
    rate.plot([s["step"] for s in steps], [s["learning_rate"] for s in steps], color="tab:green")
    for axis, title in ((loss, "cross-entropy"), (top1, "validation top-1, %"), (rate, "learning rate")):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    if steps or validated:
        loss.legend(fontsize=8)
    _save(figure, path)


def draw_confusion(path: str | os.PathLike[str], confusion: Tensor, class_names: Sequence[str], *, title: str) -> None:
    """Draw `confusion[true class, answer]` as shares of each true class; counts where the classes are few."""
    shares = confusion.double() / confusion.sum(dim=1, keepdim=True).clamp(min=1)
    num_classes = len(class_names)
    side = min(14.0, 3.0 + 0.35 * num_classes)
    figure = _figure(side + 1, side)
    axis = figure.subplots()
    image = axis.imshow(shares.numpy(), vmin=0, vmax=1, cmap="Blues")
    figure.colorbar(image, fraction=0.046, label="share of the true class")
    axis.set(title=title, xlabel="answer", ylabel="true class")
    if num_classes <= _MOST_NAMED_CLASSES:
        axis.set_xticks(range(num_classes), class_names, rotation=90, fontsize=8)
        axis.set_yticks(range(num_classes), class_names, fontsize=8)
        for row, column in confusion.nonzero().tolist():
            colour = "white" if shares[row, column] > 0.5 else "black"
            count = int(confusion[row, column])
            axis.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=7)
    _save(figure, path)


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)  # no window, and nothing of the application's own matplotlib is touched
    return figure


def _save(figure: Any, path: str | os.PathLike[str]) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    write_atomic(path, buffer.getvalue())
