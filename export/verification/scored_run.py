"""A network of several labels at once, or of values, against its reference: both run on the same images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import cast

import numpy as np

from vit_edge.errors import printable
from vit_edge.export.verification.flips import Change, class_titles
from vit_edge.export.verification.paired_run import EvaluatedImages
from vit_edge.export.verification.request import VerificationRequest
from vit_edge.export.verification.results import ClassLoss, EngineResult
from vit_edge.export.verification.scores import ScoreTask, pair_scores
from vit_edge.export.verification.verdict import decide_scores
from vit_edge.metrics import Logits
from vit_edge.progress import Progress

__all__ = ["ScoredRun", "run_scored", "scored_result"]

_NUM_NAMED = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredRun(EvaluatedImages):
    """The outputs of both models in one engine, and the images that they belong to."""

    engine: str
    reference_BK: Logits
    candidate_BK: Logits

    @property
    def shuffled(self) -> list[int]:
        """Return an order of the images that has nothing to do with what they show: that of their hashes."""
        return sorted(range(len(self.hashes)), key=self.hashes.__getitem__)


def run_scored(request: VerificationRequest, engine: str, progress: Progress) -> ScoredRun:
    """Return what both models of a request give in one engine; raises as `run_both` does."""
    reference = request.reference_run
    pairs = reference.outputs(request.model, engine=engine, progress=progress, candidate=request.open_candidate)
    before, after = zip(*pairs, strict=True)
    known = {field.name: getattr(reference.evaluated, field.name) for field in fields(EvaluatedImages)}
    return ScoredRun(**known, engine=engine, reference_BK=np.concatenate(before), candidate_BK=np.concatenate(after))


def scored_result(run: ScoredRun, request: VerificationRequest) -> EngineResult:
    """Return verdict and figures of one engine."""
    manifest = request.reference.manifest
    task, titles = cast("ScoreTask", manifest.task), class_titles(manifest.labels)
    found, scores, paired = pair_scores(task, run.reference_BK, run.candidate_BK, run.truth_BK, order=run.shuffled)
    verdict, needed = decide_scores(paired, request.budget)
    changes = _changed_labels(run, titles) if task == "multi-label" else _moved_values(run, titles)
    return EngineResult(
        **{field.name: getattr(found, field.name) for field in fields(found)},
        engine=run.engine,
        verdict=verdict,
        images_needed=needed,
        worst_classes=_worst_labels(run, titles) if task == "multi-label" else (),
        changed=tuple(changes),
        scores=scores,
    )


def _changed_labels(run: ScoredRun, titles: Sequence[str]) -> Iterator[Change]:
    """Yield every image of which a label changed; a margin is the least distance from a change."""
    before_BK, after_BK = run.reference_BK >= 0, run.candidate_BK >= 0
    for i in np.flatnonzero((before_BK != after_BK).any(axis=1)):
        truth_K = None if run.truth_BK is None else run.truth_BK[i] > 0
        yield _change(
            run,
            int(i),
            [_named(side_BK[i], titles) for side_BK in (before_BK, after_BK)],
            margins=[float(np.abs(side_BK[i]).min()) for side_BK in (run.reference_BK, run.candidate_BK)],
            label=None if truth_K is None else _named(truth_K, titles),
            rise=0 if truth_K is None else int(np.sum(after_BK[i] != truth_K)) - int(np.sum(before_BK[i] != truth_K)),
        )


def _moved_values(run: ScoredRun, titles: Sequence[str]) -> Iterator[Change]:
    """Yield the images whose values moved most."""
    off_B = np.abs(run.candidate_BK - run.reference_BK).mean(axis=1)
    for i in np.argsort(-off_B, kind="stable")[:_NUM_NAMED]:
        truth_K = None if run.truth_BK is None else run.truth_BK[i]
        errors = [0.0 if truth_K is None else float(np.abs(side_BK[i] - truth_K).mean())
                  for side_BK in (run.reference_BK, run.candidate_BK)]  # fmt: skip
        yield _change(
            run,
            int(i),
            [_valued(side_BK[i], titles) for side_BK in (run.reference_BK, run.candidate_BK)],
            margins=[0.0, 0.0],
            label=None if truth_K is None else _valued(truth_K, titles),
            rise=errors[1] - errors[0],
        )


def _change(
    run: ScoredRun, i: int, texts: Sequence[str], *, margins: Sequence[float], label: str | None, rise: float
) -> Change:
    effect = None if label is None else "worse" if rise > 0 else "better" if rise < 0 else "neither"
    return Change(
        path=printable(run.paths[i]),
        pixels_sha256=run.hashes[i],
        reference=texts[0],
        candidate=texts[1],
        reference_margin=margins[0],
        candidate_margin=margins[1],
        label=label,
        effect=effect,  # type: ignore[arg-type]
    )


def _named(present_K: Sequence[bool], titles: Sequence[str]) -> str:
    return ", ".join(title for title, is_present in zip(titles, present_K, strict=True) if is_present) or "none"


def _valued(values_K: Sequence[float], titles: Sequence[str]) -> str:
    if len(titles) == 1:
        return f"{values_K[0]:.5g}"
    return ", ".join(f"{title} {value:.5g}" for title, value in zip(titles, values_K, strict=True))


def _worst_labels(run: ScoredRun, titles: Sequence[str]) -> tuple[ClassLoss, ...]:
    """Return the labels that lost right decisions, those that lost most first; `images` are those that have it."""
    if run.truth_BK is None:
        return ()
    right = [((side_BK >= 0) == (run.truth_BK > 0)).sum(axis=0) for side_BK in (run.reference_BK, run.candidate_BK)]
    lost_K, having_K = right[0] - right[1], (run.truth_BK > 0).sum(axis=0)
    worst = [int(k) for k in np.argsort(-lost_K, kind="stable")[:_NUM_NAMED] if lost_K[k] > 0]
    return tuple(
        ClassLoss(
            label=titles[k],
            lost=int(lost_K[k]),
            images=int(having_K[k]),
            reference_right=int(right[0][k]),
            candidate_right=int(right[1][k]),
        )
        for k in worst
    )
