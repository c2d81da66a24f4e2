"""How near the vectors of two encoders are: cosine similarity, and which nearest neighbours stay the same.

The bound on the neighbours kept holds for any number of images and any distribution. With one neighbour an image keeps
it or not: the bound is that of agreement. With ten, each image gives a share, and the bound is that of a bet against
every smaller mean (Waudby-Smith and Ramdas, Journal of the Royal Statistical Society B 86, 2024). Images count as
independent queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from vit_edge.metrics import (
    CONFIDENCE,
    TOP,
    Comparison,
    PairedAnswers,
    agreement_lower_bound,
    agreement_upper_bound,
    compare_answers,
    sqnr_db,
)

__all__ = [
    "BUDGET_NEIGHBOURS",
    "NEIGHBOURS_METHOD",
    "NUM_NEIGHBOURS",
    "EncoderComparison",
    "NeighboursKept",
    "PairedVectors",
    "Shares",
    "best_certifiable_neighbours",
    "compare_vectors",
    "fewest_images_for_neighbours",
    "images_needed_for_neighbours",
    "mean_lower_bound",
    "nearest",
]

Vectors: TypeAlias = npt.NDArray[np.float32]
Shares: TypeAlias = npt.NDArray[np.float64]
Indices: TypeAlias = npt.NDArray[np.int64]

# The first result of a search, and its first page; the budget is about the latter: two near-equal images that change
# places are no loss there.
NUM_NEIGHBOURS = (1, 10)
BUDGET_NEIGHBOURS = 10
NEIGHBOURS_METHOD = (
    "k = 1: exact (Clopper and Pearson 1934); k = 10: betting (Waudby-Smith and Ramdas 2024); one-sided 95 %"
)
# A bet never risks all: one image without a kept neighbour would end the bet for good.
_MOST_RISKED = 0.9
# Rows of similarities at once: with 100,000 images 100 MB.
_ROWS = 256
_MOST_IMAGES = 100_000


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedVectors:
    """The vectors [images, width] that two encoders give for the same images."""

    reference_BD: Vectors
    candidate_BD: Vectors

    @property
    def cosines(self) -> Shares:
        """Return the cosine similarity of both vectors of each image."""
        both = (_normalized(self.reference_BD), _normalized(self.candidate_BD))
        cosines_B: Shares = np.einsum("bd,bd->b", *both).clip(-1, 1)
        return cosines_B


@dataclass(frozen=True, kw_only=True, slots=True)
class NeighboursKept:
    """The percentage of each image's k nearest neighbours that stay the same, on average, and its one-sided bounds."""

    k: int
    percent: float
    lower_bound: float
    upper_bound: float


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderComparison:
    """A candidate against its reference on the same images.

    Cosine similarities are between both vectors of an image; `cosine_q05` is the 5 % quantile. `knn` compares the
    classes that the ten nearest neighbours vote for, None without labels.
    """

    images: int
    cosine_mean: float
    cosine_q05: float
    cosine_worst: float
    sqnr_db: float
    neighbours: tuple[NeighboursKept, ...]
    knn: Comparison | None

    @property
    def kept(self) -> NeighboursKept:
        """Return the figure that the budget is about."""
        return self.neighbours[-1]


def compare_vectors(
    vectors: PairedVectors, labels_B: Indices | None, *, order: Sequence[int]
) -> tuple[EncoderComparison, Shares]:
    """Return every paired figure of two encoders, and of each image the share of its ten nearest neighbours kept.

    `order` is one in which the images are as good as shuffled; the bets go through it.
    """
    both = [nearest(side, BUDGET_NEIGHBOURS) for side in (vectors.reference_BD, vectors.candidate_BD)]
    shares = {k: _shares_kept(both[0][:, :k], both[1][:, :k]) for k in NUM_NEIGHBOURS}
    cosines_B = vectors.cosines
    found = EncoderComparison(
        images=len(cosines_B),
        cosine_mean=float(cosines_B.mean()),
        cosine_q05=float(np.quantile(cosines_B, 0.05)),
        cosine_worst=float(np.min(cosines_B)),
        sqnr_db=sqnr_db(vectors.reference_BD, vectors.candidate_BD),
        neighbours=tuple(_kept(k, shares_B[np.asarray(order)]) for k, shares_B in shares.items()),
        knn=None if labels_B is None else _knn(both, labels_B, vectors),
    )
    return found, shares[BUDGET_NEIGHBOURS]


def nearest(vectors_BD: Vectors, most: int) -> Indices:
    """Return the positions of the `most` other vectors with the largest cosine similarity, the nearest first."""
    unit_BD = _normalized(vectors_BD)
    most = min(most, len(unit_BD) - 1)
    found = np.empty((len(unit_BD), most), dtype=np.int64)
    for start in range(0, len(unit_BD), _ROWS):
        similarity_RB = unit_BD[start : start + _ROWS] @ unit_BD.T
        rows = np.arange(len(similarity_RB))
        similarity_RB[rows, start + rows] = -np.inf  # itself
        some_RK = np.argpartition(-similarity_RB, most - 1, axis=1)[:, :most]
        by_position_RK = np.sort(some_RK, axis=1)  # equal similarities come in the order of the images
        order_RK = np.argsort(-np.take_along_axis(similarity_RB, by_position_RK, axis=1), axis=1, kind="stable")
        found[start : start + _ROWS] = np.take_along_axis(by_position_RK, order_RK, axis=1)
    return found


def mean_lower_bound(shares_B: Shares, *, confidence: float = CONFIDENCE) -> float:
    """Return the one-sided lower bound, at 95 % confidence, of the mean of values in [0, 1] that are in no order.

    A gambler bets on every image that its share is above a mean m; where m is the mean or more, the capital grows
    20-fold with a probability of at most 5 %. The bound is the largest m that such a capital rules out.
    """
    count, win = len(shares_B), np.log(1 / (1 - confidence))
    number_B = np.arange(1, count + 1)
    mean_B = (0.5 + np.cumsum(shares_B)) / (number_B + 1)
    variance_B = (0.25 + np.cumsum((shares_B - mean_B) ** 2)) / (number_B + 1)
    before_B = np.concatenate([[0.25], variance_B[:-1]])  # a bet knows the images before it only
    stake_B = np.sqrt(2 * win / (count * before_B))
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        gains_B = np.minimum(stake_B, _MOST_RISKED / middle) * (shares_B - middle)
        low, high = (middle, high) if np.log1p(gains_B).sum() >= win else (low, middle)
    return low


def best_certifiable_neighbours(images: int) -> float:
    """Return the largest share in percent that this many images can certify: the bound if every neighbour is kept."""
    return mean_lower_bound(np.ones(images)) * 100


def fewest_images_for_neighbours(min_neighbours: float) -> int | None:
    """Return about how many images certify a share if every neighbour is kept; None if over 100,000."""
    return images_needed_for_neighbours(np.ones(1), min_neighbours=min_neighbours)


def images_needed_for_neighbours(shares_B: Shares, *, min_neighbours: float) -> int | None:
    """Return about how many images would certify `min_neighbours` at the shares seen, or None where none would."""
    if shares_B.mean() * 100 <= min_neighbours:
        return None
    number = len(shares_B)
    while number <= _MOST_IMAGES:
        if mean_lower_bound(np.resize(shares_B, number)) * 100 >= min_neighbours:
            return number
        number = number + 1 + number // 10
    return None


def _normalized(vectors_BD: Vectors) -> Vectors:
    length_B1 = np.linalg.norm(vectors_BD, axis=1, keepdims=True)
    return np.asarray(vectors_BD / np.maximum(length_B1, np.finfo(np.float32).tiny), dtype=np.float32)


def _shares_kept(before_BK: Indices, after_BK: Indices) -> Shares:
    kept_BK = (before_BK[:, :, None] == after_BK[:, None, :]).any(axis=2)
    return np.asarray(kept_BK.mean(axis=1), dtype=np.float64)


def _kept(k: int, shares_B: Shares) -> NeighboursKept:
    images, percent = len(shares_B), float(shares_B.mean() * 100)
    if k == 1:
        changed = images - int(shares_B.sum())
        lower, upper = agreement_lower_bound(images, changed=changed), agreement_upper_bound(images, changed=changed)
    else:
        lower, upper = mean_lower_bound(shares_B) * 100, 100 - mean_lower_bound(1 - shares_B) * 100
    return NeighboursKept(k=k, percent=percent, lower_bound=lower, upper_bound=upper)


def _knn(both: Sequence[Indices], labels_B: Indices, vectors: PairedVectors) -> Comparison:
    """Return how the classes compare that the nearest neighbours vote for, by the rules of a classifier's classes."""
    votes = [_vote(labels_B[nearest_BK]) for nearest_BK in both]
    no_margin_B = np.zeros(len(labels_B))
    answers = PairedAnswers(
        reference_BT=votes[0][:, None],
        candidate_BT=votes[1][:, None],
        reference_margin_B=no_margin_B,
        candidate_margin_B=no_margin_B,
        num_classes=TOP,  # one class is voted for: there is no top-5
        signal_power=float(np.sum(np.square(vectors.reference_BD, dtype=np.float64))),
        noise_power=float(np.sum(np.square(vectors.reference_BD - vectors.candidate_BD, dtype=np.float64))),
    )
    return compare_answers(answers, labels_B)


def _vote(labels_BK: Indices) -> Indices:
    """Return the most frequent label of each row; of several the one that comes first, which is the nearest."""
    counts_BK = (labels_BK[:, :, None] == labels_BK[:, None, :]).sum(axis=2)
    return np.take_along_axis(labels_BK, counts_BK.argmax(axis=1)[:, None], axis=1)[:, 0]
