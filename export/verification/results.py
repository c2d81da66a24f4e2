"""What a verification found: verdict, figures of each engine, classes that lost, changed predictions."""

from __future__ import annotations

from dataclasses import dataclass

from vit_edge.export.verification.flips import Change
from vit_edge.export.verification.request import Labels
from vit_edge.export.verification.scores import Scores
from vit_edge.export.verification.verdict import SEVERITY, Certifiable, Verdict
from vit_edge.metrics import Comparison
from vit_edge.runtime.notebook import html_table

__all__ = ["ClassLoss", "EngineResult", "Verification"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassLoss:
    """A class that lost correct predictions; the counts of its images are None unless all images are labelled."""

    label: str
    lost: int
    images: int | None
    reference_right: int | None
    candidate_right: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineResult(Comparison):
    """Candidate against reference in one engine; shares are in percent, drops in percentage points.

    A network that does not choose one class has `scores`. Its agreement is the share of labels that stay the same, or
    100 less the mean difference of the values in percent of their range; its drop is that of right labels, or the rise
    of the error; `worse` and `better` count images.
    """

    engine: str
    verdict: Verdict
    images_needed: int | None
    worst_classes: tuple[ClassLoss, ...]
    changed: tuple[Change, ...]
    scores: Scores | None = None


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Verification:
    """The verdict over all engines (the worst of them), the accuracy budget, and the result of each engine.

    `labels` says whether all images have a label, only those in a flips file, or none: without a label a changed
    prediction counts as lost. `near_copies` are images that look like a re-encoded calibration image.
    """

    verdict: Verdict
    max_drop_points: float | None
    min_agreement: float | None
    certifiable: Certifiable
    labels: Labels
    data: str
    data_sha256: str
    models_sha256: str
    near_copies: tuple[str, ...]
    results: tuple[EngineResult, ...]

    @property
    def decisive(self) -> EngineResult:
        """Return the result of the engine that decided the verdict: the worst one, then the largest bound."""
        return max(self.results, key=lambda r: (SEVERITY[r.verdict], r.drop_upper_bound_points, r.num_changed))

    def __repr__(self) -> str:
        worst = self.decisive
        drop = f"drop {worst.drop_points:.2f} points, at most {worst.drop_upper_bound_points:.2f}"
        what = f"{self.verdict} on {worst.images} images in {worst.engine}"
        return f"<Verification {what}: {drop}, agreement {worst.agreement:.2f} %>"

    def _repr_html_(self) -> str:
        columns = ("engine", "verdict", "drop, points", "95 % upper bound", "agreement", "SQNR")
        rows = [
            (r.engine, r.verdict, f"{r.drop_points:.2f}", f"{r.drop_upper_bound_points:.2f}", f"{r.agreement:.2f} %",
             f"{r.sqnr_db:.1f} dB")
            for r in self.results
        ]  # fmt: skip
        return html_table(f"{self.verdict} on {self.decisive.images} images", columns, rows)

    @property
    def num_unlabelled(self) -> int:
        """Return how many distinct images changed their prediction in any engine and have no label."""
        return len({change.pixels_sha256 for r in self.results for change in r.changed if change.label is None})

    @property
    def num_changed(self) -> int:
        """Return how many distinct images changed their prediction in any engine."""
        return len({change.pixels_sha256 for r in self.results for change in r.changed})
