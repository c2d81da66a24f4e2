"""What `vit-edge verify` and `quantize` call the figures of each task, and print of several labels or values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vit_edge.export.verification.results import EngineResult

__all__ = ["TASK_TERMS", "TaskTerms", "score_figures", "terms_of"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskTerms:
    """How a drop and an agreement are called: in a sentence, and as the title of the changes."""

    drop: str
    same: str
    unit: str
    changes: str


TASK_TERMS = {
    None: TaskTerms(
        drop="the accuracy drop is",
        same="of the predictions agree",
        unit="points",
        changes="Predictions that changed",
    ),
    "multi-label": TaskTerms(
        drop="the drop of right labels is",
        same="of the labels agree",
        unit="points",
        changes="Images with a label that changed",
    ),
    "regression": TaskTerms(
        drop="the rise of the error is",
        same="of the range is how near the values are",
        unit="% of the range",
        changes="Images whose values moved most",
    ),
}


def terms_of(entry: EngineResult) -> TaskTerms:
    """Return the terms for the figures of an engine."""
    return TASK_TERMS[entry.scores.task if entry.scores else None]


def score_figures(entry: EngineResult) -> dict[str, str]:
    """Return the rows of a network that does not choose one class."""
    assert entry.scores is not None
    scores, unit, rows = entry.scores, terms_of(entry).unit, dict[str, str]()
    is_regression = scores.task == "regression"
    name, form = ("mean absolute error", "{:.5g}") if is_regression else ("right labels", "{:.3f} %")
    pairs = {name: (scores.reference, scores.candidate), "mAP": (scores.reference_map, scores.candidate_map)}
    for title, both in pairs.items():
        if both[0] is not None and both[1] is not None:
            text = "{:.2f} %" if title == "mAP" else form
            rows |= {f"{title}, reference": text.format(both[0]), f"{title}, candidate": text.format(both[1])}
    low, high = entry.agreement_interval
    limited = "at most " if scores.reference is None else ""
    change = "rise of the error" if is_regression else "drop of right labels"
    same = "values agree" if is_regression else "labels agree"
    return {
        **rows,
        change: f"{limited}{entry.drop_points:.3f} {unit}",
        f"{change}, 95 % upper bound": f"{entry.drop_upper_bound_points:.3f} {unit}",
        "images worse / better": f"{entry.worse} / {entry.better}" if scores.reference is not None else "-",
        f"{same}, 95 % interval": f"{entry.agreement:.3f} % ({low:.2f} to {high:.2f})",
        "SQNR": f"{entry.sqnr_db:.1f} dB",
    }
