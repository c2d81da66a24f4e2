"""When a candidate is accepted: the one place that turns figures into `pass`, `fail` or `inconclusive`.

A point estimate never passes: only a bound at 95 % confidence does. Each criterion has to hold in each engine, so
that the whole keeps its 5 % (an intersection-union test: Berger, Technometrics 24, 1982).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from vit_edge.errors import UsageError, require
from vit_edge.export.verification.neighbours import (
    EncoderComparison,
    Shares,
    best_certifiable_neighbours,
    fewest_images_for_neighbours,
    images_needed_for_neighbours,
    mean_lower_bound,
)
from vit_edge.export.verification.scores import (
    PairedScores,
    best_certifiable_drop,
    fewest_images_for_drop,
    fewest_images_for_same,
)
from vit_edge.metrics import (
    CONFIDENCE,
    UNKNOWN,
    Comparison,
    Logits,
    agreement_upper_bound,
    best_certifiable_agreement,
    best_certifiable_points,
    compare,
    fewest_images,
    fewest_images_for_agreement,
    images_needed,
    images_needed_for_agreement,
)

__all__ = [
    "SEVERITY",
    "Budget",
    "Certifiable",
    "Verdict",
    "certifiable",
    "certifiable_scores",
    "decide",
    "decide_encoder",
    "decide_from_logits",
    "decide_scores",
]

Verdict = Literal["pass", "fail", "inconclusive"]
SEVERITY: dict[Verdict, int] = {"pass": 0, "inconclusive": 1, "fail": 2}
# 0.01 points need 30,000 images of which not one changes.
_SMALLEST_DROP_POINTS = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """The accuracy budget: points of top-1 that may be lost, percent of predictions that must stay; None: no limit.

    Of an encoder it is the percentage of neighbours that must stay, and the points of k-NN accuracy that may be lost.
    """

    max_drop_points: float | None = None
    min_agreement: float | None = None
    min_neighbours: float | None = None

    def __post_init__(self) -> None:
        drop, agreement = self.max_drop_points, self.min_agreement
        if drop is None and agreement is None and self.min_neighbours is None:
            remedy = "give a max drop, a min agreement or, for an encoder, min neighbours"
            raise UsageError("cannot verify", reason="there is no accuracy budget", remedy=remedy)
        if drop is not None and not _SMALLEST_DROP_POINTS <= drop < 100:
            raise UsageError("cannot verify", reason=f"max drop is {drop}", remedy="give 0.01 to 100 points")
        if agreement is not None and not 0 <= agreement <= 100:
            raise UsageError("cannot verify", reason=f"min agreement is {agreement}", remedy="give 0 to 100 percent")
        if self.min_neighbours is not None and not 0 <= self.min_neighbours <= 100:
            reason = f"min neighbours is {self.min_neighbours}"
            raise UsageError("cannot verify", reason=reason, remedy="give 0 to 100 percent")


@dataclass(frozen=True, kw_only=True, slots=True)
class Certifiable:
    """What this many images can certify if no prediction changes: the smallest drop, the highest agreement.

    With `too_few` even an unchanged model cannot pass; it takes at least `images_needed` (None: no number suffices).
    """

    images: int
    best_points: float
    best_agreement: float
    best_neighbours: float
    too_few: bool
    images_needed: int | None


def certifiable(images: int, budget: Budget) -> Certifiable:
    """Return what a verification on this many images can certify, before any of them is run."""
    enough = [
        _enough_for_drop(images, budget),
        _enough_for_agreement(images, budget),
        _enough_for_neighbours(images, budget),
    ]
    return Certifiable(
        images=images,
        best_points=best_certifiable_points(images),
        best_agreement=best_certifiable_agreement(images),
        best_neighbours=best_certifiable_neighbours(images),
        too_few=not all(enough),
        images_needed=_fewest(budget),
    )


def certifiable_scores(images: int, budget: Budget, *, is_labelled: bool) -> Certifiable:
    """Return what a verification of a network that does not choose one class can certify on this many images."""
    drop, agreement = budget.max_drop_points, budget.min_agreement
    best_points = best_certifiable_drop(images, is_labelled=is_labelled)
    best_agreement = best_certifiable_neighbours(images)
    fewest = [] if drop is None else [fewest_images_for_drop(drop, is_labelled=is_labelled)]
    fewest += [] if agreement is None else [fewest_images_for_same(agreement)]
    known = [number for number in fewest if number is not None]
    too_few = (drop is not None and best_points > drop) or (agreement is not None and best_agreement < agreement)
    return Certifiable(
        images=images,
        best_points=best_points,
        best_agreement=best_agreement,
        best_neighbours=best_agreement,
        too_few=too_few,
        images_needed=max(known) if len(known) == len(fewest) else None,
    )


def decide(found: Comparison, budget: Budget) -> tuple[Verdict, int | None]:
    """Return the verdict, and how many images would pass at the measured rates (None: unknown, or no number would).

    The verdict is `pass` if the bounds are within the budget, and `fail` if the measured figures are not. With too few
    images for any pass, it is `fail` only if the loss itself is certain, and else `inconclusive`.
    """
    return _together([_decide_drop(found, budget), _decide_agreement(found, budget)])


def decide_encoder(found: EncoderComparison, kept_B: Shares, budget: Budget) -> tuple[Verdict, int | None]:
    """Return the verdict on an encoder, and how many images would pass at the measured rates, by the same rules.

    `kept_B` is the share of its neighbours that each image keeps.
    """
    decided = [_decide_neighbours(kept_B, budget)]
    if found.knn is not None:
        decided.append(_decide_drop(found.knn, budget))
    return _together(decided)


def decide_scores(paired: PairedScores, budget: Budget) -> tuple[Verdict, int | None]:
    """Return the verdict on networks that do not choose one class, and how many images would pass, by the same rules.

    Without labels a change may be a gain as well: the drop cannot fail then.
    """
    decided: list[tuple[Verdict, int | None]] = []
    if budget.max_drop_points is not None:
        least, best = paired.least_kept(budget.max_drop_points), 0.5 if paired.is_labelled else 1.0
        decided.append(_decide_mean(paired.kept, least, best=best, may_fail=paired.is_labelled))
    if budget.min_agreement is not None:
        decided.append(_decide_mean(paired.same_B, budget.min_agreement))
    return _together(decided)


def _together(decided: Sequence[tuple[Verdict, int | None]]) -> tuple[Verdict, int | None]:
    verdict = max((verdict for verdict, _ in decided), key=SEVERITY.__getitem__)
    open_ = [needed for kind, needed in decided if kind == "inconclusive"]
    if verdict != "inconclusive" or None in open_:
        return verdict, None
    return verdict, max(needed for needed in open_ if needed is not None)


def decide_from_logits(
    reference_BK: Logits,
    candidate_BK: Logits,
    labels_B: npt.NDArray[np.int64] | None,
    *,
    max_drop_points: float | None = None,
    min_agreement: float | None = None,
) -> tuple[Verdict, Comparison, int | None]:
    """Return verdict, figures and the number of images needed for two sets of logits [images, classes].

    Without labels each changed prediction counts as lost.
    """
    labels = np.full(len(reference_BK), UNKNOWN, dtype=np.int64) if labels_B is None else labels_B
    found = compare(reference_BK, candidate_BK, labels)
    verdict, needed = decide(found, Budget(max_drop_points=max_drop_points, min_agreement=min_agreement))
    return verdict, found, needed


def _decide_drop(found: Comparison, budget: Budget) -> tuple[Verdict, int | None]:
    limit = budget.max_drop_points
    if limit is None or found.drop_upper_bound_points <= limit:
        return "pass", None
    # Images without a label were counted as lost; a failure must hold for any labels.
    worse, better = found.worse - found.unlabelled, found.better + found.unlabelled
    enough = _enough_for_drop(found.images, budget)
    if (worse - better) / found.images * 100 > limit and (enough or _surely_lost(worse, better)):
        return "fail", None
    at_rates = images_needed(found.images, worse=found.worse, better=found.better, max_drop_points=limit)
    if enough:
        return "inconclusive", None if found.unlabelled else at_rates
    fewest = fewest_images(max_drop_points=limit)
    return "inconclusive", fewest if found.unlabelled or at_rates is None else at_rates


def _decide_agreement(found: Comparison, budget: Budget) -> tuple[Verdict, int | None]:
    limit = budget.min_agreement
    if limit is None or found.agreement_lower_bound >= limit:
        return "pass", None
    enough = _enough_for_agreement(found.images, budget)
    surely = agreement_upper_bound(found.images, changed=found.num_changed) < limit
    if found.agreement < limit and (enough or surely):
        return "fail", None
    at_rate = images_needed_for_agreement(found.images, changed=found.num_changed, min_agreement=limit)
    return "inconclusive", at_rate if enough or at_rate is not None else fewest_images_for_agreement(limit)


def _decide_neighbours(kept_B: Shares, budget: Budget) -> tuple[Verdict, int | None]:
    limit = budget.min_neighbours
    return ("pass", None) if limit is None else _decide_mean(kept_B, limit)


def _decide_mean(
    shares_B: Shares, limit: float, *, best: float = 1.0, may_fail: bool = True
) -> tuple[Verdict, int | None]:
    """Decide whether the mean of shares is at least `limit` percent; `best` is the share of an unchanged image."""
    if mean_lower_bound(shares_B) * 100 >= limit:
        return "pass", None
    enough = mean_lower_bound(np.full(len(shares_B), best)) * 100 >= limit
    surely = 100 - mean_lower_bound(1 - shares_B) * 100 < limit
    if may_fail and shares_B.mean() * 100 < limit and (enough or surely):
        return "fail", None
    at_rate = images_needed_for_neighbours(shares_B, min_neighbours=limit)
    fewest = images_needed_for_neighbours(np.full(1, best), min_neighbours=limit)
    return "inconclusive", at_rate if enough or at_rate is not None else fewest


def _enough_for_drop(images: int, budget: Budget) -> bool:
    return budget.max_drop_points is None or best_certifiable_points(images) <= budget.max_drop_points


def _enough_for_agreement(images: int, budget: Budget) -> bool:
    return budget.min_agreement is None or best_certifiable_agreement(images) >= budget.min_agreement


def _enough_for_neighbours(images: int, budget: Budget) -> bool:
    return budget.min_neighbours is None or best_certifiable_neighbours(images) >= budget.min_neighbours


def _surely_lost(worse: int, better: int) -> bool:
    """Return whether McNemar's exact test, one-sided, says that correct predictions were lost at all."""
    stats = require("scipy.stats", extra="export", what="verify")
    return bool(stats.binomtest(worse, worse + better, alternative="greater").pvalue <= 1 - CONFIDENCE)


def _fewest(budget: Budget) -> int | None:
    """Return the fewest images with which an unchanged model would pass."""
    fewest = []
    if budget.max_drop_points is not None:
        fewest.append(fewest_images(max_drop_points=budget.max_drop_points))
    if budget.min_agreement is not None:
        fewest.append(fewest_images_for_agreement(budget.min_agreement))
    if budget.min_neighbours is not None:
        fewest.append(fewest_images_for_neighbours(budget.min_neighbours))
    known = [number for number in fewest if number is not None]
    return max(known) if len(known) == len(fewest) else None
