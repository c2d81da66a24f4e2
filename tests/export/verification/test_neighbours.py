"""What is measured of two encoders, and what the bounds claim: by hand, and by many draws."""

from __future__ import annotations

import numpy as np
import pytest

from vit_edge.errors import UsageError
from vit_edge.export.verification.neighbours import (
    EncoderComparison,
    PairedVectors,
    best_certifiable_neighbours,
    compare_vectors,
    fewest_images_for_neighbours,
    mean_lower_bound,
    nearest,
)
from vit_edge.export.verification.verdict import Budget, decide_encoder
from vit_edge.metrics import agreement_lower_bound


def _vectors(count: int, width: int = 16, seed: int = 0) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


def _compared(before: object, after: object, labels: object = None) -> EncoderComparison:
    vectors = PairedVectors(reference_BD=np.asarray(before), candidate_BD=np.asarray(after))
    return compare_vectors(vectors, labels, order=range(len(vectors.reference_BD)))[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [30, 300])  # less than one block of rows, and more
def test_the_nearest_are_those_of_all_pairs_and_equal_ones_come_in_order(count: int) -> None:
    vectors = _vectors(count)
    vectors[5] = vectors[3]
    unit = vectors.astype(np.float64) / np.linalg.norm(vectors, axis=1, keepdims=True)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    found = nearest(vectors, 10)
    expected = np.argsort(-similarity, axis=1, kind="stable")[:, :10]
    assert (found == expected).mean() > 0.99  # float32 may swap two that are as good as equal
    assert found[3, 0] == 5
    assert found[5, 0] == 3
    assert nearest(vectors[:4], 10).shape == (4, 3)


def test_the_length_of_a_vector_changes_no_neighbour() -> None:
    vectors = _vectors(60)
    found = _compared(vectors, vectors * np.linspace(0.1, 10, 60, dtype=np.float32)[:, None])
    assert [kept.percent for kept in found.neighbours] == [100.0, 100.0]
    assert found.cosine_worst == pytest.approx(1.0, abs=1e-6)


def test_a_candidate_that_knows_nothing_keeps_only_what_chance_keeps() -> None:
    found = _compared(_vectors(400), _vectors(400, seed=1))
    first, ten = found.neighbours
    assert first.percent < 3
    assert 0.5 < ten.percent < 6  # 10 of 399 by chance
    assert abs(found.cosine_mean) < 0.1
    assert found.cosine_worst < found.cosine_q05 < found.cosine_mean


def test_with_one_neighbour_the_bound_is_that_of_agreement() -> None:
    before = _vectors(200)
    found = _compared(before, before + 0.3 * _vectors(200, seed=2))
    first, ten = found.neighbours
    changed = round(200 * (1 - first.percent / 100))
    assert 0 < changed < 200
    assert first.lower_bound == pytest.approx(agreement_lower_bound(200, changed=changed))
    assert ten.lower_bound < ten.percent < ten.upper_bound


@pytest.mark.parametrize("shares", [(0.0, 1.0, 0.9), (0.6, 1.0, 0.5), (0.85, 0.95, 0.5)])
def test_the_bound_of_a_mean_holds_in_19_of_20_draws(shares: tuple[float, float, float]) -> None:
    low, high, often = shares
    mean = often * high + (1 - often) * low
    random = np.random.default_rng(7)
    draws = np.where(random.random((400, 120)) < often, high, low)
    bounds = np.array([mean_lower_bound(draw) for draw in draws])
    assert (bounds <= mean).mean() >= 0.95
    assert bounds.mean() > mean - 0.12  # and it is worth something


def test_more_images_and_less_spread_give_a_higher_bound() -> None:
    assert mean_lower_bound(np.ones(50)) < mean_lower_bound(np.ones(500)) < 1
    spread, alike = np.tile([0.8, 1.0], 250), np.full(500, 0.9)
    assert mean_lower_bound(np.tile([0.0, 1.0] + [1.0] * 8, 50)) < mean_lower_bound(spread) < mean_lower_bound(alike)
    assert mean_lower_bound(np.zeros(10)) == 0.0


def test_the_fewest_images_are_enough_and_no_number_certifies_all() -> None:
    fewest = fewest_images_for_neighbours(95)
    assert fewest is not None
    assert best_certifiable_neighbours(fewest) >= 95 > best_certifiable_neighbours(fewest // 2)
    assert fewest_images_for_neighbours(100) is None


def test_the_verdict_rests_on_the_bound() -> None:
    before = _vectors(300)
    after = before + np.float32(0.05) * _vectors(300, seed=3)
    vectors = PairedVectors(reference_BD=before, candidate_BD=after)
    found, kept = compare_vectors(vectors, None, order=range(300))
    share, bound = found.kept.percent, found.kept.lower_bound
    assert decide_encoder(found, kept, Budget(min_neighbours=bound - 0.1)) == ("pass", None)
    verdict, needed = decide_encoder(found, kept, Budget(min_neighbours=(share + bound) / 2))
    assert verdict == "inconclusive"
    assert needed is not None
    assert needed > 300
    assert decide_encoder(found, kept, Budget(min_neighbours=share + 0.5))[0] == "fail"


def test_the_classes_that_neighbours_vote_for_are_compared_as_a_classifiers_are() -> None:
    labels = np.repeat([0, 1], 60)
    before = _vectors(120) + 3 * np.where(labels, 1, -1)[:, None].astype(np.float32)
    damaged = before.copy()
    damaged[:30] = -damaged[:30]  # they join the other class
    found = _compared(before, damaged, labels)
    assert found.knn is not None
    assert found.knn.reference_top1 == 100.0
    assert found.knn.drop_points >= 20
    assert found.knn.drop_upper_bound_points > found.knn.drop_points
    verdict, _ = decide_encoder(found, np.ones(120), Budget(max_drop_points=5))
    assert verdict == "fail"


@pytest.mark.parametrize("percent", [-1.0, 101.0])
def test_a_share_that_is_none_is_refused(percent: float) -> None:
    with pytest.raises(UsageError, match="min neighbours"):
        Budget(min_neighbours=percent)
