"""How near two sets of logits are, and what a number of images can prove about it.

Drops are in percentage points, agreement in percent, SQNR in decibels. The accuracy claim is a one-sided 95 % upper
bound on the drop over paired images, right also where few or no answers differ: there a Wald interval would claim
certainty.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from vit_edge.errors import require

__all__ = [
    "CONFIDENCE",
    "NO_CLASS",
    "UNKNOWN",
    "Comparison",
    "Logits",
    "PairedAnswers",
    "activated",
    "agreement_lower_bound",
    "agreement_upper_bound",
    "best_certifiable_agreement",
    "best_certifiable_points",
    "compare",
    "compare_answers",
    "decibels",
    "drop_upper_bound_points",
    "fewest_images",
    "fewest_images_for_agreement",
    "images_needed",
    "images_needed_for_agreement",
    "join_answers",
    "pair_answers",
    "softmax",
    "sqnr_db",
]

Logits: TypeAlias = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

CONFIDENCE = 0.95
# Labels that are no class: not known, and known to be none of the network's.
UNKNOWN, NO_CLASS = -1, -2
TOP = 5
# The share of the nuisance rate's confidence interval that is left out, and added to the p-value instead.
_RULED_OUT = 1e-5
# More images are not labelled by hand.
_MOST_IMAGES = 1_000_000
# What the bounds are called wherever they are printed.
BOUND_METHOD = (
    "exact unconditional test, score-ordered (Tango 1998; Chan and Zhang 1999; Berger and Boos 1994), one-sided 95 %"
)
AGREEMENT_METHOD = "exact (Clopper and Pearson 1934), one-sided 95 %; its interval is two-sided"


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedAnswers:
    """What two networks predict for the same images, without the logits: 5,000 images of 1,000 classes take 0.5 MB.

    `reference_BT` and `candidate_BT` are the top classes (five, or all where there are fewer), the best first; a margin
    is the distance of the two largest logits.
    """

    reference_BT: Indices
    candidate_BT: Indices
    reference_margin_B: Floats
    candidate_margin_B: Floats
    num_classes: int
    signal_power: float
    noise_power: float

    @property
    def num_images(self) -> int:
        """Return how many images were classified."""
        return len(self.reference_BT)

    @property
    def changed(self) -> npt.NDArray[np.bool_]:
        """Return where the two predictions differ: only these images can change the accuracy."""
        return np.asarray(self.reference_BT[:, 0] != self.candidate_BT[:, 0])


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A candidate against its reference on the same images; None is what the labels do not show.

    `unlabelled` images changed their answer and have no label: they are counted among `worse`.
    """

    images: int
    reference_top1: float | None
    candidate_top1: float | None
    reference_top5: float | None
    candidate_top5: float | None
    worse: int
    better: int
    unlabelled: int
    drop_points: float
    drop_upper_bound_points: float
    mcnemar_p: float | None
    num_changed: int
    agreement: float
    agreement_interval: tuple[float, float]
    agreement_lower_bound: float
    sqnr_db: float


def sqnr_db(reference: Logits, candidate: Logits) -> float:
    """Return the signal to quantization noise ratio over all logits in dB; infinite where they are equal."""
    signal = np.asarray(reference, np.float64)
    noise_power = float(np.sum((signal - np.asarray(candidate, np.float64)) ** 2))
    return decibels(float(np.sum(signal**2)), noise_power)


def softmax(logits_BK: Logits) -> Logits:
    """Return probabilities, float32, each row adding up to 1."""
    shifted = np.exp(logits_BK - logits_BK.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True), dtype=np.float32)


def activated(logits_BK: Logits, activation: str) -> Logits:
    """Return what an activation of a manifest ("softmax", "sigmoid" or "none") makes of logits, float32."""
    if activation == "sigmoid":
        return np.asarray(0.5 * (1 + np.tanh(0.5 * logits_BK)), dtype=np.float32)
    return logits_BK if activation == "none" else softmax(logits_BK)


def pair_answers(reference_BK: Logits, candidate_BK: Logits) -> PairedAnswers:
    """Return what is kept of two sets of logits [images, classes]; equal logits count in the order of the classes."""
    reference, candidate = np.asarray(reference_BK, np.float64), np.asarray(candidate_BK, np.float64)
    (reference_BT, reference_margin_B), (candidate_BT, candidate_margin_B) = _top(reference), _top(candidate)
    return PairedAnswers(
        reference_BT=reference_BT,
        candidate_BT=candidate_BT,
        reference_margin_B=reference_margin_B,
        candidate_margin_B=candidate_margin_B,
        num_classes=reference.shape[1],
        signal_power=float(np.sum(reference**2)),
        noise_power=float(np.sum((reference - candidate) ** 2)),
    )


def join_answers(parts: Sequence[PairedAnswers]) -> PairedAnswers:
    """Return the predictions of all batches as one."""
    return PairedAnswers(
        reference_BT=np.concatenate([part.reference_BT for part in parts]),
        candidate_BT=np.concatenate([part.candidate_BT for part in parts]),
        reference_margin_B=np.concatenate([part.reference_margin_B for part in parts]),
        candidate_margin_B=np.concatenate([part.candidate_margin_B for part in parts]),
        num_classes=parts[0].num_classes,
        signal_power=sum(part.signal_power for part in parts),
        noise_power=sum(part.noise_power for part in parts),
    )


def compare(reference_BK: Logits, candidate_BK: Logits, labels_B: Indices) -> Comparison:
    """Return every paired figure of two sets of logits [images, classes] against labels [images]."""
    return compare_answers(pair_answers(reference_BK, candidate_BK), labels_B)


def compare_answers(answers: PairedAnswers, labels_B: Indices) -> Comparison:
    """Return every paired figure of two sets of logits; a label is a class, UNKNOWN, or NO_CLASS.

    The drop needs the labels of the changed images only: where both answer the same, both are right or both are wrong.
    A changed image whose label is UNKNOWN counts as if the reference were right.
    """
    stats, images, changed_B = _scipy_stats(), answers.num_images, answers.changed
    unknown_B = changed_B & (labels_B == UNKNOWN)
    worse = int(np.sum(changed_B & (answers.reference_BT[:, 0] == labels_B))) + int(unknown_B.sum())
    better = int(np.sum(changed_B & (answers.candidate_BT[:, 0] == labels_B)))
    unlabelled, num_same = int(unknown_B.sum()), images - int(changed_B.sum())
    interval = stats.binomtest(num_same, images).proportion_ci(CONFIDENCE, method="exact")
    mcnemar_p = float(stats.binomtest(worse, worse + better).pvalue) if worse + better else 1.0
    return Comparison(
        images=images,
        reference_top1=_share_right(answers.reference_BT[:, :1], labels_B),
        candidate_top1=_share_right(answers.candidate_BT[:, :1], labels_B),
        reference_top5=_share_right(answers.reference_BT, labels_B) if answers.num_classes > TOP else None,
        candidate_top5=_share_right(answers.candidate_BT, labels_B) if answers.num_classes > TOP else None,
        worse=worse,
        better=better,
        unlabelled=unlabelled,
        drop_points=(worse - better) / images * 100,
        drop_upper_bound_points=drop_upper_bound_points(images, worse=worse, better=better),
        mcnemar_p=None if unlabelled else mcnemar_p,
        num_changed=images - num_same,
        agreement=num_same / images * 100,
        agreement_interval=(float(interval.low) * 100, float(interval.high) * 100),
        agreement_lower_bound=agreement_lower_bound(images, changed=images - num_same),
        sqnr_db=decibels(answers.signal_power, answers.noise_power),
    )


def agreement_lower_bound(images: int, *, changed: int) -> float:
    """Return the one-sided 95 % lower bound of the agreement in percent (Clopper and Pearson, Biometrika 26, 1934)."""
    test = _scipy_stats().binomtest(images - changed, images, alternative="greater")
    return float(test.proportion_ci(CONFIDENCE, method="exact").low) * 100


def agreement_upper_bound(images: int, *, changed: int) -> float:
    """Return the one-sided 95 % upper bound of the agreement in percent, by the same method."""
    test = _scipy_stats().binomtest(images - changed, images, alternative="less")
    return float(test.proportion_ci(CONFIDENCE, method="exact").high) * 100


def drop_upper_bound_points(images: int, *, worse: int, better: int, confidence: float = CONFIDENCE) -> float:
    """Return the one-sided upper confidence bound on the accuracy drop over paired images, in percentage points.

    `worse` images lost their right answer, `better` gained it. The bound is the largest drop that the exact test does
    not reject: outcomes are ordered by Tango's score (Statistics in Medicine 17, 1998), the probability is that of the
    trinomial, at its largest over the nuisance parameter (Chan and Zhang, Biometrics 55, 1999). With no discordant
    image it is 1 - 0.05^(1/images): 0.54 points for 550.
    """
    if images < 1 or min(worse, better) < 0 or worse + better > images:
        raise ValueError(f"{worse} worse and {better} better of {images} images is not possible")
    low, high = max((worse - better) / images, 0.0), 1.0
    if worse == images:
        return 100.0
    # A drop below zero is no claim that anyone needs: the bound is sought from no drop upwards.
    if low == 0.0 and _p_value(images, worse, better, drop=0.0) <= 1 - confidence:
        return 0.0
    for _ in range(26):  # to 1e-8, far below one image
        middle = (low + high) / 2
        if _p_value(images, worse, better, drop=middle) > 1 - confidence:
            low = middle
        else:
            high = middle
    return high * 100


def best_certifiable_points(images: int) -> float:
    """Return the smallest drop that this many images can certify: the bound if no prediction differs."""
    return float(1 - (1 - CONFIDENCE - _RULED_OUT) ** (1 / images)) * 100


def best_certifiable_agreement(images: int) -> float:
    """Return the largest agreement in percent that this many images can certify: the bound where none differs."""
    return agreement_lower_bound(images, changed=0)


def fewest_images(*, max_drop_points: float) -> int | None:
    """Return how many images certify a drop if no prediction differs; None if it is over a million."""
    return _fewest(lambda images: best_certifiable_points(images) <= max_drop_points)


def fewest_images_for_agreement(min_agreement: float) -> int | None:
    """Return how many images certify an agreement if no prediction differs; None if no number does."""
    return _fewest(lambda images: best_certifiable_agreement(images) >= min_agreement)


def images_needed(images: int, *, worse: int, better: int, max_drop_points: float) -> int | None:
    """Return about how many images would certify `max_drop_points` at the rates seen, or None where none would."""
    if (worse - better) / images * 100 >= max_drop_points:
        return None
    if worse + better == 0:
        return fewest_images(max_drop_points=max_drop_points)

    def enough(number: int) -> bool:
        scale = number / images
        seen = round(worse * scale), round(better * scale)
        return _p_value(number, *seen, drop=max_drop_points / 100) <= 1 - CONFIDENCE

    # To one percent: the rates themselves are known less well.
    return _fewest(enough, start=images, precision=0.01)


def images_needed_for_agreement(images: int, *, changed: int, min_agreement: float) -> int | None:
    """Return about how many images would certify `min_agreement` at the rate seen, or None where none would."""
    if (images - changed) / images * 100 <= min_agreement:
        return None
    if changed == 0:
        return fewest_images_for_agreement(min_agreement)

    def enough(number: int) -> bool:
        return agreement_lower_bound(number, changed=round(changed * number / images)) >= min_agreement

    return _fewest(enough, start=images, precision=0.01)


def _fewest(enough: Callable[[int], bool], *, start: int = 1, precision: float = 0.0) -> int | None:
    """Return the smallest number from `start` that is enough, to a share of it; None where it is over a million."""
    few, many = start - 1, start
    while not enough(many):
        few, many = many, many * 2
        if many > _MOST_IMAGES:
            return None
    while many - few > max(1, int(many * precision)):
        middle = (few + many) // 2
        few, many = (few, middle) if enough(middle) else (middle, many)
    return many


def _p_value(images: int, worse: int, better: int, *, drop: float) -> float:
    """Return the exact p-value of "the drop is at least `drop`": small where what was seen speaks against it.

    It is the largest probability, over the nuisance rate of gains, of an outcome as favourable as the one seen. The
    rate is confined to its 99.999 % confidence interval and the rest added (Berger and Boos, JASA 89, 1994): rates that
    the counts rule out would only widen the bound.
    """
    seen = float(_score(images, worse, better, drop))
    interval = _scipy_stats().binomtest(better, images).proportion_ci(1 - _RULED_OUT, method="exact")
    low, high = float(interval.low), min(float(interval.high), (1 - drop) / 2)
    rates_R = np.linspace(min(low, high), high, 64, dtype=np.float64)
    largest = 0.0
    for _ in range(2):
        tails_R = _tails(images, seen, drop, rates_R)
        best = int(np.argmax(tails_R))
        largest = max(largest, float(tails_R[best]))
        ends = rates_R[max(best - 1, 0)], rates_R[min(best + 1, len(rates_R) - 1)]
        rates_R = np.linspace(*ends, 32, dtype=np.float64)
    return largest + _RULED_OUT


def _tails(images: int, seen: float, drop: float, gain_rates_R: Floats) -> Floats:
    """Return, for each rate of gains, the probability of an outcome whose score is at most `seen`."""
    binom = _scipy_stats().binom
    gain_rates_R1 = gain_rates_R[:, None]
    loss_rates_R1 = np.minimum(drop + gain_rates_R1, 1.0)
    losses_RL = _likely(images, loss_rates_R1)
    needed_RL = _gains_needed(images, losses_RL, drop, seen)
    rest_R1 = 1 - loss_rates_R1
    given_R1 = np.divide(gain_rates_R1, rest_R1, out=np.zeros_like(rest_R1), where=rest_R1 > 0).clip(0, 1)
    favourable_RL = binom.sf(needed_RL - 1, np.maximum(images - losses_RL, 0), given_R1)
    tails_R: Floats = (binom.pmf(losses_RL, images, loss_rates_R1) * favourable_RL).sum(axis=1)
    return tails_R


def _likely(images: int, rates_R1: Floats) -> Indices:
    """Return a row of counts for each rate; outside of it a binomial has less than 1e-12 of its probability."""
    spread_R1 = 8 * np.sqrt(images * rates_R1 * (1 - rates_R1)) + 12
    first_R1 = np.maximum(images * rates_R1 - spread_R1, 0).astype(np.int64)
    length = min(images, int(2 * spread_R1.max()) + 1) + 1
    counts_RL: Indices = first_R1 + np.arange(length)  # counts over `images` have probability zero
    return counts_RL


def _gains_needed(images: int, losses_RL: Indices, drop: float, seen: float) -> Indices:
    """Return, for each count of losses, the fewest gains whose score is as favourable as the one seen."""
    low, high = np.zeros_like(losses_RL), np.maximum(images - losses_RL + 1, 0)  # high: not even all others would do
    while np.any(low < high):
        middle = (low + high) // 2
        enough = _score(images, losses_RL, middle, drop) <= seen + 1e-9
        searching = low < high
        low, high = np.where(searching & ~enough, middle + 1, low), np.where(searching & enough, middle, high)
    return low


def _score(images: int, losses: Any, gains: Any, drop: float) -> Any:
    """Return Tango's score statistic for the hypothesis that the drop is `drop`; smaller speaks for a smaller drop."""
    b = -(losses + gains) + (2 * images - losses + gains) * drop
    c = -gains * drop * (1 - drop)
    gain_rate = (np.sqrt(np.maximum(b * b - 8 * images * c, 0)) - b) / (4 * images)
    variance = images * (2 * gain_rate + drop * (1 - drop))
    difference = losses - gains - images * drop
    return difference / np.sqrt(np.maximum(variance, 1e-12))


def _top(logits_BK: Floats) -> tuple[Indices, Floats]:
    """Return the top classes, the best first, and the distance of the first two (infinite where there is one class)."""
    order_BT: Indices = np.argsort(-logits_BK, axis=1, kind="stable")[:, :TOP]
    best_B2 = np.take_along_axis(logits_BK, order_BT[:, :2], axis=1)
    margin_B = best_B2[:, 0] - best_B2[:, 1] if best_B2.shape[1] > 1 else np.full(len(best_B2), np.inf)
    return order_BT, margin_B


def _share_right(answers_BT: Indices, labels_B: Indices) -> float | None:
    """Return the percentage of images whose label is among the predictions; None if a label is not known."""
    if (labels_B == UNKNOWN).any():
        return None
    return float((answers_BT == labels_B[:, None]).any(axis=1).mean() * 100)


def decibels(signal_power: float, noise_power: float) -> float:
    """Return a ratio of powers in dB; infinite where there is no noise."""
    if noise_power == 0:
        return float("inf")
    return float("-inf") if signal_power == 0 else 10 * float(np.log10(signal_power / noise_power))


def _scipy_stats() -> Any:
    return require("scipy.stats", extra="export", what="compute the accuracy bound")
