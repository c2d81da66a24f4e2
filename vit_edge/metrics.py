"""How near two sets of answers are, and what a number of images can prove about it.

Drops are in percentage points, agreement in percent, SQNR in decibels. The accuracy claim is a one-sided 95 % upper
bound on the drop over paired images,
exact also where few or no answers differ: there a Wald interval would
claim certainty.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vit_edge.errors import require

__all__ = [
    "CONFIDENCE",
    "Comparison",
    "agreement_percent",
    "best_certifiable_points",
    "compare",
    "drop_upper_bound_points",
    "images_needed",
    "softmax",
    "sqnr_db",
    "top1_percent",
]

Logits = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

CONFIDENCE = 0.95
# What the bound is called wherever it is printed.
BOUND_METHOD = "exact unconditional, score-ordered (Tango 1998; Chan and Zhang 1999), one-sided 95 %"


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


def top1_percent(logits_BK: Logits, labels_B: Indices) -> float:
    """Return the share of images whose largest logit is the label, in percent."""
    return float(np.mean(logits_BK.argmax(axis=1) == labels_B) * 100)


def agreement_percent(reference_BK: Logits, candidate_BK: Logits) -> float:
    """Return the share of images on which both give the same answer, in percent."""
    return float(np.mean(reference_BK.argmax(axis=1) == candidate_BK.argmax(axis=1)) * 100)


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
    if low == 0.0 and _tail(images, worse, better, drop=0.0) <= 1 - confidence:
        return 0.0
    for _ in range(26):  # to 1e-8, far below one image
        middle = (low + high) / 2
        if _tail(images, worse, better, drop=middle) > 1 - confidence:
            low = middle
        else:
            high = middle
    return high * 100


def best_certifiable_points(images: int) -> float:
    """Return the smallest drop that this many images can certify: the bound where not one answer differs."""
    return float(1 - (1 - CONFIDENCE) ** (1 / images)) * 100


def images_needed(images: int, *, worse: int, better: int, max_drop_points: float) -> int | None:
    """Return about how many images would certify `max_drop_points` at the rates seen, or None where none would."""
    if (worse - better) / images * 100 >= max_drop_points:
        return None
    few, many = images, images
    while _bound_scaled(many, images, worse, better) > max_drop_points:
        few, many = many, many * 2
        if many > 10_000_000:
            return None
    while many - few > max(1, many // 100):  # to one percent: the rates themselves are known less well
        middle = (few + many) // 2
        if _bound_scaled(middle, images, worse, better) > max_drop_points:
            few = middle
        else:
            many = middle
    return many


def _bound_scaled(target: int, images: int, worse: int, better: int) -> float:
    scale = target / images
    return drop_upper_bound_points(target, worse=round(worse * scale), better=round(better * scale))


def _tail(images: int, worse: int, better: int, *, drop: float) -> float:
    """Return the largest probability, over the nuisance rate of gains, of an outcome as favourable as the one seen."""
    binom = _scipy_stats().binom
    seen = float(_score(images, worse, better, drop))
    # One row for each rate of gains, up to where both rates add up to 1; it matters most where it is small.
    gain_rates_R1 = np.concatenate([[0.0], np.geomspace(1e-3 / images, (1 - drop) / 2, 48)])[:, None]
    loss_rates_R1 = np.minimum(drop + gain_rates_R1, 1.0)
    losses_RL = _likely(images, loss_rates_R1)
    needed_RL = _gains_needed(images, losses_RL, drop, seen)
    rest_R1 = 1 - loss_rates_R1
    given_R1 = np.divide(gain_rates_R1, rest_R1, out=np.zeros_like(rest_R1), where=rest_R1 > 0).clip(0, 1)
    favourable_RL = binom.sf(needed_RL - 1, np.maximum(images - losses_RL, 0), given_R1)
    return float((binom.pmf(losses_RL, images, loss_rates_R1) * favourable_RL).sum(axis=1).max())


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
