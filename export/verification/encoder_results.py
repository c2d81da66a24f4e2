"""What a verification of an encoder found: verdict, figures of each engine, and the images whose vectors moved most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from vit_edge.export.verification.neighbours import EncoderComparison
from vit_edge.export.verification.results import Verification
from vit_edge.export.verification.verdict import SEVERITY, Certifiable, Verdict
from vit_edge.runtime.notebook import html_table

__all__ = ["AnyVerification", "EncoderResult", "EncoderVerification", "MovedImage"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MovedImage:
    """An image, the cosine similarity of both its vectors, and the percentage of its ten neighbours that are kept."""

    path: str
    pixels_sha256: str
    cosine: float
    kept_percent: float


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderResult(EncoderComparison):
    """Candidate against reference in one engine; `moved` are the images with the lowest cosine similarity."""

    engine: str
    verdict: Verdict
    images_needed: int | None
    moved: tuple[MovedImage, ...]


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class EncoderVerification:
    """The verdict over all engines (the worst of them), the accuracy budget, and the result of each engine.

    `near_copies` are images that look like a re-encoded calibration image.
    """

    verdict: Verdict
    max_drop_points: float | None
    min_neighbours: float | None
    certifiable: Certifiable
    labels: Literal["all", "none"]
    data: str
    data_sha256: str
    models_sha256: str
    near_copies: tuple[str, ...]
    results: tuple[EncoderResult, ...]

    @property
    def decisive(self) -> EncoderResult:
        """Return the result of the engine that decided the verdict: the worst one, then the fewest neighbours kept."""
        return max(self.results, key=lambda r: (SEVERITY[r.verdict], -r.kept.lower_bound))

    def __repr__(self) -> str:
        worst = self.decisive
        kept = f"{worst.kept.percent:.2f} % of {worst.kept.k} neighbours kept, at least {worst.kept.lower_bound:.2f}"
        return f"<EncoderVerification {self.verdict} on {worst.images} images in {worst.engine}: {kept}>"

    def _repr_html_(self) -> str:
        columns = ("engine", "verdict", "neighbours kept, k = 1", "k = 10", "95 % lower bound", "SQNR")
        rows = [
            (r.engine, r.verdict, f"{r.neighbours[0].percent:.2f} %", f"{r.kept.percent:.2f} %",
             f"{r.kept.lower_bound:.2f} %", f"{r.sqnr_db:.1f} dB")
            for r in self.results
        ]  # fmt: skip
        return html_table(f"{self.verdict} on {self.decisive.images} images", columns, rows)


# What `quantize` gives for a file: it depends on what the file is.
AnyVerification: TypeAlias = Verification | EncoderVerification
