"""How near two sets of answers are, and what a number of images can prove about it.

Drops are in percentage points, agreement in percent, SQNR in decibels. The accuracy claim is a one-sided 95 % upper
bound on the drop over paired images, right also where few or no answers differ: there a Wald interval would claim
certainty.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from vit_edge.errors import require

__all__ = [
    "CONFIDENCE",
    "Comparison",
    "Logits",
    "best_certifiable_points",
    "compare",
    "drop_upper_bound_points",
    "images_needed",
    "softmax",
    "sqnr_db",
]

Logits: TypeAlias = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

CONFIDENCE = 0.95
# The share of the nuisance rate's confidence interval that is left out, and added to the p-value instead.
_RULED_OUT = 1e-5
# Nobody labels more.
_MOST_IMAGES = 1_000_000
# What the bound is called wherever it is printed.
BOUND_METHOD = (
    "exact unconditional test, score-ordered (Tango 1998; Chan and Zhang 1999; Berger and Boos 1994), one-sided 95 %"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A candidate against its reference on the same labelled images."""

    images: int
    reference_top1: float
    candidate_top1: float
    worse: int
    better: int
    drop_points: float
    drop_upper_bound_points: float
    mcnemar_p: float
    changed: int
    agreement: float
    agreement_interval: tuple[float, float]
    sqnr_db: float


def sqnr_db(reference: Logits, candidate: Logits) -> float:
    """Return the signal to quantization noise ratio over all logits in dB; infinite where they are equal."""
    signal = np.asarray(reference, np.float64)
    noise_power = float(np.sum((signal - np.asarray(candidate, np.float64)) ** 2))
    signal_power = float(np.sum(signal**2))
    if noise_power == 0:
        return float("inf")
    return float("-inf") if signal_power == 0 else 10 * float(np.log10(signal_power / noise_power))


def softmax(logits_BK: Logits) -> Logits:
    """Return probabilities, float32, each row adding up to 1."""
    shifted = np.exp(logits_BK - logits_BK.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True), dtype=np.float32)


def compare(reference_BK: Logits, candidate_BK: Logits, labels_B: Indices) -> Comparison:
    """Return every paired figure of two sets of logits [images, classes] against labels [images]."""
    stats = _scipy_stats()
    images = len(labels_B)
    reference_right = reference_BK.argmax(axis=1) == labels_B
    candidate_right = candidate_BK.argmax(axis=1) == labels_B
    worse = int(np.sum(reference_right & ~candidate_right))
    better = int(np.sum(~reference_right & candidate_right))
    changed = int(np.sum(reference_BK.argmax(axis=1) != candidate_BK.argmax(axis=1)))
    interval = stats.binomtest(images - changed, images).proportion_ci(CONFIDENCE, method="exact")
    return Comparison(
        images=images,
        reference_top1=float(reference_right.mean() * 100),
        candidate_top1=float(candidate_right.mean() * 100),
        worse=worse,
        better=better,
        drop_points=(worse - better) / images * 100,
        drop_upper_bound_points=drop_upper_bound_points(images, worse=worse, better=better),
        mcnemar_p=float(stats.binomtest(worse, worse + better).pvalue) if worse + better else 1.0,
        changed=changed,
        agreement=(images - changed) / images * 100,
        agreement_interval=(float(interval.low) * 100, float(interval.high) * 100),
        sqnr_db=sqnr_db(reference_BK, candidate_BK),
    )


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
    """Return the smallest drop that this many images can certify: the bound where not one answer differs."""
    return float(1 - (1 - CONFIDENCE - _RULED_OUT) ** (1 / images)) * 100


def images_needed(images: int, *, worse: int, better: int, max_drop_points: float) -> int | None:
    """Return about how many images would certify `max_drop_points` at the rates seen, or None where none would."""
    if (worse - better) / images * 100 >= max_drop_points:
        return None

    def enough(number: int) -> bool:
        scale = number / images
        seen = round(worse * scale), round(better * scale)
        return _p_value(number, *seen, drop=max_drop_points / 100) <= 1 - CONFIDENCE

    few, many = images, images
    while not enough(many):
        few, many = many, many * 2
        if many > _MOST_IMAGES:
            return None
    while many - few > max(1, many // 100):  # to one percent: the rates themselves are known less well
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
    rates_R = np.linspace(min(low, high), high, 64)
    largest = 0.0
    for _ in range(2):
        tails_R = _tails(images, seen, drop, rates_R)
        best = int(tails_R.argmax())
        largest = max(largest, float(tails_R[best]))
        rates_R = np.linspace(rates_R[max(best - 1, 0)], rates_R[min(best + 1, len(rates_R) - 1)], 32)
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


def _scipy_stats() -> Any:
    return require("scipy.stats", extra="export", what="compute the accuracy bound")
