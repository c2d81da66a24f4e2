"""How much two networks differ that do not choose one class: labels that are decided each on its own, or values.

Each image gives two numbers in [0, 1]: the share of its labels that stay the same, and the share that is right; of a
regression one less the difference, and one less the error, as shares of the range of the reference's values. The mean
of such shares has a bound that holds for any number of images and any distribution (that of neighbours kept). Without
labels every change counts as lost: an error never rises by more than the values differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from vit_edge.export.verification.neighbours import Shares, images_needed_for_neighbours, mean_lower_bound
from vit_edge.metrics import CONFIDENCE, Comparison, Logits, sqnr_db

__all__ = [
    "SCORE_METHOD",
    "PairedScores",
    "ScoreTask",
    "Scores",
    "Truth",
    "best_certifiable_drop",
    "fewest_images_for_drop",
    "fewest_images_for_same",
    "pair_scores",
]

ScoreTask: TypeAlias = Literal["multi-label", "regression"]
Truth: TypeAlias = npt.NDArray[np.float64]

SCORE_METHOD = "betting (Waudby-Smith and Ramdas 2024) on the share of each image, one-sided 95 %"
# A value that moved by more than this share of the range counts as changed.
_MOVED = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """What the labels say of both networks, None without labels.

    Of several labels at once `reference` and `candidate` are the percentage of right decisions, and `reference_map` and
    `candidate_map` the mean average precision in percent. Of a regression they are the mean absolute error.
    """

    task: ScoreTask
    reference: float | None
    candidate: float | None
    reference_map: float | None = None
    candidate_map: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedScores:
    """Of each image the share that stays the same, and by how much the share that is wrong rises.

    Without labels it rises by all that changed. The images are in an order that is as good as shuffled.
    """

    same_B: Shares
    rise_B: Shares
    is_labelled: bool

    @property
    def kept(self) -> Shares:
        """Return shares whose mean falls as the share that is wrong rises."""
        return (1 - self.rise_B) / 2 if self.is_labelled else self.same_B

    def least_kept(self, max_drop_points: float) -> float:
        """Return the percentage of `kept` that stands for a drop."""
        return _least_kept(max_drop_points, is_labelled=self.is_labelled)

    @property
    def drop_upper_bound_points(self) -> float:
        """Return the one-sided 95 % upper bound of the rise in percentage points, none below zero."""
        low = mean_lower_bound(self.kept)
        return max(0.0, (1 - 2 * low if self.is_labelled else 1 - low) * 100)


def pair_scores(
    task: ScoreTask,
    reference_BK: Logits,
    candidate_BK: Logits,
    truth_BK: Truth | None,
    *,
    order: Sequence[int],
) -> tuple[Comparison, Scores, PairedScores]:
    """Return every paired figure of two sets of outputs [images, labels or values]; the bets go through `order`."""
    both = [np.asarray(side, np.float64) for side in (reference_BK, candidate_BK)]
    if task == "multi-label":
        both = [(side >= 0).astype(np.float64) for side in both]
        range_K: npt.NDArray[np.float64] = np.ones(both[0].shape[1])
    else:
        range_K = _range(both[0])
    changed_B = _off(both[0], both[1], range_K)
    losses = None if truth_BK is None else [_off(side, truth_BK, range_K) for side in both]
    rise_B = changed_B if losses is None else losses[1] - losses[0]
    paired = PairedScores(
        same_B=1 - changed_B[np.asarray(order)], rise_B=rise_B[np.asarray(order)], is_labelled=losses is not None
    )
    num_changed = int(np.sum(changed_B > (0 if task == "multi-label" else _MOVED)))
    figures = _comparison(paired, sqnr_db(reference_BK, candidate_BK), num_changed)
    return figures, _scores(task, (reference_BK, candidate_BK), both, truth_BK), paired


def best_certifiable_drop(images: int, *, is_labelled: bool) -> float:
    """Return the smallest drop in points that this many images can certify: the bound if nothing changes."""
    nothing_B = np.zeros(images)
    return PairedScores(same_B=nothing_B + 1, rise_B=nothing_B, is_labelled=is_labelled).drop_upper_bound_points


def fewest_images_for_drop(max_drop_points: float, *, is_labelled: bool) -> int | None:
    """Return about how many images certify a drop if nothing changes; None if over 100,000."""
    unchanged = np.full(1, 0.5 if is_labelled else 1.0)
    least = _least_kept(max_drop_points, is_labelled=is_labelled)
    return images_needed_for_neighbours(unchanged, min_neighbours=least)


def fewest_images_for_same(min_agreement: float) -> int | None:
    """Return about how many images certify a share that stays the same if nothing changes; None if over 100,000."""
    return images_needed_for_neighbours(np.ones(1), min_neighbours=min_agreement)


def _least_kept(max_drop_points: float, *, is_labelled: bool) -> float:
    return (100 - max_drop_points) / 2 if is_labelled else 100 - max_drop_points


def _range(values_BK: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the range of each output; one that is constant has its own size for it."""
    range_K = np.ptp(values_BK, axis=0)
    size_K = np.maximum(np.abs(values_BK).max(axis=0), np.finfo(np.float32).tiny)
    return np.asarray(np.where(range_K > 0, range_K, size_K), np.float64)


def _off(
    values_BK: npt.NDArray[np.float64], others_BK: npt.NDArray[np.float64], range_K: npt.NDArray[np.float64]
) -> Shares:
    """Return the mean difference of each image as a share of the range, one at most."""
    off_B: Shares = np.minimum(np.abs(values_BK - others_BK) / range_K, 1).mean(axis=1)
    return off_B


def _comparison(paired: PairedScores, level: float, num_changed: int) -> Comparison:
    same_B, rise_B = paired.same_B, paired.rise_B
    half = 1 - (1 - CONFIDENCE) / 2
    low, high = (mean_lower_bound(shares_B, confidence=half) for shares_B in (same_B, 1 - same_B))
    return Comparison(
        images=len(same_B),
        reference_top1=None,
        candidate_top1=None,
        reference_top5=None,
        candidate_top5=None,
        worse=int(np.sum(rise_B > 0)),
        better=int(np.sum(rise_B < 0)),
        unlabelled=0 if paired.is_labelled else num_changed,
        drop_points=float(rise_B.mean()) * 100,
        drop_upper_bound_points=paired.drop_upper_bound_points,
        mcnemar_p=None,
        num_changed=num_changed,
        agreement=float(same_B.mean()) * 100,
        agreement_interval=(low * 100, 100 - high * 100),
        agreement_lower_bound=mean_lower_bound(same_B) * 100,
        sqnr_db=level,
    )


def _scores(
    task: ScoreTask, outputs: Sequence[Logits], both: Sequence[npt.NDArray[np.float64]], truth_BK: Truth | None
) -> Scores:
    if truth_BK is None:
        return Scores(task=task, reference=None, candidate=None)
    if task == "regression":
        errors = [float(np.abs(side - truth_BK).mean()) for side in both]
        return Scores(task=task, reference=errors[0], candidate=errors[1])
    right = [float((side == truth_BK).mean() * 100) for side in both]
    precision = [_mean_average_precision(side, truth_BK) for side in outputs]
    return Scores(
        task=task,
        reference=right[0],
        candidate=right[1],
        reference_map=precision[0],
        candidate_map=precision[1],
    )


def _mean_average_precision(logits_BK: Logits, truth_BK: Truth) -> float | None:
    """Return the mean over the labels that occur of the average precision in percent; None if none occurs.

    Of a label it is the mean, over the images that have it, of the share of right ones among those ranked no lower.
    """
    found = []
    for logits_B, truth_B in zip(np.asarray(logits_BK).T, truth_BK.T, strict=True):
        if not truth_B.any():
            continue
        order_B = np.argsort(-logits_B, kind="stable")
        hits_B = truth_B[order_B]
        found.append(float((np.cumsum(hits_B) / np.arange(1, len(hits_B) + 1))[hits_B > 0].mean()))
    return float(np.mean(found)) * 100 if found else None
